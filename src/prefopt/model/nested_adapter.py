"""Adapters of a language model that was loaded out of a larger one, written for the class of the larger one.

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

from prefopt.disk.adapter_folder import read_adapter
from prefopt.disk.vetted import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from prefopt.errors import first_line
from prefopt.model.causal import architectures_of
from prefopt.model.checkpoint import origin_of
from prefopt.model.grown_vocabulary import PREFIX

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
def as_of_text(folder: str, model: Any) -> Iterator[str]:
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
