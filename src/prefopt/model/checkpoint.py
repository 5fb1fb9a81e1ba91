"""The tensors in a model's folder, told from the headers of its files, and what they are called in the loaded model.

A class of transformers leaves aside whatever it has no place for: the vision tower of a checkpoint whose language model
is loaded alone, its layers for multi-token prediction, a value head. :class:`ModelOrigin` knows those, and under which
name of the checkpoint each weight of the model belongs, so that a trained model can be written as the checkpoint that
it came from::

    origin = origin_of(model)               # put there by prefopt.model.load; none for a model given in Python
    origin.untouched                        # names of the checkpoint that are in no weight of the model
    origin.checkpoint.tensor(name)          # one of them
    origin.stored(model, state)             # the model's weights, under the checkpoint's names

Trainers write reward models and value functions under classes and names of their own: ``score`` (transformers' sequence
classifiers), ``value_head`` (OpenRLHF), ``v_head.summary`` (TRL; LLaMA-Factory puts it into a file of its own).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prefopt.core.model_folder import read_object, weight_files
from prefopt.core.terminal import size
from prefopt.errors import ModelError
from prefopt.model.architectures import MTP_COUNTS

_ATTRIBUTE = "prefopt_origin"


@dataclass(frozen=True, slots=True)
class StoredTensor:
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
class WeightFiles:
    """The tensors of ``folder`` by name, as transformers would find them. Only headers are in memory."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, folder: str | Path) -> WeightFiles:
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


