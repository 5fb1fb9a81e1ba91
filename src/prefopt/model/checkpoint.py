"""The tensors in a model's folder, told from the headers of its files, and what they are called in the loaded model.

A class of transformers leaves aside whatever it has no place for: the vision tower of a checkpoint whose language model
is loaded alone, its layers for multi-token prediction, a value head. :class:`Origin` knows those, and under which name
of the checkpoint each weight of the model belongs, so that a trained model can be written as the checkpoint that it
came from::

    origin = origin_of(model)               # put there by prefopt.model.load; none for a model given in Python
    origin.untouched                        # names of the checkpoint that are in no weight of the model
    origin.checkpoint.tensor(name)          # one of them
    origin.stored(model, state)             # the model's weights, under the checkpoint's names
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prefopt.disk.vetted import read_object
from prefopt.errors import ModelError
from prefopt.model.identity import weight_files

_ATTRIBUTE = "prefopt_origin"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file. ``dtype`` is safetensors' name of its type."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        bits = re.match(r"[A-Z]+(\d+)", self.dtype)
        return math.ceil(math.prod(self.shape) * (int(bits[1]) if bits else 8) / 8)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of ``folder`` by name, as transformers would find them. Only headers are in memory."""

    folder: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def read(cls, folder: str | Path) -> Checkpoint:
        """Raises :class:`ModelError` for a folder without weights, or with damaged or pickled ones."""
        path = Path(folder)
        try:
            files = weight_files(path, read_object(path / "config.json"))
            return cls(path, {name: found for file in files for name, found in headers(file).items()})
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder}: its files cannot be read ({error}); copy the model again") from error

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the type in which it is stored. Raises :class:`ModelError` where it is gone."""
        stored = self.tensors[name]
        try:
            with safe_open(stored.file, framework="pt") as file:
                found: torch.Tensor = file.get_tensor(name)
            return found
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{stored.file}: {name} cannot be read ({error}); put the model back") from error

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors."""
        return sum(self.tensors[name].nbytes for name in names)


def headers(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds. Raises what safetensors does."""
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        return {name: Stored(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that a model was loaded from, and what became of each of its tensors.

    ``renamed``: by name in the checkpoint, the name it has in the model, or would have there. ``converted``: those of
    them that are a part of a weight, or several (experts that the model holds as one). ``untouched``: in no weight.
    ``kept``: whether they are written beside the model's own; not beside a reward model made of a language model.
    ``config``: what ``config.json`` says there. It is held, for the folder may be gone when the model is saved.
    """

    checkpoint: Checkpoint
    config: Any
    renamed: Mapping[str, str]
    converted: frozenset[str]
    untouched: tuple[str, ...]
    kept: bool = True

    def left_behind(self, used: Iterable[str] = ()) -> Origin:
        """Where a model of another kind comes from, which has ``used`` some of the tensors in a way of its own."""
        rest = tuple(n for n in self.untouched if n not in set(used))
        return replace(self, untouched=rest, kept=False)

    @property
    def covered(self) -> set[str]:
        """Weights of the model that stand in the checkpoint under a name of their own."""
        return {self.renamed[n] for n in self.checkpoint.tensors if n not in self.untouched}

    def stored(self, model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights ``state`` of ``model`` under the names of the checkpoint; shared ones as often as they stand there.

        A weight that the checkpoint has not (a head that is no longer tied) comes under transformers' name for it.
        """
        left = set(self.untouched) | self.converted
        plain = {name: state[new] for name, new in self.renamed.items() if name not in left}
        written = {self.renamed[name] for name in plain}
        reverted = _reverted(model, {name: value for name, value in state.items() if name not in written})
        shared = {_place(value) for value in plain.values()}
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        found = dict(plain)
        for name, value in reverted.items():
            kin = name if name in self.converted else _kin(name, self.converted)
            if kin is not None:
                found[kin] = value
            elif _place(value) not in shared and name not in ignored:
                found[name] = value
        return found


def trace(model: Any, checkpoint: Checkpoint, config: Any) -> Origin:
    """Which tensor of ``checkpoint`` went where in ``model``, which transformers has just loaded from it; ``config`` is
    the folder's."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    renamed, converted, untouched = {}, set(), []
    for name in checkpoint.tensors:
        new, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:  # as transformers does: it was the model's own name already
            new, pattern = rename_source_key(name, [], [], prefix, state)
        renamed[name] = new
        if new not in state:
            untouched.append(name)
        elif pattern is not None:
            converted.add(name)
    return Origin(checkpoint, config, renamed, frozenset(converted), tuple(untouched))


def set_origin(model: Any, origin: Origin) -> None:
    """Let ``model`` know where it comes from."""
    setattr(model, _ATTRIBUTE, origin)


def origin_of(model: Any) -> Origin | None:
    """Where a model comes from; none for one that was given in Python, or made of another."""
    found: Origin | None = getattr(model, _ATTRIBUTE, None)
    return found


def _reverted(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With transformers' conversions of the loading undone."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return found


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are one."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape)


def _kin(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that differs from ``name`` by the prefix of the base model alone."""
    return next((n for n in names if n.endswith(f".{name}") or name.endswith(f".{n}")), None)
