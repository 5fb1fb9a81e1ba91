"""Shared-prefix attention on the CPU: flash tiles merged by their log-sum-exp.

Attention over a set of keys can be computed tile by tile. Each tile gives an output and the log-sum-exp of its
scores; the merged output weighs the tiles by ``exp(lse_tile - lse)``. Backward needs no merging: given the *merged*
output and log-sum-exp, every tile's backward yields its exact share of the gradients, since the probabilities it
recomputes are ``exp(score - lse)``. Both live in one autograd function, so no log-sum-exp is ever differentiated.

A sink is a key with score s and value zero: ``lse' = logaddexp(lse, s)``, ``out' = out exp(lse - lse')``. In
backward its score receives ``-exp(s - lse') * (grad_out . out')``.

Grouped heads share keys without a copy: key heads become the batch of the kernel, and the queries that share one
become its heads, along which the keys have stride zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from prefopt.data.packer import Segment

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
WINDOW_ROWS = 256
"""Queries per tile where a sliding window needs a mask: small enough to skip most keys outside the window."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [q0, q1) over keys [k0, k1) of the row.

    ``causal``: the last key is the last query's own. ``offset``: where a window hides keys, the position of the
    first query minus that of the first key, and ``window`` its width.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    offset: int = 0
    window: int | None = None

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask [rows, columns], only where a window cuts through the tile."""
        if self.window is None:
            return None
        gap = self.offset + torch.arange(self.q1 - self.q0)[:, None] - torch.arange(self.k1 - self.k0)[None, :]
        hidden = (gap < 0) | (gap >= self.window)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def tiles_of(segments: tuple[Segment, ...], window: int | None) -> list[list[Tile]]:
    """The tiles of a row, those of the same queries together."""
    groups: list[list[Tile]] = []
    for start, stop, origin, prefix in segments:
        if window is None or prefix + stop - start <= window:
            tiles = [Tile(start, stop, start, stop, causal=True)]
            if prefix:
                tiles.append(Tile(start, stop, origin, origin + prefix))
            groups.append(tiles)
            continue
        for q0 in range(start, stop, WINDOW_ROWS):
            q1 = min(q0 + WINDOW_ROWS, stop)
            k0 = max(start, q0 - window + 1)
            tiles = [Tile(q0, q1, k0, q1, offset=q0 - k0, window=window)]
            position = prefix + q0 - start
            hidden = max(0, position - window + 1)
            if hidden < prefix:
                all_seen = position + (q1 - q0) - 1 - hidden < window
                k0, offset = origin + hidden, position - hidden
                tiles.append(Tile(q0, q1, k0, origin + prefix, offset=offset, window=None if all_seen else window))
            groups.append(tiles)
    return groups


def _grouped(x: torch.Tensor, heads: int, start: int, stop: int) -> torch.Tensor:
    """[heads of x, T, D] to [key heads, queries per key head, rows, D]."""
    part = x[:, start:stop]
    if x.shape[0] == heads:
        return part[:, None]
    grouped: torch.Tensor = part.unflatten(0, (heads, -1))
    return grouped


class _FlashShared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        segments: tuple[Segment, ...],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """query [Hq, T, D], key and value [Hk, T, D], sinks [Hq] or none; returns [T, Hq, D]."""
        heads = key.shape[0]
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        sink = None if sinks is None else sinks.to(lse.dtype).view(heads, -1, 1)
        for tiles in tiles_of(segments, window):
            q0, q1 = tiles[0].q0, tiles[0].q1
            part, norm = _merge([_tile_forward(query, key, value, tile, scale) for tile in tiles])
            if sink is not None:
                total = torch.logaddexp(norm, sink)
                part, norm = (part.to(norm.dtype) * torch.exp(norm - total)[..., None]).to(part.dtype), total
            out[q0:q1] = part.flatten(0, 1).transpose(0, 1)
            lse[:, q0:q1] = norm.flatten(0, 1)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.plan = (segments, scale, window)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        segments, scale, window = ctx.plan
        wide = lse.dtype
        grad = grads[0].transpose(0, 1)
        result = out.transpose(0, 1)
        # Without a window the tiles of a segment's own keys cover the row once: they are written, the others added.
        make = torch.empty if window is None else torch.zeros
        grad_q = make(query.shape, dtype=query.dtype)
        grad_k, grad_v = make(key.shape, dtype=wide), make(value.shape, dtype=wide)
        heads = key.shape[0]
        for tiles in tiles_of(segments, window):
            q0, q1 = tiles[0].q0, tiles[0].q1
            g, o = (_grouped(x, heads, q0, q1) for x in (grad, result))
            norm = lse[:, q0:q1].unflatten(0, (heads, -1))
            for tile in tiles:
                dq, dk, dv = _tile_backward(g, query, key, value, o, norm, tile, scale)
                _put(grad_q[:, q0:q1], dq.flatten(0, 1), tile.causal)
                for total, part in ((grad_k, dk), (grad_v, dv)):
                    one = part.sum(1, dtype=wide) if part.shape[1] > 1 else part[:, 0]
                    _put(total[:, tile.k0 : tile.k1], one, tile.causal)
        grad_s = None
        if sinks is not None and ctx.needs_input_grad[3]:
            weight = torch.exp(sinks.to(wide)[:, None] - lse)
            grad_s = -(weight * (grad.to(wide) * result.to(wide)).sum(-1)).sum(-1).to(sinks.dtype)
        return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype), grad_s, None, None, None


def _put(total: torch.Tensor, part: torch.Tensor, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _tile_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Hk, Hq / Hk, rows, D] and log-sum-exp [Hk, Hq / Hk, rows] of one tile."""
    q = _grouped(query, key.shape[0], tile.q0, tile.q1)
    k, v = (x[:, None, tile.k0 : tile.k1].expand(-1, q.shape[1], -1, -1) for x in (key, value))
    mask = tile.mask(query.dtype)
    out, lse = _forward(q, k, v, 0.0, tile.causal, attn_mask=mask, scale=scale)
    if mask is not None:  # the kernel reports 0 for a row that sees nothing
        blind = torch.isinf(mask).all(-1)
        lse = lse.masked_fill(blind, float("-inf"))
    return out, lse


def _tile_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: Tile,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = _grouped(query, key.shape[0], tile.q0, tile.q1)
    k, v = (x[:, None, tile.k0 : tile.k1].expand(-1, q.shape[1], -1, -1) for x in (key, value))
    mask = tile.mask(query.dtype)
    grads = _backward(grad, q, k, v, out, lse, 0.0, tile.causal, attn_mask=mask, scale=scale)
    return cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor], grads)


def _merge(tiles: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = tiles[0]
    for more, lse_more in tiles[1:]:
        total = torch.logaddexp(lse, lse_more)
        a, b = (torch.exp(x - total)[..., None] for x in (lse, lse_more))
        out, lse = (out.to(total.dtype) * a + more.to(total.dtype) * b).to(out.dtype), total
    return out, lse


def flash_cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    segments: tuple[Segment, ...],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """query [1, Hq, T, D], key and value [1, Hk, T, D], sinks [Hq] or none; returns [1, T, Hq, D]."""
    out = _FlashShared.apply(query[0], key[0], value[0], sinks, segments, scale, window)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, out)[None]
