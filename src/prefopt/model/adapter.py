"""PEFT adapters: saved ones put on a model, and new ones.

Of a checkpoint with a vision tower the language model is trained alone, in a class whose layers have other names than
in the class that ``config.json`` names. Whoever loads the checkpoint as it says, and servers, look for the latter.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from prefopt.core.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, require_adapter, vet_folder
from prefopt.errors import ConfigError, ModelError, first_line
from prefopt.model.architectures import architectures_of, causal_model
from prefopt.model.checkpoint import origin_of
from prefopt.model.lora_targets import lora_targets
from prefopt.model.precision import disable_dropout
from prefopt.model.supported import model_errors

ADDED = 1 << 16
"""So many rows may be added for tokens that an adapter names and has no rows of."""
PREFIX = "base_model.model."
"""What PEFT writes before the name of a module."""


def grow_for_adapter(model: Any, folder: str | Path) -> None:
    """Let the embedding and the head of ``model`` have as many rows as the adapter in ``folder`` has of them.

    New rows are zero until the adapter's own are loaded. A model that has room enough stays as it is, and so does one
    of another width: the adapter belongs to another model, and loading says so.
    """
    embedding = model.get_input_embeddings()
    rows = max(_rows(model, Path(folder)), default=0)
    before = int(embedding.weight.shape[0])
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in () if layer is None else layer.parameters():
                if values.shape[0] == rows:  # the weight [rows, H], and a head's bias [rows]
                    values[before:] = 0


def holds_embedding(model: Any, folder: str | Path) -> bool:
    """Whether the adapter in ``folder`` has the embedding or the head of ``model`` whole beside what it trains, as PEFT
    saves them where tokens were added: no base has these rows."""
    trained = ("lora_", "modules_to_save", "original_module", "trainable_tokens")
    names = _ends(model)
    return any(key.startswith(names) and not any(part in key for part in trained) for key, _ in _shapes(Path(folder)))


def _rows(model: Any, folder: Path) -> Iterator[int]:
    """Rows of embedding and head that the adapter speaks of, each time that it does."""
    width = int(model.get_input_embeddings().weight.shape[1])
    most = int(model.get_input_embeddings().weight.shape[0]) + ADDED
    indices = read_adapter(folder).get("trainable_token_indices")
    for several in indices.values() if isinstance(indices, dict) else [indices]:
        for rows in (int(i) + 1 for i in several or ()):
            if rows > most:
                raise ModelError(f"{folder}: it trains token {rows - 1:,}, which the model is far from having")
            yield rows
    names = _ends(model)
    for key, shape in _shapes(folder):
        if not key.startswith(names):
            continue
        if "lora_embedding_A" in key:  # [r, rows]
            yield shape[1]
        elif "lora_B" in key or (shape[1:] == [width] and "lora_" not in key):
            yield shape[0]  # [rows, r] and [rows, H]


def _ends(model: Any) -> tuple[str, ...]:
    """How the names of the weights of embedding and head begin."""
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in ends)


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Names in the model, and shapes, of all weights of an adapter."""
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            yield key.removeprefix(PREFIX), file.get_slice(key).get_shape()


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Nesting:
    """Where the parts of a language model stand in the larger one: pairs of names of modules, own and there."""

    parts: tuple[tuple[str, str], ...]

    def outward(self, name: str) -> str:
        """A name of the language model, in the larger one."""
        return _moved(name, self.parts) or name

    def inward(self, name: str) -> str | None:
        """A name of the larger model, in the language model; none where it is of another part."""
        return _moved(name, tuple((there, own) for own, there in self.parts))

    def holds(self, name: str) -> bool:
        """Whether a name is one of the larger model and of no smaller one."""
        return any(_under(name, there) for own, there in self.parts if own != there)