def headers(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds. Raises what safetensors does."""
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        return {name: StoredTensor(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """The checkpoint that a model was loaded from, and what became of each of its tensors.

    ``renamed``: by name in the checkpoint, the name it has in the model, or would have there. ``converted``: those of
    them that are a part of a weight, or several (experts that the model holds as one). ``untouched``: in no weight.
    ``kept``: whether they are written beside the model's own; not beside a reward model made of a language model.
    ``config``: what ``config.json`` says there. It is held, for the folder may be gone when the model is saved.
    """

    checkpoint: WeightFiles
    config: Any
    renamed: Mapping[str, str]
    converted: frozenset[str]
    untouched: tuple[str, ...]
    kept: bool = True

    def left_behind(self, used: Iterable[str] = ()) -> ModelOrigin:
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


def trace(model: Any, checkpoint: WeightFiles, config: Any) -> ModelOrigin:
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
    return ModelOrigin(checkpoint, config, renamed, frozenset(converted), tuple(untouched))


def set_origin(model: Any, origin: ModelOrigin) -> None:
    """Let ``model`` know where it comes from."""
    setattr(model, _ATTRIBUTE, origin)


def origin_of(model: Any) -> ModelOrigin | None:
    """Where a model comes from; none for one that was given in Python, or made of another."""
    found: ModelOrigin | None = getattr(model, _ATTRIBUTE, None)
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


_BESIDE = "value_head.safetensors"
NAMES = re.compile(r"^(score|value_head|v_head|reward_head|regression_head|regression_layer|rm_head)\.")


@dataclass(frozen=True, slots=True)
class ScalarHead:
    """The tensors [by name] of a head in a folder that is not transformers' own model of it."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @property
    def weight(self) -> str:
        """The name of its weight, or of the first of several."""
        return next((n for n in self.tensors if n.endswith("weight")), next(iter(self.tensors)))

    @property
    def beside_a_language_model(self) -> bool:
        """Whether such a head is put beside the head of a language model, and not in its place."""
        return self.weight.startswith("v_head.")

    def read(self, width: int) -> tuple[torch.Tensor, float]:
        """Its weight [1, width] and its bias. Raises :class:`ModelError` where it is another kind of head."""
        bias = self.weight.removesuffix("weight") + "bias"
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        rest = [name for name in shapes if name not in (self.weight, bias)]
        wrong = self.weight if shapes[self.weight] != (1, width) else bias
        if rest or wrong == self.weight or math.prod(shapes.get(bias, ())) != 1:
            what = f"{rest[0]} beside {self.weight}" if rest else f"{wrong} {list(shapes[wrong])}"
            raise ModelError(
                f"{self.folder}: its scalar head is not linear from {width} numbers to one ({what}); take a reward"
                " model with a head of that shape, or remove those tensors to begin with a new one"
            )
        return self._tensor(self.weight), float(self._tensor(bias)) if bias in shapes else 0.0

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.tensors[name].file, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found


def scalar_head(folder: str | Path) -> ScalarHead | None:
    """The scalar head in the folder of a model, or beside an adapter; none in one without, or whose weights cannot be
    read (loading says why). Raises :class:`ModelError` where a file of the head alone cannot be."""
    try:
        tensors = dict(WeightFiles.read(folder).tensors)
    except ModelError:
        tensors = {}
    tensors |= _beside(Path(folder) / _BESIDE)
    found = {name: stored for name, stored in tensors.items() if NAMES.match(name)}
    return ScalarHead(Path(folder), found) if found else None


def _beside(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        return {}
    try:
        return headers(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: this scalar head cannot be read ({error}); copy it again, or remove it to begin with a new one"
        ) from error


# Told from a part of a tensor's name; the first that fits. They are read in the order in which one would name them.
_KINDS = {
    "value head": NAMES.pattern,
    "layers for multi-token prediction": r"mtp|nextn|\.(eh_proj|enorm|hnorm|shared_head)\.",
    "audio tower": r"audio|speech|sound",
    "vision tower": r"visual|vision|image|vit|multi_modal_projector|mm_projector",
}
OTHER = "tensors that the architecture has no place for"
# Buffers that older versions of transformers wrote, and that are computed: causal masks, rotary frequencies.
_COMPUTED = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$"
    r"|(^|\.)position_ids$|num_batches_tracked$"
)
_MTP = re.compile(_KINDS["layers for multi-token prediction"])


def describe_untouched(origin: ModelOrigin) -> str | None:
    """What is in no weight of the model, by kind with count and bytes; none where there are computed buffers alone."""
    mtp = {layer for layer, names in _layers(origin).items() if any(_MTP.search(n) for n in names)}
    kinds: dict[str, list[str]] = {}
    for name in origin.untouched:
        if not _COMPUTED.search(name):
            in_mtp = any(origin.renamed[name].startswith(f"{layer}.") for layer in mtp)
            kind = "layers for multi-token prediction" if in_mtp else _kind(name)
            kinds.setdefault(kind, []).append(name)
    parts = [_part(origin, kind, kinds[kind]) for kind in (*reversed(_KINDS), OTHER) if kind in kinds]
    return ", ".join(parts) or None


def check_layers(name: str, model: Any, origin: ModelOrigin) -> None:
    """Raises :class:`ModelError` where the checkpoint has layers that the configuration leaves out, but for those that
    predict further tokens: without its last layers a model says something else."""
    expected = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    counts = [getattr(model.config.get_text_config(), count, None) for count in MTP_COUNTS]
    told = sum(count for count in counts if isinstance(count, int))
    ends = _ends(model.state_dict())
    beyond: dict[str, list[str]] = {}
    for layer, names in _layers(origin).items():
        stem, _, number = layer.rpartition(".")
        if stem not in ends or int(number) <= ends[stem] + told:
            continue
        ignored = all(any(p.search(n) for p in expected) for n in names)
        if not ignored and not any(_MTP.search(n) for n in names):
            beyond.setdefault(stem, []).extend(names)
    for stem, names in beyond.items():
        there = size(origin.checkpoint.nbytes(names))
        raise ModelError(
            f"{name}: config.json ends at {stem}.{ends[stem]}, but {len(names)} tensors ({there}) are of later ones,"
            f" such as {names[0]}; set the number of layers in config.json right, or remove those tensors"
        )


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), OTHER)


def _part(origin: ModelOrigin, kind: str, names: list[str]) -> str:
    count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}, {size(origin.checkpoint.nbytes(names))}"
    return f"{kind} ({count}{f', the first is {names[0]}' if kind == OTHER else ''})"


def _layers(origin: ModelOrigin) -> dict[str, list[str]]:
    """Untouched tensors by each numbered module they are in, such as ``model.layers.3``, named as in the model."""
    found: dict[str, list[str]] = {}
    for name in origin.untouched:
        for stem, number in _numbered(origin.renamed[name]):
            found.setdefault(f"{stem}.{number}", []).append(name)
    return found


def _ends(names: Iterable[str]) -> dict[str, int]:
    """The last number under each list of modules."""
    found: dict[str, int] = {}
    for name in names:
        for stem, number in _numbered(name):
            found[stem] = max(found.get(stem, -1), number)
    return found


def _numbered(name: str) -> Iterator[tuple[str, int]]:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if i and part.isascii() and part.isdecimal():
            yield ".".join(parts[:i]), int(part)
