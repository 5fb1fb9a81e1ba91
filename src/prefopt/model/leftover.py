"""What a checkpoint has beside the weights of the model loaded from it, in words; and what must not be there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from prefopt.errors import ModelError
from prefopt.model.checkpoint import Origin
from prefopt.model.scalar_head import NAMES
from prefopt.progress import size

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
# Numbers of layers that predict further tokens, as configurations call them.
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
_MTP = re.compile(_KINDS["layers for multi-token prediction"])


def leftover_words(origin: Origin) -> str | None:
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


def check_layers(name: str, model: Any, origin: Origin) -> None:
    """Raises :class:`ModelError` where the checkpoint has layers that the configuration leaves out, but for those that
    predict further tokens: without its last layers a model says something else."""
    expected = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    counts = [getattr(model.config.get_text_config(), count, None) for count in _MTP_COUNTS]
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


def without_mtp(config: Any) -> None:
    """Let a configuration name no layers that predict further tokens."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for count in _MTP_COUNTS:
            if getattr(part, count, None):
                setattr(part, count, 0)


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), OTHER)


def _part(origin: Origin, kind: str, names: list[str]) -> str:
    count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}, {size(origin.checkpoint.nbytes(names))}"
    return f"{kind} ({count}{f', the first is {names[0]}' if kind == OTHER else ''})"


def _layers(origin: Origin) -> dict[str, list[str]]:
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