def nesting_of(model: Any) -> Nesting | None:
    """None for a model of the very class that its folder's ``config.json`` names, or one that came from no folder."""
    origin = origin_of(model)
    if origin is None or not origin.kept:
        return None
    config = origin.config
    named = architectures_of(config)
    if type(config) is type(model.config) or not named or (whole := _of_class(named[0], config)) is None:
        return None
    if (place := _place(whole, type(model))) is not None:  # with its head and all
        return Nesting((("", place),))
    prefix = model.base_model_prefix
    place = _place(whole, type(getattr(model, prefix, None)))
    heads = [next((n for n, m in of.named_modules() if m is of.get_output_embeddings()), None) for of in (model, whole)]
    parts = [(own, there) for own, there in ((prefix, place), tuple(heads)) if own and there]
    return Nesting(tuple(parts)) if any(own != there for own, there in parts) else None


def write_nested(folder: Path, model: Any, nesting: Nesting) -> None:
    """Rename what PEFT has saved of ``model``, the adapted one, in ``folder``.

    Targets are named in full, so that towers whose layers have the same names get none.
    """
    config = read_adapter(folder)
    modules, parameters = _adapted(model)
    config["target_modules"] = [nesting.outward(name) for name in modules]
    config["target_parameters"] = [nesting.outward(name) for name in parameters] or None
    _rename(folder, folder, {key: PREFIX + nesting.outward(key.removeprefix(PREFIX)) for key in _keys(folder)}, config)


@contextmanager
def with_inner_names(folder: str, model: Any) -> Iterator[str]:
    """The folder of an adapter with the names that ``model``, a language model, has: itself, or a copy for a while."""
    found = _keys(Path(folder))
    nesting = nesting_of(model)
    if nesting is None or not any(nesting.holds(key.removeprefix(PREFIX)) for key in found):
        yield folder
        return
    names = {key: nesting.inward(key.removeprefix(PREFIX)) for key in found}
    if others := [key for key, name in names.items() if name is None]:
        warnings.warn(
            f"{folder}: {len(others)} tensors of the adapter are on layers that text does not reach, the first is"
            f" {others[0]}; they are left out",
            stacklevel=2,
        )
    config = read_adapter(folder)
    for field in ("target_modules", "target_parameters"):
        if isinstance(config.get(field), list):
            config[field] = [nesting.inward(name) or name for name in config[field]]
    with tempfile.TemporaryDirectory(prefix="prefopt-adapter-") as there:
        renamed = {key: PREFIX + name for key, name in names.items() if name is not None}
        _rename(Path(folder), Path(there), renamed, config)
        yield there


def _of_class(name: str, config: Any) -> PreTrainedModel | None:
    """The model of a class of transformers, without memory for its weights; none where there is no such class, or what
    it wants is not installed, which is said."""
    try:
        kind = getattr(transformers, name, None)
        if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
            return None
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception as error:  # vision towers of other libraries
        log.warning(
            "adapters of this model are for its language model alone: %s cannot be built (%s)", name, first_line(error)
        )
        return None


def _place(whole: Any, kind: type) -> str | None:
    """The name of the module of a class."""
    return next((name for name, module in whole.named_modules() if name and type(module) is kind), None)


