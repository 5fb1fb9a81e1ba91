"""What each matrix of a model is for: attention, MLP, experts, router, and so on, told from its place and class.

One walk over the modules, for LoRA to choose from and for a run to say which share of each kind it reaches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

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
class Matrix:
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


def matrices(model: Any) -> list[Matrix]:
    """Every matrix of a transformers model once, in the order of its modules."""
    return list(_walk(model))


def _walk(model: Any) -> Iterator[Matrix]:
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
            yield Matrix(name, f"{name}.weight", kind, weight.numel(), fused=linear and special, reachable=not read)
            continue
        for field, value in own.items():
            if kind in ("experts", "shared-experts") and value.ndim >= 2 and not field.endswith("bias"):
                # Stacked along the first of two axes (DBRX), experts are read by another module than their own.
                yield Matrix(name, f"{name}.{field}", kind, value.numel(), fused=True, reachable=value.ndim == 3)
            elif kind == "router" and field == "weight" and value.ndim == 2:
                yield Matrix(name, f"{name}.{field}", kind, value.numel(), fused=True)


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
