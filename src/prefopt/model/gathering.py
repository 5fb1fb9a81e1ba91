"""Rows of a tensor picked by an index, with a gradient that is the same every time.

A prefix's keys and values are picked once for itself and once for each of K responses. Torch's own backward of that
adds K + 1 terms in the tensor's dtype, on CUDA by atomics, in whatever order they come. Here they are added in the
order of the segments, in float32, and rounded once.
"""

from __future__ import annotations

from typing import Any, cast

import torch

Sums = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""For the first, second, ... time that a row is picked: which rows, and where in the index. Rows differ within a pair,
so that adding one pair after the other has an order."""


def occurrences(index: torch.Tensor) -> Sums:
    """See :data:`Sums`.

    >>> [[x.tolist() for x in pair] for pair in occurrences(torch.tensor([0, 1, 0, 2, 0]))]
    [[[0, 1, 2], [0, 1, 3]], [[0], [2]], [[0], [4]]]
    """
    rows, order = index.sort(stable=True)
    starts = torch.searchsorted(rows, rows)  # where the row's first place stands
    times = torch.arange(len(rows)) - starts
    return tuple((rows[times == k], order[times == k]) for k in range(int(times.max()) + 1 if len(rows) else 0))


def gathered(x: torch.Tensor, index: torch.Tensor, sums: Sums) -> torch.Tensor:
    """``x`` [T, ...] at ``index``, as ``index_select`` gives it; ``sums`` from :func:`occurrences`."""
    return cast(torch.Tensor, _Gathered.apply(x, index, sums))  # type: ignore[no-untyped-call]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, sums: Sums) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.sums = x.shape, x.dtype, sums
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = grads[0].new_zeros(ctx.shape, dtype=torch.promote_types(ctx.dtype, torch.float32))
        for rows, places in ctx.sums:
            total[rows] = total[rows] + grads[0][places].to(total.dtype)
        return total.to(ctx.dtype), None, None
