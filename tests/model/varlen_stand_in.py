"""Variable-length flash attention in plain arithmetic, registered for the CPU under the operators of torch.

It checks what flash attention checks: dtypes, head widths, cumulative lengths, contiguous heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention.varlen
from torch import Tensor

from prefopt.model.kernels.varlen import WIDEST

CALLS: list[dict[str, Any]] = []
"""The options of every forward call."""
FAULTS = {"window": 0, "gradients": 1.0}
"""Mistakes to make: keys too many in the window, and a factor of bfloat16 gradients."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= WIDEST
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert int(cu_q[-1]) == len(query)
    assert int(cu_k[-1]) == len(key) == len(value)
    assert int(cu_q.diff().max()) == max_q
    assert int(cu_k.diff().max()) == max_k


def _segments(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        yield slice(a, b), slice(c, d)


def _scores(query: Tensor, key: Tensor, scale: float, window: list[int], causal: bool) -> Tensor:
    """[heads, rows, columns], ends aligned."""
    scores = torch.einsum("qhd,khd->hqk", _wide(query), _wide(_repeated(key, query))) * scale
    rows, columns = scores.shape[1:]
    distance = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)
    left, right = window
    assert causal == (left == -1)
    seen = distance >= -right
    if left >= 0:
        seen &= distance <= left + FAULTS["window"]
    return scores.masked_fill(~seen, float("-inf"))


def _repeated(key: Tensor, query: Tensor) -> Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


@torch.library.register_kernel("torch_attn::_varlen_attn", "cpu")
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float = 1.0,
    window_size: Any = None,
    enable_gqa: bool = False,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, value, cu_q, cu_k, max_q, max_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    CALLS.append({"window": window_size, "grouped": enable_gqa, "heads": query.shape[1]})
    out, lse = torch.empty_like(query), _wide(query.new_empty(query.shape[1], len(query)))
    for rows, keys in _segments(cu_q, cu_k):
        scores = _scores(query[rows], key[keys], scale, window_size, is_causal)
        lse[:, rows] = scores.logsumexp(-1)
        chance = scores.softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", chance, _wide(_repeated(value[keys], query))).to(out.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


@torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu")
def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float = 1.0,
    window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, value, cu_q, cu_k, max_q, max_k)
    assert grad.stride(-1) == 1
    grads = [torch.zeros_like(_wide(x)) for x in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    for rows, keys in _segments(cu_q, cu_k):
        g, o = _wide(grad[rows]), _wide(out[rows])
        q, k, v = (_wide(x) for x in (query[rows], _repeated(key[keys], query), _repeated(value[keys], query)))
        chance = torch.exp(_scores(query[rows], key[keys], scale, window_size, is_causal) - lse[:, rows, None])
        slope = torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).t()[..., None]
        slope = chance * slope * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", slope, k)
        for total, part in (
            (grads[1], torch.einsum("hqk,qhd->khd", slope, q)),
            (grads[2], torch.einsum("hqk,qhd->khd", chance, g)),
        ):
            total[keys] = part.unflatten(1, (-1, group)).sum(2)
    louder = FAULTS["gradients"] if query.dtype == torch.bfloat16 else 1.0
    return tuple((x * louder).to(query.dtype) for x in grads)  # type: ignore[return-value]
