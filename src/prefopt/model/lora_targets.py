"""Which weights a new LoRA adapter changes, as PEFT is told it, and what share of the model that is.

By default all that multiplies but embeddings, head, routers and the towers that text never moves. PEFT's own
``all-linear`` is that of dense models; of mixtures of experts it reaches the experts of some and the dense layers of
others, so each weight is named here.

One walk over the modules, for LoRA to choose from and for a run to say which share of each kind it reaches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.errors import ConfigError

KINDS = ("attention", "mlp", "experts", "shared-experts", "mixer", "other", "router")
"""Kinds that can have an adapter, as ``--lora-targets`` names them."""

_TOWER = re.compile(r"vision|visual|image|audio|speech|sound|multi_modal|mm_proj", re.IGNORECASE)
_ROUTER = re.compile(r"router|^shared_expert_gate$", re.IGNORECASE)
_SHARED = re.compile(r"shared_(experts?|mlp)$", re.IGNORECASE)
_EXPERTS = re.compile(r"experts?(\d|$)|Experts|ExpertGLU")
_MIXER = re.compile(r"mamba|deltanet|linear_attn|shortconv|recurrentblock|rglru|mlstm|rwkvselfattention", re.I)
_UNMOVED = re.compile(r"\.indexer\.")
"""Sparse attention's choice of tokens: a ranking, that no gradient goes through."""
_READ = {("mixer", "dt_proj"), ("router", "classifier")}
"""Layers that are never called, for their owner (Mamba, LongCat) reads their weights."""
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|^fc\d|^fc_(in|out)$|dense_\w*4h|^(gate|up|down)_proj$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """A weight that multiplies. ``module`` is the name of its layer, ``parameter`` the weight's own in the model.

    ``fused``: the layer is no linear one, so an adapter goes on its parameter (experts in one tensor of three axes,
    routers with a weight of their own, linear layers in groups). ``reachable``: whether an adapter has an effect.
    """

    module: str
    parameter: str
    kind: str
    numel: int
    fused: bool = False
    reachable: bool = True


def weight_matrices(model: Any) -> list[WeightMatrix]:
    """Every matrix of a transformers model once, in the order of its modules."""
    return list(_walk(model))


def _walk(model: Any) -> Iterator[WeightMatrix]:
    from transformers.pytorch_utils import Conv1D

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    heads = {id(outputs), *(id(getattr(model, name, None)) for name in ("score", "classifier"))} - {id(None)}
    text = _text_model(model)
    classes: dict[str, list[str]] = {"": []}
    gates = tuple(f"{n.removesuffix('experts')}gate." for n, _ in model.named_modules() if n.endswith(".experts"))
    for name, module in model.named_modules():
        if not name:
            continue
        parent, _, leaf = name.rpartition(".")
        classes[name] = [*classes[parent], type(module).__name__]
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        linear = isinstance(module, (torch.nn.Linear, Conv1D))
        if id(module) in heads or module is inputs or isinstance(module, torch.nn.Embedding):
            kind = "head" if id(module) in heads and module is not inputs else "embedding"
        elif isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            kind = "convolution"
        elif text is not None and not f"{name}.".startswith(f"{text}."):
            kind = "tower"
        else:
            gate = f"{name}.".startswith(gates)
            kind = "router" if gate else _kind(name.split("."), classes[name], routed=bool(gates))
        if weight is not None and (linear or kind in ("head", "embedding", "convolution")):
            # What comes out of these is no linear layer's: another shape, or weights of experts beside it.
            special = getattr(module, "n_groups", 1) > 1 or (kind == "router" and "Router" in type(module).__name__)
            read = _UNMOVED.search(name) or (kind, leaf) in _READ
            yield WeightMatrix(
                name, f"{name}.weight", kind, weight.numel(), fused=linear and special, reachable=not read
            )
            continue
        for field, value in own.items():
            if kind in ("experts", "shared-experts") and value.ndim >= 2 and not field.endswith("bias"):
                # Stacked along the first of two axes (DBRX), experts are read by another module than their own.
                yield WeightMatrix(name, f"{name}.{field}", kind, value.numel(), fused=True, reachable=value.ndim == 3)
            elif kind == "router" and field == "weight" and value.ndim == 2:
                yield WeightMatrix(name, f"{name}.{field}", kind, value.numel(), fused=True)