def _under(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")


def _moved(name: str, parts: tuple[tuple[str, str], ...]) -> str | None:
    for place, other in parts:
        if _under(name, place):
            return ".".join(part for part in (other, name.removeprefix(place).lstrip(".")) if part)
    return None


def _adapted(model: Any) -> tuple[list[str], list[str]]:
    """Names of the layers, and of the parameters, that have an adapter; as they are in the model without it."""
    modules: list[str] = []
    parameters: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and (len(module.lora_A) or len(module.lora_embedding_A)):
            plain = name.replace(".base_layer", "").removeprefix(PREFIX)
            field = getattr(module, "parameter_name", None)
            (modules if field is None else parameters).append(plain if field is None else f"{plain}.{field}")
    return modules, parameters


def _keys(folder: Path) -> list[str]:
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        return list(file.keys())


def _rename(source: Path, folder: Path, names: dict[str, str], config: dict[str, Any]) -> None:
    """Write the tensors of ``source`` that ``names`` has, and ``config``, to ``folder``; the rest is copied."""
    with safe_open(source / ADAPTER_WEIGHTS, "pt") as file:
        metadata = file.metadata()
        tensors = {new: file.get_tensor(old) for old, new in names.items()}
    if source != folder:
        for other in source.glob("*.json"):
            shutil.copyfile(other, folder / other.name)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata=metadata or {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def add_adapter(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """Put a saved PEFT adapter on ``model``, trainable; the dropout it was trained with is off."""
    from peft import PeftModel

    require_adapter(folder)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ModelError(f"--adapter {folder} holds no adapter_model.safetensors; pickled weights are not opened")
    vet_folder(folder)
    with model_errors(folder), peft_warnings_off():
        plain = causal_model(model)
        with with_inner_names(folder, plain) as named:
            grow_for_adapter(plain, named)
            whole = holds_embedding(plain, named)
            config = _with_plain_targets(plain, named)
            wrapped: Any = PeftModel.from_pretrained(plain, named, is_trainable=True, config=config)
        wrapped.prefopt_saves_embedding = whole
    disable_dropout(wrapped)
    trainable: torch.nn.Module = wrapped
    return trainable


def _with_plain_targets(model: torch.nn.Module, folder: str) -> Any:
    """The configuration of the adapter in ``folder``. Where it says by a pattern which modules of ``model`` it is on,
    the modules that its weights are for take the pattern's place: a stranger's could be matched without end.
    """
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(folder)
    target = getattr(config, "target_modules", None)
    by_pattern = isinstance(target, str) and target != "all-linear"
    if not by_pattern and not isinstance(getattr(config, "exclude_modules", None), str):
        return config
    modules, found = {name for name, _ in model.named_modules()}, set()
    with safe_open(Path(folder) / ADAPTER_WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name = key.removeprefix(PREFIX)
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found.add(name)
    whole = tuple(f".{name}" for name in config.modules_to_save or ())
    config.target_modules = sorted(name for name in found - {""} if not f".{name}".endswith(whole))
    config.exclude_modules = None
    return config


def new_lora(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: list[str] | None,
    task: str = "CAUSAL_LM",
) -> torch.nn.Module:
    """Wrap ``model`` in a fresh LoRA adapter (which changes nothing yet); all other weights are frozen.

    ``targets``: see :func:`lora_targets`. The random start comes from torch's generator. ``task`` is PEFT's name of it:
    under ``SEQ_CLS`` the scalar head is trained whole, and saved with the adapter.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    plain = causal_model(model)
    found = lora_targets(plain, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if found.parameters else dropout,
        target_modules=found.modules,
        target_parameters=found.parameters,
        fan_in_fan_out=transposed,
        task_type=task,
    )
    try:
        with peft_warnings_off():
            wrapped: Any = get_peft_model(plain, config)
    except ValueError as error:
        raise ConfigError(f"--lora-targets {' '.join(targets or [])}: {first_line(error)}") from error
    wrapped.prefopt_targets = found.words
    if found.parameters and dropout:
        _drop_inputs(wrapped, dropout)
        wrapped.prefopt_targets += "; no dropout on fused weights"
    adapted: torch.nn.Module = wrapped
    return adapted


def _drop_inputs(model: torch.nn.Module, rate: float) -> None:
    """Dropout on the layers that can have it, where PEFT refuses it for the sake of others: those on parameters."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if isinstance(layer, Linear):
            for name in list(layer.lora_dropout):
                layer.lora_dropout[name] = torch.nn.Dropout(rate)


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Hide what peft warns of and no user can change: a name that transformers has deprecated, and that in a
    mixture of experts the adapter of two fused matrices has the rank of one. That layers are merged already, and that a
    head is tied to an embedding with an adapter on it, or no longer, is seen to by :mod:`prefopt.model.merge`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", "All adapters are already merged")
        yield
