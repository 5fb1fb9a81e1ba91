"""PictureBlocks of tokens that see each other in a causal row: the image tokens of a picture (Gemma 3 and 4).

A query of a block at position q sees the keys k with (k <= q or k in the block) and, under a window, q - k < window, as
the masks of transformers say. All other rows are computed by the causal kernels; the rows of blocks are computed here
and put in their place, so that gradients of the values that they replace are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.model.kernels.shared import How


class Block(NamedTuple):
    """Rows [start, stop) of a packed row, in the segment that begins at ``segment`` and sees ``prefix`` rows from
    ``origin`` on."""

    start: int
    stop: int
    segment: int
    origin: int
    prefix: int


class PictureBlocks(NamedTuple):
    """The blocks of a row; ``sliding``: only layers with a sliding window let them see each other."""

    blocks: tuple[Block, ...]
    sliding: bool = False


def with_blocks(out: Tensor, query: Tensor, key: Tensor, value: Tensor, found: PictureBlocks, how: How) -> Tensor:
    """Causal attention ``out`` [1, T, heads, D] with the rows of blocks computed again; query [1, Hq, T, D], key and
    value [1, Hk, T, D]. A layer with sinks has none of these."""
    if found.sliding and how.window is None:
        return out
    rows, parts = [], []
    for block in found.blocks:
        rows.append(torch.arange(block.start, block.stop, device=out.device))
        parts.append(_attend(query, key, value, block, how))
    return out.index_copy(1, torch.cat(rows), torch.cat(parts, 1).to(out.dtype))


def _attend(query: Tensor, key: Tensor, value: Tensor, block: Block, how: How) -> Tensor:
    """[1, rows, heads, D] of one block."""
    q = query[:, :, block.start : block.stop]
    repeat = query.shape[1] // key.shape[1]
    k, v = (_keys(x, block).repeat_interleave(repeat, 1) for x in (key, value))
    count = block.stop - block.start
    before = k.shape[2] - count
    place = torch.arange(before, before + count, device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)[None]
    visible = (columns <= place) | (columns >= before)
    if how.window is not None:
        visible &= place - columns < how.window
    if how.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, visible, scale=how.scale).transpose(1, 2)
    scores = torch.tanh((q @ k.transpose(-1, -2)) * how.scale / how.softcap) * how.softcap
    scores = scores.masked_fill(~visible, float("-inf")).to(torch.promote_types(q.dtype, torch.float32))
    return (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(1, 2)


def _keys(x: Tensor, block: Block) -> Tensor:
    own = x[:, :, block.segment : block.stop]
    return torch.cat([x[:, :, block.origin : block.origin + block.prefix], own], 2) if block.prefix else own
