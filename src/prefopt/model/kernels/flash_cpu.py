"""Shared-prefix attention on the CPU: flash tiles merged by their log-sum-exp.

Each tile of keys gives an output and the log-sum-exp of its scores; the merged output weighs the tiles by
``exp(lse_tile - lse)``. Backward needs no merging: given the *merged* output and log-sum-exp, every tile's backward
yields its exact share of the gradients, since it recomputes probabilities as ``exp(score - lse)``.

Grouped heads share keys without a copy: key heads become the batch of the kernel, and the queries that share one
become its heads, along which the keys have stride zero.

For many short responses to one prompt the prompt's keys for adjoining responses are one tile, and short responses of
one length are one batch. Gradients of a prefix's keys are added in the order of the segments, in float32, and rounded
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from prefopt.model.kernels.shared import How
from prefopt.model.packing import Segment

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
WINDOW_ROWS = 256
"""Queries per tile where a sliding window needs a mask: small enough to skip most keys outside the window."""
SHORT = 64
"""Segments of at most this many tokens are computed together: a copy costs less than a call for each."""

Rows = slice | Tensor
"""A run of the row's tokens, or their indices."""


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Queries over keys. ``many``: number of tiles of one shape, whose rows are given end to end. ``causal``: the last
    key is the last query's own. ``offset``: where a ``window`` hides keys, the position of the first query minus that
    of the first key."""

    queries: Rows
    keys: Rows
    many: int = 1
    causal: bool = False
    offset: int = 0
    window: int | None = None

    def mask(self, like: Tensor) -> Tensor | None:
        """Additive mask [rows, columns], of the dtype and on the device of ``like``; None where no window cuts through
        the tile."""
        if self.window is None:
            return None
        rows, columns = (torch.arange(r.stop - r.start) for r in (self.queries, self.keys) if isinstance(r, slice))
        gap = self.offset + rows[:, None] - columns[None, :]
        hidden = (gap < 0) | (gap >= self.window)
        return like.new_zeros(hidden.shape).masked_fill_(hidden.to(like.device), float("-inf"))


@lru_cache(maxsize=4)  # each layer asks for the same, forward and backward
def tiles_of(segments: tuple[Segment, ...], window: int | None) -> tuple[list[Tile], list[Tile]]:
    """The tiles of a row: of the segments' own keys (every query once), and of prefixes."""
    own: list[Tile] = []
    prefixes: list[Tile] = []
    starts: dict[int, list[int]] = {}  # of short segments, by length
    seen: tuple[int, int, int, int] | None = None  # the last prefix tile that may grow
    for start, stop, origin, prefix in segments:
        if window is not None and prefix + stop - start > window:
            _add_windowed(own, prefixes, (start, stop, origin, prefix), window)
            continue
        if stop - start <= SHORT:
            starts.setdefault(stop - start, []).append(start)
        else:
            own.append(_causal([start], stop - start))
        if prefix:
            q0 = start
            if prefixes and seen is not None and seen[1:] == (start, origin, prefix):
                q0 = seen[0]
                prefixes.pop()
            prefixes.append(Tile(slice(q0, stop), slice(origin, origin + prefix)))
            seen = (q0, stop, origin, prefix)
    own += [_causal(where, length) for length, where in starts.items()]
    return own, prefixes


def _causal(starts: Sequence[int], length: int) -> Tile:
    """Segments over their own keys."""
    if len(starts) == 1:
        rows = slice(starts[0], starts[0] + length)
        return Tile(rows, rows, causal=True)
    at = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
    return Tile(at, at, len(starts), causal=True)


def _add_windowed(own: list[Tile], prefixes: list[Tile], segment: Segment, window: int) -> None:
    """Add the tiles of a segment longer than the window."""
    start, stop, origin, prefix = segment
    for q0 in range(start, stop, WINDOW_ROWS):
        q1 = min(q0 + WINDOW_ROWS, stop)
        k0 = max(start, q0 - window + 1)
        own.append(Tile(slice(q0, q1), slice(k0, q1), offset=q0 - k0, window=window))
        position = prefix + q0 - start
        hidden = max(0, position - window + 1)
        if hidden < prefix:
            all_seen = position + (q1 - q0) - 1 - hidden < window
            keys = slice(origin + hidden, origin + prefix)
            prefixes.append(Tile(slice(q0, q1), keys, offset=position - hidden, window=None if all_seen else window))


