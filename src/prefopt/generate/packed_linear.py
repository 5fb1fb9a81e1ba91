"""Linear layers whose weights are packed for oneDNN while a model samples on the CPU.

A step multiplies a few rows with every weight. A matrix product of so few rows takes most of its time to rearrange the
weight; packed once, it is read in the order in which it is multiplied. The packed copy takes as much memory as the
weights, and lasts for one call of the sampler: weights that train change between calls.

The forward function of a packed layer is one method of all of them and reads the copy from its layer, so that compiled
layers (:mod:`prefopt.model.compiled`) of one class share a graph. In a graph the product is one opaque operator.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prefopt.model.costs import free_memory
from prefopt.model.precision import native_bfloat16

PACK_FRACTION = 0.25
"""Fraction of the free memory that packed weights may take."""
SMALLEST = 2**14
"""Weights of a layer that is worth packing."""
FEWEST_ROWS = 4
"""Rows from which packed products are faster."""


_WEIGHT = "_prefopt_packed_weight"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# By the lower interface: a step calls it dozens of times, and each call of torch.library.custom_op takes longer.
_LIBRARY = torch.library.Library("prefopt", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int outputs) -> Tensor")
_LIBRARY.impl("packed_linear", _product, "CompositeExplicitAutograd")


def _without_numbers(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


torch.library.register_fake("prefopt::packed_linear", _without_numbers)


def _packed_forward(self: Any, x: Tensor) -> Tensor:
    product = torch.ops.prefopt.packed_linear if torch.compiler.is_compiling() else _product
    out: Tensor = product(x, getattr(self, _WEIGHT), self.bias, self.out_features)
    return out


def is_packed(module: object) -> bool:
    """Whether a layer multiplies with packed weights."""
    return _WEIGHT in getattr(module, "__dict__", {})


@contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[int]:
    """In this block the linear layers of ``model`` on the CPU, in float32 or native bfloat16, multiply with packed
    weights, without gradients; gives their number. None is packed where memory is short, or torch has no oneDNN.
    Weights must not change."""
    layers: list[Any] = [module for module in model.modules() if _packs(module)]
    needed = sum(layer.weight.nbytes for layer in layers)
    if layers and needed > PACK_FRACTION * free_memory(torch.device("cpu")):
        layers = []
    try:
        for layer in layers:
            # Not a registered buffer: it is no part of the model.
            vars(layer)[_WEIGHT] = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = types.MethodType(_packed_forward, layer)
        yield len(layers)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
            vars(layer).pop(_WEIGHT, None)


def _packs(module: torch.nn.Module) -> bool:
    # A subclass may compute something else, a tensor that is a subclass (in shards) be more than its values.
    if type(module) is not torch.nn.Linear or "forward" in vars(module) or not torch.backends.mkldnn.is_available():
        return False
    weight = module.weight
    native = weight.dtype == torch.bfloat16 and native_bfloat16(weight.device)
    plain = (
        type(weight.data) is torch.Tensor and weight.device.type == "cpu" and (weight.dtype == torch.float32 or native)
    )
    return bool(plain and weight.numel() >= SMALLEST)
