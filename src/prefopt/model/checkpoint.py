"""The tensors in a model folder, from the headers of its files, and their names in the loaded model.

A class of transformers ignores tensors that it has no place for: the vision tower of a checkpoint whose language model
is loaded alone, layers for multi-token prediction, a value head. :class:`ModelOrigin` has their names, and the name in
the checkpoint of each weight of the model, so that a trained model is saved as the checkpoint that it came from.

Trainers store scalar heads under names of their own: ``score`` (transformers' sequence classifiers), ``value_head``
(OpenRLHF), ``v_head.summary`` (TRL; LLaMA-Factory in a file of its own).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from prefopt.core.model_folder import read_object, weight_files
from prefopt.core.terminal import size
from prefopt.errors import ModelError
from prefopt.model.architectures import MTP_COUNTS

_HEAD_FILE = "value_head.safetensors"
HEAD_NAMES = re.compile(r"^(score|value_head|v_head|reward_head|regression_head|regression_layer|rm_head)\.")
_MTP_LAYERS = "layers for multi-token prediction"
# Kinds of untouched tensors by a part of the name; the first that matches.
_KINDS = {
    "value head": HEAD_NAMES.pattern,
    _MTP_LAYERS: r"mtp|nextn|\.(eh_proj|enorm|hnorm|shared_head)\.",
    "audio tower": r"audio|speech|sound",
    "vision tower": r"visual|vision|image|vit|multi_modal_projector|mm_projector",
}
_MTP = re.compile(_KINDS[_MTP_LAYERS])
OTHER = "tensors that the architecture has no place for"
# Buffers that older versions of transformers saved, and that are computed: causal masks, rotary frequencies.
_COMPUTED = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$"
    r"|(^|\.)position_ids$|num_batches_tracked$"
)


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

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or these of its rows alone, on the CPU, in its stored type. Raises :class:`ModelError` where the
        file is gone or has become another."""
        try:
            with safe_open(self.file, framework="pt") as file:
                found = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
                return cast(torch.Tensor, found)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.file}: {name} cannot be read ({error}); restore the model") from error


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
            return cls(path, {name: found for file in files for name, found in _headers(file).items()})
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder}: its files cannot be read ({error}); copy the model again") from error

    def size_of(self, names: Sequence[str]) -> str:
        """Number and bytes of these tensors, in words."""
        count = sum(self.tensors[name].nbytes for name in names)
        return f"{len(names)} tensor{'s' if len(names) > 1 else ''}, {size(count)}"