def _kind(path: list[str], classes: list[str], *, routed: bool) -> str:
    """From the components of a name, and the class of each. ``routed``: whether the model has experts at all."""
    if any(map(_TOWER.search, path)):
        return "tower"
    if routed and any(map(_ROUTER.search, [*path, *classes])):
        return "router"
    if any(map(_SHARED.search, path)):
        return "shared-experts"
    if any(map(_EXPERTS.search, [*path, *classes])):
        return "experts"
    for part, cls in zip(reversed(path), reversed(classes), strict=True):  # the innermost says most
        for kind, pattern in (("mixer", _MIXER), ("attention", _ATTENTION), ("mlp", _MLP)):
            if pattern.search(part) or pattern.search(cls):
                return kind
    return "other"


def _text_model(model: Any) -> str | None:
    """The name of the language model in one that has others beside it; none where it is the whole."""
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return name or None


def tower_weights(model: Any) -> int:
    """How many weights stand in towers beside the language model, which text does not move."""
    text = _text_model(model)
    outputs = model.get_output_embeddings()
    head = {id(p) for p in outputs.parameters()} if outputs is not None else set()
    named = ((n, p) for n, p in model.named_parameters() if id(p) not in head)
    return sum(p.numel() for n, p in named if text is not None and not n.startswith(f"{text}.") and _TOWER.search(n))


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
class LoraTargets:
    """``modules`` and ``parameters`` as :class:`peft.LoraConfig` takes them; ``words``: the shares, for a person."""

    modules: list[str]
    parameters: list[str] | None
    words: str


def lora_targets(model: Any, named: Sequence[str] | None) -> LoraTargets:
    """What ``--lora-targets`` ``named`` means for ``model``; none is the default.

    Raises :class:`ConfigError` where a name is that of no weight, or an adapter on it would change nothing.
    """
    there = weight_matrices(model)
    refused = _refused(model)
    tensors = (*model.named_parameters(), *model.named_buffers())
    if named and any(
        name.endswith(".qweight") for name, _ in tensors
    ):  # quantised layers that are no linear ones (GPTQ, AWQ): PEFT knows them
        return LoraTargets(list(named), None, ", ".join(named))
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
    return LoraTargets(modules, _short(there, fused) or None, words)


def _default(matrix: WeightMatrix) -> bool:
    return matrix.reachable and matrix.kind in KINDS and matrix.kind != "router"


def _named(
    there: list[WeightMatrix], named: Sequence[str], refused: Callable[[WeightMatrix], bool]
) -> list[WeightMatrix]:
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


def _means(name: str, matrix: WeightMatrix) -> bool:
    if name == ALL:
        return _default(matrix)
    if name in KINDS and name == matrix.kind:
        return True
    return any(full == name or full.endswith(f".{name}") for full in (matrix.module, matrix.parameter))


def _nameable(there: list[WeightMatrix]) -> str:
    """What can be named, in words."""
    kinds = [ALL, *(kind for kind in KINDS if any(m.kind == kind and m.reachable for m in there))]
    names = {_leaf(m) for m in there if m.reachable and m.kind != "tower"}
    return f"there are the kinds {', '.join(kinds)}, and the names {', '.join(sorted(names))}"


def _leaf(matrix: WeightMatrix) -> str:
    """The shortest name that says which: of a parameter, its layer and itself."""
    if not matrix.fused:
        return matrix.module.rpartition(".")[2]
    return ".".join(matrix.parameter.split(".")[-2:])


def _refused(model: Any) -> Callable[[WeightMatrix], bool]:
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


def _short(there: list[WeightMatrix], wanted: Collection[str]) -> list[str]:
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


def _words(there: list[WeightMatrix], wanted: list[WeightMatrix], refused: Callable[[WeightMatrix], bool]) -> str:
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