def _take(x: Tensor, heads: int, rows: Rows, many: int) -> Tensor:
    """[heads of x, T, ...] to [key heads * many, queries per key head, rows of a tile, ...]; a view for one tile."""
    part = x[:, rows]
    return cast(Tensor, part.unflatten(1, (many, -1)).unflatten(0, (heads, -1)).transpose(1, 2).flatten(0, 1))


def _back(x: Tensor, heads: int) -> Tensor:
    """Inverse of :func:`_take`: [key heads * many, queries per key head, rows of a tile, ...] to [heads, rows, ...]."""
    return cast(Tensor, x.unflatten(0, (heads, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2))


def forward(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], how: How
) -> tuple[Tensor, Tensor]:
    """See :class:`prefopt.model.kernels.shared.Kernel`."""
    memory = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    out = memory.transpose(0, 1)
    lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    own, prefixes = tiles_of(segments, how.window)
    for tile in own:
        out[:, tile.queries], lse[:, tile.queries] = _tile_forward(query, key, value, tile, how.scale)
    for tile in prefixes:
        at = tile.queries
        out[:, at], lse[:, at] = _merge(out[:, at], lse[:, at], *_tile_forward(query, key, value, tile, how.scale))
    return memory, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: tuple[Segment, ...],
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`prefopt.model.kernels.shared.Kernel`."""
    grad, out = grad.transpose(0, 1), out.transpose(0, 1)
    # Without a window the tiles of a segment's own keys cover the row once: they are written, the others added.
    make = torch.empty if how.window is None else torch.zeros
    grad_q = make(query.shape, dtype=query.dtype, device=query.device)
    grad_k, grad_v = (make(x.shape, dtype=lse.dtype, device=x.device) for x in (key, value))
    heads = key.shape[0]
    own, prefixes = tiles_of(segments, how.window)
    for tile in (*own, *prefixes):
        dq, dk, dv = _tile_backward(grad, query, key, value, out, lse, tile, how.scale)
        _put(grad_q, tile.queries, _back(dq, heads), tile.causal)
        for total, part in ((grad_k, dk), (grad_v, dv)):
            one = part.sum(1, dtype=lse.dtype, keepdim=True) if part.shape[1] > 1 else part
            _put(total, tile.keys, _back(one, heads), tile.causal)
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype)


def _put(total: Tensor, rows: Rows, part: Tensor, first: bool) -> None:
    if first:
        total[:, rows] = part.to(total.dtype)
    else:
        total[:, rows] += part


def _tile_forward(query: Tensor, key: Tensor, value: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
    """Output [Hq, rows, D] and log-sum-exp [Hq, rows] of a tile."""
    heads = key.shape[0]
    q, k, v = _operands(query, key, value, tile)
    mask = tile.mask(query)
    out, lse = _forward(q, k, v, 0.0, tile.causal, attn_mask=mask, scale=scale)
    if mask is not None:  # the kernel reports 0 for a row that sees nothing
        blind = torch.isinf(mask).all(-1)
        lse = lse.masked_fill(blind, float("-inf"))
    return _back(out, heads), _back(lse, heads)


def _tile_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the kernel's operands. ``out`` and ``lse`` are the merged ones of the whole row."""
    q, k, v = _operands(query, key, value, tile)
    g, o, norm = (_take(x, key.shape[0], tile.queries, tile.many) for x in (grad, out, lse))
    mask = tile.mask(query)
    grads = _backward(g, q, k, v, o, norm, 0.0, tile.causal, attn_mask=mask, scale=scale)
    return cast(tuple[Tensor, Tensor, Tensor], grads)


def _operands(query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> list[Tensor]:
    """Queries, keys and values [Hk * many, Hq / Hk, rows of a tile, D] as the kernel takes them."""
    heads = key.shape[0]
    q = _take(query, heads, tile.queries, tile.many)
    return [q, *(_take(x, heads, tile.keys, tile.many).expand(-1, q.shape[1], -1, -1) for x in (key, value))]


def _merge(out: Tensor, lse: Tensor, more: Tensor, lse_more: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, lse_more)
    a, b = (torch.exp(x - total)[..., None] for x in (lse, lse_more))
    return (out.to(total.dtype) * a + more.to(total.dtype) * b).to(out.dtype), total