def _headers(file: Path) -> dict[str, StoredTensor]:
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        return {name: StoredTensor(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """The checkpoint that a model was loaded from, and where each of its tensors went.

    ``renamed``: name in the checkpoint to name in the model (or the name it would have). ``converted``: tensors that
    are part of a weight, or several weights (fused experts). ``untouched``: in no weight. ``kept``: whether untouched
    tensors are saved with the model; not with a reward model made of a language model. ``config``: the folder's.
    """

    checkpoint: WeightFiles
    config: Any
    renamed: Mapping[str, str]
    converted: frozenset[str]
    untouched: tuple[str, ...]
    kept: bool = True

    def left_behind(self, used: Iterable[str] = ()) -> ModelOrigin:
        """The origin of a model of another kind, which has read ``used`` by itself and keeps no untouched tensors."""
        rest = tuple(n for n in self.untouched if n not in set(used))
        return replace(self, untouched=rest, kept=False)

    @property
    def covered(self) -> set[str]:
        """Weights of the model that the checkpoint holds."""
        return {self.renamed[n] for n in self.checkpoint.tensors if n not in self.untouched}

    def stored(
        self, model: Any, state: Mapping[str, torch.Tensor], frozen: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Weights ``state`` of ``model`` under the names of the checkpoint, shared ones as often as it holds them;
        ``frozen`` ones are read from it. A weight that the checkpoint lacks (a head that is no longer tied) gets
        transformers' name."""
        from transformers.core_model_loading import revert_weight_conversion

        skipped = set(self.untouched) | self.converted
        plain = {name: state[new] for name, new in self.renamed.items() if name not in skipped}
        plain |= {n: self.checkpoint.tensors[n].read(n) for n in plain if self.renamed[n] in frozen}
        written = {self.renamed[name] for name in plain}
        rest = {name: value for name, value in state.items() if name not in written}
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, rest)
        shared = {_storage(value) for value in plain.values()}
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        found = dict(plain)
        for name, value in reverted.items():
            # Of names that differ by the prefix of the base model alone, the checkpoint's.
            prefixed = (n for n in self.converted if n.endswith(f".{name}") or name.endswith(f".{n}"))
            same = name if name in self.converted else next(prefixed, None)
            if same is not None:
                found[same] = value
            elif _storage(value) not in shared and name not in ignored:
                found[name] = value
        return found


def trace_origin(model: Any, checkpoint: WeightFiles, config: Any) -> ModelOrigin:
    """Where each tensor of ``checkpoint`` went in ``model``, just loaded by transformers; ``config``: the folder's."""
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
    """Record the checkpoint that a model comes from."""
    model.prefopt_origin = origin


def origin_of(model: Any) -> ModelOrigin | None:
    """The checkpoint that a model comes from; None for one built in Python."""
    return cast(ModelOrigin | None, getattr(model, "prefopt_origin", None))


def _storage(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that share their memory."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape)


@dataclass(frozen=True, slots=True)
class ScalarHead:
    """The tensors [by name] of a scalar head in a folder that another trainer wrote."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @property
    def weight(self) -> str:
        """The name of its weight, or of the first of several."""
        return next((n for n in self.tensors if n.endswith("weight")), next(iter(self.tensors)))

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
        read = {name: self.tensors[name].read(name) for name in shapes}
        return read[self.weight], float(read[bias]) if bias in read else 0.0


def scalar_head(folder: str | Path) -> ScalarHead | None:
    """The scalar head in a model folder or beside an adapter; None without one, or where the weights cannot be read
    (loading reports it). Raises :class:`ModelError` where a separate file of the head cannot be read."""
    try:
        tensors = dict(WeightFiles.read(folder).tensors)
    except ModelError:
        tensors = {}
    file = Path(folder) / _HEAD_FILE
    if file.is_file():
        try:
            tensors |= _headers(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: this scalar head cannot be read ({error}); copy or remove it") from error
    found = {name: stored for name, stored in tensors.items() if HEAD_NAMES.match(name)}
    return ScalarHead(Path(folder), found) if found else None


def describe_untouched(origin: ModelOrigin) -> str | None:
    """Untouched tensors by kind, with count and bytes; None where there are computed buffers alone."""
    mtp = {layer for layer, names in _untouched_layers(origin).items() if any(_MTP.search(n) for n in names)}
    kinds: dict[str, list[str]] = {}
    for name in origin.untouched:
        if not _COMPUTED.search(name):
            in_mtp = any(origin.renamed[name].startswith(f"{layer}.") for layer in mtp)
            matching = (kind for kind, pattern in _KINDS.items() if re.search(pattern, name))
            kinds.setdefault(_MTP_LAYERS if in_mtp else next(matching, OTHER), []).append(name)
    parts = []
    for kind in (*reversed(_KINDS), OTHER):
        if names := kinds.get(kind):
            first = f", the first is {names[0]}" if kind == OTHER else ""
            parts.append(f"{kind} ({origin.checkpoint.size_of(names)}{first})")
    return ", ".join(parts) or None


def check_layers(name: str, model: Any, origin: ModelOrigin) -> None:
    """Raises :class:`ModelError` where the checkpoint has layers beyond those of the configuration, except layers for
    multi-token prediction: without its last layers a model gives other outputs."""
    expected = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    counts = [getattr(model.config.get_text_config(), count, None) for count in MTP_COUNTS]
    mtp_layers = sum(count for count in counts if isinstance(count, int))
    last: dict[str, int] = {}
    for weight in model.state_dict():
        for stem, layer_number in _numbered(weight):
            last[stem] = max(last.get(stem, -1), layer_number)
    beyond: dict[str, list[str]] = {}
    for layer, names in _untouched_layers(origin).items():
        stem, _, number = layer.rpartition(".")
        if stem not in last or int(number) <= last[stem] + mtp_layers:
            continue
        ignored = all(any(p.search(n) for p in expected) for n in names)
        if not ignored and not any(_MTP.search(n) for n in names):
            beyond.setdefault(stem, []).extend(names)
    for stem, names in beyond.items():
        raise ModelError(
            f"{name}: config.json ends at {stem}.{last[stem]}, but there are later layers"
            f" ({origin.checkpoint.size_of(names)}), such as {names[0]}; correct config.json or remove those tensors"
        )


def _untouched_layers(origin: ModelOrigin) -> dict[str, list[str]]:
    """Untouched tensors by each numbered module that holds them, such as ``model.layers.3``, with the model's names."""
    found: dict[str, list[str]] = {}
    for name in origin.untouched:
        for stem, number in _numbered(origin.renamed[name]):
            found.setdefault(f"{stem}.{number}", []).append(name)
    return found


def _numbered(name: str) -> Iterator[tuple[str, int]]:
    """The numbered modules in a name: the name of the list, and the number."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if i and part.isascii() and part.isdecimal():
            yield ".".join(parts[:i]), int(part)
