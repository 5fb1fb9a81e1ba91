"""Linear recurrences over a tree of chunks: h_t = a_t h_{t-1} + b_t, with a state that forks.

:func:`carry` takes whole chunks as steps, for recurrences that compute what is inside a chunk by matrix products.
:func:`tree_scan` is elementwise. Both are autograd functions: gradients of a state that several responses start from
are added in the order of the responses, and no intermediate state is kept twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from prefopt.model.kernels.gather import summed
from prefopt.model.recurrence.row import ChunkTree


def carry(decay: Tensor, update: Tensor, tree: ChunkTree) -> Tensor:
    """The state at the start of every chunk [chunks, ...], where a chunk makes ``decay * state + update`` of it.

    ``update`` [chunks, ...]; ``decay`` of as many dimensions, those of size one are broadcast.
    """
    return cast(Tensor, _Carry.apply(decay, update, tree))  # type: ignore[no-untyped-call]


def tree_scan(a: Tensor, b: Tensor, tree: ChunkTree) -> Tensor:
    """h [chunks, size, ...] of ``h_t = a_t h_{t-1} + b_t`` for a and b [chunks, size, ...], from zero at the roots.
    Places without a token must hold a = 1 and b = 0."""
    return cast(Tensor, _TreeScan.apply(a, b, tree))  # type: ignore[no-untyped-call]


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor, tree: ChunkTree) -> Tensor:
        start, end = torch.zeros_like(update), update
        for lo, hi, parent, _ in tree.levels:
            if parent is not None:
                start[lo:hi] = end.index_select(0, parent)
            end = decay[lo:hi] * start[lo:hi] + update[lo:hi]
        ctx.save_for_backward(decay, start)
        ctx.tree = tree
        return start

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        decay, start = ctx.saved_tensors
        grad, of_end = grads[0], torch.zeros_like(start)
        levels = ctx.tree.levels
        for (lo, hi, _, sums), before in zip(levels[:0:-1], levels[-2::-1], strict=True):
            of_start = grad[lo:hi] + decay[lo:hi] * of_end[lo:hi]
            of_end[before.start : before.stop] = summed(of_start, before.stop - before.start, sums, of_start.dtype)
        return (of_end * start).sum_to_size(decay.shape), of_end, None


class _TreeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, tree: ChunkTree) -> Tensor:
        h = b.clone()
        for t in range(1, tree.size):
            h[:, t].addcmul_(a[:, t], h[:, t - 1])
        if len(tree.levels) > 1:
            from_start = a.cumprod(1)
            before = h[: tree.levels[0].stop, -1]
            for lo, hi, parent, _ in tree.levels[1:]:
                assert parent is not None
                h[lo:hi].addcmul_(from_start[lo:hi], before.index_select(0, parent)[:, None])
                before = h[lo:hi, -1]
        ctx.save_for_backward(a, h)
        ctx.tree = tree
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, h = ctx.saved_tensors
        tree: ChunkTree = ctx.tree
        of_h, to_end = grads[0].clone(), torch.ones_like(a)
        for t in range(tree.size - 2, -1, -1):
            of_h[:, t].addcmul_(a[:, t + 1], of_h[:, t + 1])
            torch.mul(to_end[:, t + 1], a[:, t + 1], out=to_end[:, t])
        of_a = torch.empty_like(a)
        of_a[:, 1:] = h[:, :-1]
        of_a[: tree.levels[0].stop, 0] = 0
        for before, level in zip(tree.levels[-2::-1], tree.levels[:0:-1], strict=True):
            assert level.parent is not None
            children, rows = slice(level.start, level.stop), slice(before.start, before.stop)
            of_a[children, 0] = h[rows, -1].index_select(0, level.parent)
            grown = a[children, 0] * of_h[children, 0]
            of_end = summed(grown, before.stop - before.start, level.sums, grown.dtype)
            of_h[rows].addcmul_(to_end[rows], of_end[:, None])
        return of_a.mul_(of_h), of_h, None
