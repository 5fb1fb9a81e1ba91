"""FlexAttention on CUDA for what flash attention refuses: soft-caps of scores, and wider heads.

The mask is computed from the bounds of the segments, on the host, block by block: no [T, T] mask exists, and blocks
that are seen whole skip the mask. Rows are padded to whole blocks; shapes are dynamic, so that one kernel serves all
rows. torch differentiates the log-sum-exp that it returns, so that sinks need no function of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.errors import first_line
from prefopt.model.costs import out_of_memory
from prefopt.model.kernels.shared import How
from prefopt.model.packing import Segment

BLOCK = 128
"""Queries and keys of a block of the mask."""
log = logging.getLogger(__name__)
_failure: list[str] = []

BoolArray = npt.NDArray[np.bool_]


class FlexPlan(NamedTuple):
    """A row for FlexAttention. Of every query, [T] with padding: the first token of its own segment, the prefix that it
    sees (``origin`` to ``end``), and its position. ``masks``: block masks by window, made when they are asked for."""

    segments: tuple[Segment, ...]
    start: Tensor
    origin: Tensor
    end: Tensor
    position: Tensor
    masks: dict[int | None, Any]


@lru_cache(maxsize=4)  # each layer asks for the same
def flex_plan(segments: tuple[Segment, ...], device: torch.device) -> FlexPlan:
    """The plan of a row, on ``device``."""
    tokens = segments[-1][1]
    padded = -(-tokens // BLOCK) * BLOCK
    start, origin, end = (np.arange(padded) for _ in range(3))  # padding sees itself, and no prefix
    position = np.zeros(padded, np.int64)
    for a, b, first, prefix in segments:
        start[a:b], origin[a:b], end[a:b] = a, first, first + prefix
        position[a:b] = np.arange(prefix, prefix + b - a)

    def column(x: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(x).to(device, torch.int32, non_blocking=True)

    return FlexPlan(segments, column(start), column(origin), column(end), column(position), {})


def visible_blocks(segments: tuple[Segment, ...], window: int | None) -> tuple[BoolArray, BoolArray]:
    """Which blocks of keys are seen in part, and which whole, by each block of queries: two [blocks, blocks]. Blocks
    that a window might hide count as seen in part."""
    blocks = -(-segments[-1][1] // BLOCK)
    seen, whole = (np.zeros((blocks, blocks), bool) for _ in range(2))
    np.fill_diagonal(seen, True)  # padding sees itself
    for start, stop, origin, prefix in segments:
        first, last = start // BLOCK, (stop - 1) // BLOCK
        for i in range(first, last + 1):
            seen[i, first : i + 1] = True
            if prefix:
                seen[i, origin // BLOCK : (origin + prefix - 1) // BLOCK + 1] = True
            if window is None and start <= i * BLOCK and (i + 1) * BLOCK <= stop:  # all its queries are of this segment
                whole[i, -(-start // BLOCK) : i] = True
                whole[i, -(-origin // BLOCK) : max(-(-origin // BLOCK), (origin + prefix) // BLOCK)] = True
    return seen & ~whole, whole


def _block_mask(plan: FlexPlan, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    if window not in plan.masks:
        device, tokens = plan.start.device, len(plan.start)
        lists: list[Tensor] = []
        for blocks in visible_blocks(plan.segments, window):
            count, order = blocks.sum(1), np.argsort(~blocks, axis=1, kind="stable")
            lists += [torch.from_numpy(x[None, None]).to(device, torch.int32) for x in (count, order)]
        make: Callable[..., Any] = BlockMask.from_kv_blocks
        plan.masks[window] = make(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=_visible(plan, window), seq_lengths=(tokens, tokens)
        )
    return plan.masks[window]


def _visible(plan: FlexPlan, window: int | None) -> Callable[..., Tensor]:
    start, origin, end, position = plan.start, plan.origin, plan.end, plan.position

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own, prefix = (k >= start[q]) & (k <= q), (k >= origin[q]) & (k < end[q])
        return own | prefix

    if window is None:
        return visible

    def near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(batch, head, q, k) & (position[q] - position[k] < window)

    return near


def usable() -> bool:
    """Whether it has not failed so far."""
    return not _failure


def attend(query: Tensor, key: Tensor, value: Tensor, plan: FlexPlan, how: How, sinks: Tensor | None) -> Tensor | None:
    """Attention of a row: query [1, Hq, T, D], key and value [1, Hk, T, D], sinks [Hq] or none, to [1, T, Hq, D]. None
    where torch cannot compile it for this device; a line says why."""
    tokens = query.shape[2]
    rows = [F.pad(x, (0, 0, 0, len(plan.start) - tokens)) for x in (query, key, value)]
    try:
        from torch.nn.attention.flex_attention import AuxRequest

        from prefopt.model.compiled import compiler_settings  # the compiler takes a second to import

        with compiler_settings():
            options: dict[str, Any] = {"scale": how.scale, "enable_gqa": query.shape[1] != key.shape[1]}
            if sinks is not None:
                options["return_aux"] = AuxRequest(lse=True)
            found = _attention()(*rows, _capped(how.softcap), _block_mask(plan, how.window), **options)
    except Exception as error:  # of any kind: it is compiled for this device here
        if out_of_memory(error):
            raise
        _failure.append(first_line(error))
        log.warning("attention: FlexAttention is not used, plain arithmetic takes its place: %s", _failure[0])
        return None
    out = found
    if sinks is not None:
        out, lse = found[0], found[1].lse
        out = (out.to(lse.dtype) * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]).to(out.dtype)
    attended: Tensor = out[:, :, :tokens].transpose(1, 2)
    return attended


def _capped(cap: float | None) -> Callable[..., Tensor] | None:
    if cap is None:
        return None
    return lambda score, *_: torch.tanh(score / cap) * cap


@cache
def _attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
