"""Linear layers whose weights are packed for oneDNN while a model samples on the CPU.

A step multiplies a few rows with every weight. A matrix product of so few rows takes most of its time to rearrange the
weight; packed once, it is read in the order in which it is multiplied. The packed copy takes as much memory as the
weights, and lasts for one call of the sampler: weights that train change between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.model.costs import free_memory

PACK_FRACTION = 0.25
"""Fraction of the free memory that packed weights may take."""
SMALLEST = 2**14
"""Weights of a layer that is worth packing."""
FEWEST_ROWS = 4
"""Rows from which packed products are faster."""


@dataclass(slots=True)
class _Packed:
    """A forward function of a linear layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def is_packed(module: object) -> bool:
    """Whether a layer multiplies with packed weights."""
    return isinstance(getattr(module, "__dict__", {}).get("forward"), _Packed)


@contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[int]:
    """In this block the float32 linear layers of ``model`` on the CPU multiply with packed weights, without gradients;
    gives their number. None is packed where memory is short, or torch has no oneDNN. Weights must not change."""
    layers: list[Any] = [module for module in model.modules() if _packs(module)]
    needed = sum(4 * layer.weight.numel() for layer in layers)
    if layers and needed > PACK_FRACTION * free_memory(torch.device("cpu")):
        layers = []
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = _Packed(packed, None if layer.bias is None else layer.bias.detach())
        yield len(layers)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _packs(module: torch.nn.Module) -> bool:
    # A subclass may compute something else, a tensor that is a subclass (in shards) be more than its values.
    if type(module) is not torch.nn.Linear or "forward" in vars(module) or not torch.backends.mkldnn.is_available():
        return False
    weight = module.weight
    plain = type(weight.data) is torch.Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
    return bool(plain and weight.numel() >= SMALLEST)
