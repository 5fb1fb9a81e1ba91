"""Rows of a tensor by an index, with gradients in a fixed order.

A row that is taken K times has a gradient of K terms. They are added in float32, in the order of the index, and rounded
once; torch adds them in the tensor's dtype, on CUDA in any order.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from prefopt.data.table import IndexArray

Sums = tuple[tuple[Tensor, Tensor], ...]
"""What :func:`occurrences` gives, on a device."""


def occurrences(index: IndexArray) -> list[tuple[IndexArray, IndexArray]]:
    """For the first, second, ... occurrence of a row in ``index``: rows, in order, and their positions. Rows within a
    pair differ, so that adding one pair after the other is deterministic.

    >>> [[x.tolist() for x in pair] for pair in occurrences(np.array([0, 1, 0, 2, 0]))]
    [[[0, 1, 2], [0, 1, 3]], [[0], [2]], [[0], [4]]]
    """
    order = np.argsort(index, kind="stable")
    rows = index[order]
    times = np.arange(len(rows)) - np.searchsorted(rows, rows)
    by_time = np.argsort(times, kind="stable")
    cuts = np.cumsum(np.bincount(times))[:-1]
    return list(zip(np.split(rows[by_time], cuts), np.split(order[by_time], cuts), strict=True))


def gathered(x: Tensor, index: Tensor, sums: Sums) -> Tensor:
    """``x`` [T, ...] at ``index``, as ``index_select`` gives it; ``sums`` from :func:`occurrences`."""
    return cast(Tensor, _Gathered.apply(x, index, sums))  # type: ignore[no-untyped-call]


def summed(grad: Tensor, tokens: int, sums: Sums, dtype: torch.dtype) -> Tensor:
    """Gradient [T, ...] of rows that were gathered, from that of what was gathered."""
    total = grad.new_zeros(tokens, *grad.shape[1:], dtype=torch.promote_types(dtype, torch.float32))
    for rows, places in sums:
        total.index_add_(0, rows, grad[places].to(total.dtype))
    return total.to(dtype)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, sums: Sums) -> Tensor:
        ctx.tokens, ctx.dtype, ctx.sums = len(x), x.dtype, sums
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return summed(grads[0], ctx.tokens, ctx.sums, ctx.dtype), None, None
