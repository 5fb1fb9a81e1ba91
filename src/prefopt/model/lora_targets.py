"""Which weights a new LoRA adapter changes, as PEFT is told it, and what share of the model that is.

By default all that multiplies but embeddings, head, routers and the towers that text never moves. PEFT's own
``all-linear`` is that of dense models; of mixtures of experts it reaches the experts of some and the dense layers of
others, so each weight is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.errors import ConfigError
from prefopt.model.weight_kinds import KINDS, Matrix, matrices

ALL = "all-linear"
_WORDS = {
    "mlp": "MLP",
    "shared-experts": "shared experts",
    "mixer": "recurrent mixers",
    "other": "other layers",
    "router": "routers",
    "tower": "towers",
}
# Names that experts had as layers of their own, before transformers 5 made tensors of them.
_FORMER = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | {"w2": "down_proj"}
_NO_MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


@dataclass(frozen=True, slots=True)
class Targets:
    """``modules`` and ``parameters`` as :class:`peft.LoraConfig` takes them; ``words``: the shares, for a person."""

    modules: list[str]
    parameters: list[str] | None
    words: str


def lora_targets(model: Any, named: Sequence[str] | None) -> Targets:
    """What ``--lora-targets`` ``named`` means for ``model``; none is the default.

    Raises :class:`ConfigError` where a name is that of no weight, or an adapter on it would change nothing.
    """
    there = matrices(model)
    refused = _refused(model)
    tensors = (*model.named_parameters(), *model.named_buffers())
    if named and any(
        name.endswith(".qweight") for name, _ in tensors
    ):  # quantised layers that are no linear ones (GPTQ, AWQ): PEFT knows them
        return Targets(list(named), None, ", ".join(named))
    wanted = [m for m in there if _default(m) and not refused(m)] if not named else _named(there, named, refused)
    if not wanted:
        raise ConfigError("--lora: no weight of this model can have an adapter; leave it out to train the whole model")
    former = _former_names(model)
    fused = {m.parameter for m in wanted if m.fused or m.module.rpartition(".")[2] in former}
    modules = [m.module for m in wanted if m.parameter not in fused]
    if named and not fused and not {*named} & {*KINDS, ALL} and not any(m.kind == "tower" for m in there):
        modules = list(named)
    words = _words(there, wanted, refused)
    if not named and any(m.kind == "router" for m in there):
        words += "; --lora-targets all-linear router adds the routers"
    return Targets(modules, _short(there, fused) or None, words)


def _default(matrix: Matrix) -> bool:
    return matrix.reachable and matrix.kind in KINDS and matrix.kind != "router"


def _named(there: list[Matrix], named: Sequence[str], refused: Callable[[Matrix], bool]) -> list[Matrix]:
    """The weights that these kinds and names mean, in the order of the model."""
    chosen: set[str] = set()
    for name in named:
        found = [m for m in there if _means(name, m)]
        found = [m for m in found if m.kind != "tower"] or found  # in full, a tower's layer is meant; else it has none
        if not found and name in _FORMER:
            found = [m for m in there if m.kind == "experts" and m.parameter.endswith(f".{_FORMER[name]}")]
        if not found:
            raise ConfigError(f"--lora-targets {name}: no weight of this model has that name; {_nameable(there)}")
        able = [m for m in found if m.reachable and not refused(m)]
        if not able:
            raise ConfigError(
                f"--lora-targets {name}: an adapter would change nothing, for {found[0].parameter} is read by another"
                f" layer than its own; {_nameable([m for m in there if m.reachable and not refused(m)])}"
            )
        chosen |= {m.parameter for m in able}
    return [m for m in there if m.parameter in chosen]


def _means(name: str, matrix: Matrix) -> bool:
    if name == ALL:
        return _default(matrix)
    if name in KINDS and name == matrix.kind:
        return True
    return any(full == name or full.endswith(f".{name}") for full in (matrix.module, matrix.parameter))


def _nameable(there: list[Matrix]) -> str:
    """What can be named, in words."""
    kinds = [ALL, *(kind for kind in KINDS if any(m.kind == kind and m.reachable for m in there))]
    names = {_leaf(m) for m in there if m.reachable and m.kind != "tower"}
    return f"there are the kinds {', '.join(kinds)}, and the names {', '.join(sorted(names))}"


def _leaf(matrix: Matrix) -> str:
    """The shortest name that says which: of a parameter, its layer and itself."""
    if not matrix.fused:
        return matrix.module.rpartition(".")[2]
    return ".".join(matrix.parameter.split(".")[-2:])


def _refused(model: Any) -> Callable[[Matrix], bool]:
    """Whether PEFT refuses an adapter on a weight: kernels of these architectures read it without calling its layer."""
    if getattr(model.config, "model_type", None) not in _NO_MAMBA:
        return lambda _: False
    return lambda m: m.module.rpartition(".")[2] in ("out_proj", "conv1d")


def _former_names(model: Any) -> Collection[str]:
    """Names of layers that PEFT takes for those of experts, as they once were, whatever layer has them now.

    It would turn them into the experts' tensors, and the dense layers and shared experts of that name would have none.
    """
    from peft.utils import transformers_weight_conversion as peft_conversion

    patterns: dict[str, str] = peft_conversion._MODEL_TO_CONVERSION_PATTERN
    mapping: dict[str, dict[str, str]] = peft_conversion._MOE_TARGET_MODULE_MAPPING
    return mapping.get(patterns.get(getattr(model.config, "model_type", ""), ""), {})


def _short(there: list[Matrix], wanted: Collection[str]) -> list[str]:
    """Names of parameters without their layer's number, where that means the same ones."""
    ends: dict[str, list[str]] = {}
    for name in sorted(wanted):
        path = name.split(".")
        last = max((i for i, part in enumerate(path) if part.isdigit()), default=-1)
        ends.setdefault(".".join(path[last + 1 :]), []).append(name)
    found: list[str] = []
    for end, names in ends.items():
        meant = {m.parameter for m in there if f".{m.parameter}".endswith(f".{end}")}
        found += [end] if meant <= {*wanted} else names
    return found


def _words(there: list[Matrix], wanted: list[Matrix], refused: Callable[[Matrix], bool]) -> str:
    """Shares by kind, those that are equal together, and why some have none."""
    chosen = {m.parameter for m in wanted}
    shares: dict[float, list[str]] = {}
    for kind in (*KINDS, "tower"):
        of = [m for m in there if m.kind == kind]
        if total := sum(m.numel for m in of):
            share = sum(m.numel for m in of if m.parameter in chosen) / total
            shares.setdefault(share, []).append(_WORDS.get(kind, kind))
    parts = [
        f"{100 * share:.3g} % of {', '.join(kinds)}" if share else f"none of {', '.join(kinds)}"
        for share, kinds in sorted(shares.items(), reverse=True)
    ]
    parts += [f"{m.kind} {_leaf(m)}" for m in wanted if m.kind in ("head", "embedding", "convolution")][:4]
    left = {_leaf(m) for m in there if m.kind in KINDS and (not m.reachable or refused(m))}
    if left:
        parts.append(f"{', '.join(sorted(left))} cannot have one")
    return "; ".join(parts)
