"""PEFT adapters: new LoRA adapters, and saved ones put on a model.

For a checkpoint with a vision tower only the language model is trained, in a class whose layers have other names than
those of the class in ``config.json``. Adapters are saved under the latter names, which servers and other readers use.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from prefopt.core.hub import import_bitsandbytes
from prefopt.core.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, require_adapter, vet_folder
from prefopt.errors import ConfigError, ModelError, first_line
from prefopt.model.architectures import architectures_of, causal_model
from prefopt.model.checkpoint import origin_of
from prefopt.model.lora_targets import lora_targets
from prefopt.model.placeholders import carry_contents, make_room
from prefopt.model.precision import disable_dropout
from prefopt.model.supported import model_errors

log = logging.getLogger(__name__)

ADDED_ROWS = 1 << 16
"""Rows that an adapter may add for tokens that it trains without holding their rows."""
PREFIX = "base_model.model."
"""PEFT's prefix of module names."""
Names = tuple[tuple[str, str], ...]
"""Pairs of module names: of parts of a language model, and of the same parts in the larger model that it is in."""


def new_lora(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: list[str] | None,
    task: str = "CAUSAL_LM",
    towers: bool = False,
) -> torch.nn.Module:
    """Wrap ``model`` in a new LoRA adapter, drawn from torch's generator; all other weights are frozen.

    ``targets`` and ``towers``: see :func:`lora_targets`. ``task``: PEFT's; with ``SEQ_CLS`` the scalar head trains in
    full.
    """
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    plain = causal_model(model)
    found = lora_targets(plain, targets, towers=towers)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if found.parameters else dropout,
        target_modules=found.modules,
        target_parameters=found.parameters,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type=task,
    )
    try:
        with peft_warnings_off():
            wrapped: Any = get_peft_model(plain, config)
    except ValueError as error:
        raise ConfigError(f"--lora-targets {' '.join(targets or [])}: {first_line(error)}") from error
    wrapped.prefopt_targets = found.words
    if found.parameters and dropout:  # PEFT refuses dropout on all layers where an adapter is on a parameter
        wrapped.prefopt_targets += "; no dropout on fused weights"
        for layer in (m for m in wrapped.modules() if isinstance(m, Linear)):
            layer.lora_dropout.update({name: torch.nn.Dropout(dropout) for name in layer.lora_dropout})
    return cast(torch.nn.Module, wrapped)


def add_adapter(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """Put a saved PEFT adapter on ``model``, trainable, with its dropout off."""
    import_bitsandbytes()
    from peft import PeftModel

    require_adapter(folder)
    if Path(folder).is_dir() and not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"--adapter {folder} holds no {ADAPTER_WEIGHTS}; pickled weights are not opened")
    vet_folder(folder)
    with model_errors(folder), peft_warnings_off():
        plain = causal_model(model)
        with with_inner_names(folder, plain) as named:
            path = Path(named)
            grow_embedding(plain, max(_rows(plain, path), default=0))
            saves_embedding = _saves_embedding(plain, path)
            held = _shapes(path)
            for name, parameter in plain.named_parameters():
                if name in held:
                    make_room(parameter)
            wrapped: Any = PeftModel.from_pretrained(
                plain, named, is_trainable=True, config=_with_plain_targets(plain, path)
            )
        wrapped.prefopt_saves_embedding = saves_embedding
    disable_dropout(wrapped)
    return cast(torch.nn.Module, wrapped)


def _with_plain_targets(model: torch.nn.Module, folder: Path) -> Any:
    """The adapter's configuration, with patterns replaced by the modules that its weights are for: an untrusted pattern
    might never stop matching."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(folder))
    target = getattr(config, "target_modules", None)
    by_pattern = isinstance(target, str) and target != "all-linear"
    if not by_pattern and not isinstance(getattr(config, "exclude_modules", None), str):
        return config
    modules, found = {name for name, _ in model.named_modules()}, set()
    for name in _shapes(folder):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    whole = tuple(f".{name}" for name in config.modules_to_save or ())
    config.target_modules = sorted(name for name in found - {""} if not f".{name}".endswith(whole))
    config.exclude_modules = None
    return config


def grow_embedding(model: Any, rows: int) -> None:
    """Give the embedding and the head of ``model`` at least ``rows`` rows; new ones are zero."""
    before = int(model.get_input_embeddings().weight.shape[0])
    if rows <= before:
        return

    def ends() -> list[Any]:
        return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]

    old = [end.weight for end in ends()]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer, weight in zip(ends(), old, strict=True):
            for values in layer.parameters():
                if values.shape[0] == rows:  # the weight [rows, H], and a head's bias [rows]
                    values[before:] = 0
            carry_contents(weight, layer.weight)


def _saves_embedding(model: Any, folder: Path) -> bool:
    """Whether the adapter holds the whole embedding or head, as PEFT saves them where tokens were added."""
    trained = ("lora_", "modules_to_save", "original_module", "trainable_tokens")
    names = _embedding_names(model)
    return any(key.startswith(names) and not any(part in key for part in trained) for key in _shapes(folder))


def _rows(model: Any, folder: Path) -> Iterator[int]:
    """Rows of embedding and head that the adapter's weights and trained tokens need. A weight of another width is
    skipped: the adapter belongs to another model, which loading reports."""
    rows, width = (int(n) for n in model.get_input_embeddings().weight.shape[:2])
    indices = read_adapter(folder).get("trainable_token_indices")
    for several in indices.values() if isinstance(indices, dict) else [indices]:
        for needed in (int(i) + 1 for i in several or ()):
            if needed > rows + ADDED_ROWS:
                raise ModelError(f"{folder}: it trains token {needed - 1:,}, far beyond the vocabulary of the model")
            yield needed
    names = _embedding_names(model)
    for key, shape in _shapes(folder).items():
        if not key.startswith(names):
            continue
        if "lora_embedding_A" in key:  # [r, rows]
            yield shape[1]
        elif "lora_B" in key or (shape[1:] == [width] and "lora_" not in key):
            yield shape[0]  # [rows, r] and [rows, H]


def _embedding_names(model: Any) -> tuple[str, ...]:
    """Prefixes of the weights of embedding and head."""
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in ends)


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all weights of an adapter, by their names in the model."""
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        return {key.removeprefix(PREFIX): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)


