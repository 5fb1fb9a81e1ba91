"""Weights that a new LoRA adapter is on, and the percentage of each kind that it reaches.

By default all matrices but embeddings, head, routers and towers, which text does not train. PEFT's own ``all-linear``
is made for dense models: of mixtures of experts it reaches the experts of some and the dense layers of others, so each
weight is named here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from prefopt.errors import ConfigError
from prefopt.model.architectures import weights_in

KINDS = ("attention", "mlp", "experts", "shared-experts", "mixer", "other", "router")
"""Kinds of weights that can have an adapter, for ``--lora-targets``."""
ALL = "all-linear"

_TOWER = re.compile(r"vision|visual|image|audio|speech|sound|multi_modal|mm_proj", re.IGNORECASE)
_ROUTER = re.compile(r"router|^shared_expert_gate$", re.IGNORECASE)
_SHARED = re.compile(r"shared_(experts?|mlp)$", re.IGNORECASE)
_EXPERTS = re.compile(r"experts?(\d|$)|Experts|ExpertGLU")
_MIXER = re.compile(r"mamba|deltanet|linear_attn|shortconv|recurrentblock|rglru|mlstm|rwkvselfattention", re.I)
_NO_GRADIENT = re.compile(r"\.indexer\.")
"""Sparse attention's selection of tokens: no gradient goes through it."""
_NOT_CALLED = {("mixer", "dt_proj"), ("router", "classifier")}
"""Layers whose owner (Mamba, LongCat) reads their weights and never calls them."""
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|^fc\d|^fc_(in|out)$|dense_\w*4h|^(gate|up|down)_proj$", re.IGNORECASE)
# Names of experts' layers before transformers 5 fused them.
_FORMER = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | {"w2": "down_proj"}
_MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
_NOT_CALLED_IN_MAMBA = ("out_proj", "conv1d")
"""PEFT refuses these: kernels read their weights without calling them."""


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """A matrix of a model. ``fused``: an adapter goes on the parameter, since its layer is not linear (experts in one
    tensor, routers, grouped linear layers). ``reachable``: whether an adapter has an effect."""

    module: str
    parameter: str
    kind: str
    numel: int
    fused: bool = False
    reachable: bool = True


def weight_matrices(model: Any) -> Iterator[WeightMatrix]:
    """Every matrix of a transformers model once, in the order of its modules."""
    from transformers.pytorch_utils import Conv1D

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    heads = {id(outputs), *(id(getattr(model, name, None)) for name in ("score", "classifier"))} - {id(None)}
    text = _text_model(model)
    not_called = _NOT_CALLED_IN_MAMBA if getattr(model.config, "model_type", None) in _MAMBA else ()
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
            # The output of these is not that of a linear layer: another shape, or expert weights beside it.
            special = getattr(module, "n_groups", 1) > 1 or (kind == "router" and "Router" in type(module).__name__)
            unused = _NO_GRADIENT.search(name) or (kind, leaf) in _NOT_CALLED or leaf in not_called
            yield WeightMatrix(
                name, f"{name}.weight", kind, weights_in(weight), fused=linear and special, reachable=not unused
            )
            continue
        for field, value in own.items():
            if kind in ("experts", "shared-experts") and value.ndim >= 2 and not field.endswith("bias"):
                # Experts stacked along the first of two axes (DBRX) are read by another module.
                yield WeightMatrix(name, f"{name}.{field}", kind, value.numel(), fused=True, reachable=value.ndim == 3)
            elif kind == "router" and field == "weight" and value.ndim == 2:
                yield WeightMatrix(name, f"{name}.{field}", kind, value.numel(), fused=True)


def _kind(path: list[str], classes: list[str], *, routed: bool) -> str:
    """The kind of a weight from the components of its name and their classes. ``routed``: the model has experts."""
    if any(map(_TOWER.search, path)):
        return "tower"
    if routed and any(map(_ROUTER.search, [*path, *classes])):
        return "router"
    if any(map(_SHARED.search, path)):
        return "shared-experts"
    if any(map(_EXPERTS.search, [*path, *classes])):
        return "experts"
    for part, cls in zip(reversed(path), reversed(classes), strict=True):  # innermost first
        for kind, pattern in (("mixer", _MIXER), ("attention", _ATTENTION), ("mlp", _MLP)):
            if pattern.search(part) or pattern.search(cls):
                return kind
    return "other"


def _text_model(model: Any) -> str | None:
    """The name of the language model inside a larger one; None where it is the whole model."""
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), None) or None


def tower_weights(model: Any) -> int:
    """Weights in towers beside the language model, which text does not train."""
    text = _text_model(model)
    outputs = model.get_output_embeddings()
    head = {id(p) for p in outputs.parameters()} if outputs is not None else set()
    named = ((n, p) for n, p in model.named_parameters() if id(p) not in head)
    return sum(p.numel() for n, p in named if text is not None and not n.startswith(f"{text}.") and _TOWER.search(n))


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """``modules`` and ``parameters`` for :class:`peft.LoraConfig`; ``words``: the percentages by kind."""

    modules: list[str]
    parameters: list[str] | None
    words: str