def nesting_of(model: Any) -> Names | None:
    """Where the parts of ``model`` are in the class that its folder's ``config.json`` names; None where that is its own
    class, or it came from no folder."""
    origin = origin_of(model)
    if origin is None or not origin.kept:
        return None
    config = origin.config
    named = architectures_of(config)
    if type(config) is type(model.config) or not named or (whole := _empty_model(named[0], config)) is None:
        return None
    if (place := _place(whole, type(model))) is not None:  # with its head
        return (("", place),)
    prefix = model.base_model_prefix
    place = _place(whole, type(getattr(model, prefix, None)))
    heads = [next((n for n, m in of.named_modules() if m is of.get_output_embeddings()), None) for of in (model, whole)]
    parts = tuple((inner, outer) for inner, outer in ((prefix, place), tuple(heads)) if inner and outer)
    return parts if any(inner != outer for inner, outer in parts) else None


def write_nested(folder: Path, model: Any, nesting: Names) -> None:
    """Rename the saved adapter of ``model`` to the names of the larger model. Targets are written in full: towers
    whose layers have the same names get none."""

    def outward(name: str) -> str:
        return _moved(name, nesting) or name

    config = read_adapter(folder)
    targets: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and (len(module.lora_A) or len(module.lora_embedding_A)):
            plain = name.replace(".base_layer", "").removeprefix(PREFIX)
            if (field := getattr(module, "parameter_name", None)) is None:
                targets["target_modules"].append(outward(plain))
            else:
                targets["target_parameters"].append(outward(f"{plain}.{field}"))
    config |= targets | {"target_parameters": targets["target_parameters"] or None}
    _rename(folder, folder, {name: outward(name) for name in _shapes(folder)}, config)


@contextmanager
def with_inner_names(folder: str, model: Any) -> Iterator[str]:
    """The folder of an adapter with the names of ``model``, a language model: itself, or a temporary copy."""
    found = _shapes(Path(folder))
    inward = tuple((outer, inner) for inner, outer in nesting_of(model) or ())
    moved = tuple((outer, inner) for outer, inner in inward if inner != outer)
    if all(_moved(name, moved) is None for name in found):
        yield folder
        return
    names = {name: _moved(name, inward) for name in found}
    if others := [name for name, inner in names.items() if inner is None]:
        warnings.warn(
            f"{folder}: {len(others)} tensors of the adapter are on layers that text does not reach, the first is"
            f" {others[0]}; they are left out",
            stacklevel=2,
        )
    config = read_adapter(folder)
    for field in ("target_modules", "target_parameters"):
        if isinstance(config.get(field), list):
            config[field] = [_moved(name, inward) or name for name in config[field]]
    with tempfile.TemporaryDirectory(prefix="prefopt-adapter-") as copied:
        _rename(Path(folder), Path(copied), {n: inner for n, inner in names.items() if inner is not None}, config)
        yield copied


def _empty_model(name: str, config: Any) -> PreTrainedModel | None:
    """A model of a class of transformers without memory for its weights; None where there is no such class, or where
    it cannot be built, which is logged."""
    try:
        kind = getattr(transformers, name, None)
        if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
            return None
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception as error:  # vision towers of other libraries
        log.warning("adapters are for the language model alone: %s cannot be built (%s)", name, first_line(error))
        return None


def _place(whole: Any, kind: type) -> str | None:
    """The name of the module of a class."""
    return next((name for name, module in whole.named_modules() if name and type(module) is kind), None)


def _moved(name: str, parts: Names) -> str | None:
    """A name under the first of some modules, under the second; None where it is under none of the first."""
    for place, other in parts:
        if not place or name == place or name.startswith(f"{place}."):
            return ".".join(part for part in (other, name.removeprefix(place).lstrip(".")) if part)
    return None


def _rename(source: Path, folder: Path, names: dict[str, str], config: dict[str, Any]) -> None:
    """Write the tensors ``names`` of ``source`` under new names, and ``config``, to ``folder``; copy other JSON."""
    with safe_open(source / ADAPTER_WEIGHTS, "pt") as file:
        metadata = file.metadata()
        tensors = {PREFIX + new: file.get_tensor(PREFIX + old) for old, new in names.items()}
    if source != folder:
        for other in source.glob("*.json"):
            shutil.copyfile(other, folder / other.name)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata=metadata or {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Hide PEFT's warnings that no user can act on: deprecated names, the ranks of fused matrices, layers that are
    merged already, and tied heads, which :mod:`prefopt.model.merge` handles."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", "All adapters are already merged")
        yield