def lora_targets(model: Any, named: Sequence[str] | None, *, towers: bool = False) -> LoraTargets:
    """The weights that ``named`` (``--lora-targets``; None: the default) stands for, with the linear layers of
    ``towers`` and projectors. Raises :class:`ConfigError` for a name that matches no weight, or where an adapter would
    have no effect."""
    matrices = list(weight_matrices(model))
    tensors = (*model.named_parameters(), *model.named_buffers())
    if named and any(name.endswith(".qweight") for name, _ in tensors):  # GPTQ and AWQ layers, which PEFT knows
        return LoraTargets([*named], None, ", ".join(named))
    wanted = _named(matrices, named) if named else [m for m in matrices if _default(m)]
    wanted += [m for m in matrices if towers and m.kind == "tower" and m not in wanted]
    if not wanted:
        raise ConfigError("--lora: no weight of this model can have an adapter; leave it out to train the whole model")
    former = _former_names(model)
    fused = {m.parameter for m in wanted if m.fused or m.module.rpartition(".")[2] in former}
    modules = [m.module for m in wanted if m.parameter not in fused]
    if named and not fused and not {*named} & {*KINDS, ALL} and not any(m.kind == "tower" for m in matrices):
        modules = list(named)
    words = _words(matrices, wanted)
    if not named and any(m.kind == "router" for m in matrices):
        words += "; --lora-targets all-linear router adds the routers"
    return LoraTargets(modules, _short(matrices, fused) or None, words)


def _default(matrix: WeightMatrix) -> bool:
    return matrix.reachable and matrix.kind in KINDS and matrix.kind != "router"


def _named(matrices: list[WeightMatrix], named: Sequence[str]) -> list[WeightMatrix]:
    """The weights of these kinds and names, in the order of the model."""
    chosen: set[str] = set()
    for name in named:
        found = [m for m in matrices if _means(name, m)]
        found = [m for m in found if m.kind != "tower"] or found  # a tower's layer only by its full name
        if not found and name in _FORMER:
            found = [m for m in matrices if m.kind == "experts" and m.parameter.endswith(f".{_FORMER[name]}")]
        able = {m.parameter for m in found if m.reachable}
        if not able:
            problem = "no weight of this model has that name"
            if found:
                problem = f"an adapter would change nothing, since another layer reads {found[0].parameter}"
            reachable = [m for m in matrices if m.reachable]
            kinds = [ALL, *(kind for kind in KINDS if any(m.kind == kind for m in reachable))]
            names = sorted({_leaf(m) for m in reachable if m.kind != "tower"})
            raise ConfigError(
                f"--lora-targets {name}: {problem}; there are the kinds {', '.join(kinds)}, and the names"
                f" {', '.join(names)}"
            )
        chosen |= able
    return [m for m in matrices if m.parameter in chosen]


def _means(name: str, matrix: WeightMatrix) -> bool:
    if name == ALL:
        return _default(matrix)
    if name in KINDS and name == matrix.kind:
        return True
    return any(f".{full}".endswith(f".{name}") for full in (matrix.module, matrix.parameter))


def _leaf(matrix: WeightMatrix) -> str:
    """The shortest distinct name: of a linear layer, or of a parameter with its layer."""
    if not matrix.fused:
        return matrix.module.rpartition(".")[2]
    return ".".join(matrix.parameter.split(".")[-2:])


def _former_names(model: Any) -> Collection[str]:
    """Former names of experts' layers, which PEFT maps to the fused experts: dense layers and shared experts of such a
    name would get no adapter."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(getattr(model.config, "model_type", ""), "")
    return cast(Collection[str], conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


def _short(matrices: list[WeightMatrix], wanted: Collection[str]) -> list[str]:
    """Names of parameters without the layer number, where they match the same parameters."""
    ends: dict[str, list[str]] = {}
    for name in sorted(wanted):
        path = name.split(".")
        last = max((i for i, part in enumerate(path) if part.isdigit()), default=-1)
        ends.setdefault(".".join(path[last + 1 :]), []).append(name)
    found: list[str] = []
    for end, names in ends.items():
        meant = {m.parameter for m in matrices if f".{m.parameter}".endswith(f".{end}")}
        found += [end] if meant <= {*wanted} else names
    return found


def _words(matrices: list[WeightMatrix], wanted: list[WeightMatrix]) -> str:
    """Percentages by kind, equal ones together, and the layers that cannot have an adapter."""
    chosen = {m.parameter for m in wanted}
    shares: dict[float, list[str]] = {}
    for kind in (*KINDS, "tower"):
        of = [m for m in matrices if m.kind == kind]
        if total := sum(m.numel for m in of):
            share = sum(m.numel for m in of if m.parameter in chosen) / total
            shares.setdefault(share, []).append(kind)
    parts = [
        f"{100 * share:.3g} % of {', '.join(kinds)}" if share else f"none of {', '.join(kinds)}"
        for share, kinds in sorted(shares.items(), reverse=True)
    ]
    parts += [f"{m.kind} {_leaf(m)}" for m in wanted if m.kind in ("head", "embedding", "convolution")][:4]
    if left := {_leaf(m) for m in matrices if m.kind in KINDS and not m.reachable}:
        parts.append(f"{', '.join(sorted(left))} cannot have one")
    return "; ".join(parts)
