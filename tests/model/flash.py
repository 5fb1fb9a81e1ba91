"""Variable-length flash attention by plain arithmetic, under torch's own operators, on the CPU.

It computes what FlashAttention-2 computes and refuses what that refuses, so that the code for CUDA runs with real
numbers. torch's operators, their autograd and their shape functions are the real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor

CALLS: Counter[str] = Counter()
"""Forward and backward calls of the kernel."""
FAULTS = {"window": 0, "gradients": 1.0}
"""Mistakes to make: keys too many in the window, and a factor of bfloat16 gradients."""
WIDTH_STEP, WIDEST = 8, 256


def check(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor | None, *, narrow: bool = False
) -> None:
    """What FlashAttention-2 demands of its arguments; ``narrow``: the dtypes too."""
    assert cu_k is not None
    assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
    assert not narrow or query.dtype in (torch.bfloat16, torch.float16), query.dtype
    assert query.ndim == key.ndim == value.ndim == 3
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % WIDTH_STEP == 0 and query.shape[-1] <= WIDEST, f"head width {query.shape[-1]}"
    assert query.shape[1] % key.shape[1] == 0 and key.shape[:2] == value.shape[:2]
    assert all(x.stride(-1) == 1 for x in (query, key, value)), "the last axis is not contiguous"
    for ends in (cu_q, cu_k):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == query.device
    assert cu_q.shape == cu_k.shape


def _check_numbers(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    for rows, ends, longest in ((query, cu_q, max_q), (key, cu_k, max_k)):
        assert int(ends[0]) == 0 and int(ends[-1]) == len(rows), "cumulative lengths do not cover the rows"
        assert int(ends.diff().max()) == longest


def _windows(window: list[int] | None, causal: bool) -> tuple[int, int]:
    left, right = window or (-1, -1)
    return left + FAULTS["window"] if left >= 0 else left, 0 if causal else right


def _parts(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        yield slice(a, b), slice(c, d)


def _scores(q: Tensor, k: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
    """Of queries [q, H, D] over keys [k, H, D] that end with the last query: [H, q, k]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    behind = at - torch.arange(len(k))
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    for limit, far in zip(window, (behind, -behind), strict=True):
        if limit >= 0:
            hidden |= far > limit
    return scores.masked_fill(hidden, float("-inf"))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    CALLS["forward"] += 1
    check(query, key, value, cu_seq_q, cu_seq_k)
    _check_numbers(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    window, factor = _windows(window_size, is_causal), query.shape[-1] ** -0.5 if scale is None else scale
    wide, each = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=wide)
    for rows, keys in _parts(cu_seq_q, cu_seq_k):
        k, v = (x[keys].to(wide).repeat_interleave(each, 1) for x in (key, value))
        scores = _scores(query[rows].to(wide), k, factor, window)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    CALLS["backward"] += 1
    check(query, key, value, cu_seq_q, cu_seq_k)
    assert grad_out.dtype == query.dtype  # torch makes it contiguous
    window, factor = _windows(window_size, is_causal), query.shape[-1] ** -0.5 if scale is None else scale
    wide, each = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(x, dtype=wide) for x in (query, key, value)]
    for rows, keys in _parts(cu_seq_q, cu_seq_k):
        q, g, o = (x[rows].to(wide) for x in (query, grad_out, out))
        k, v = (x[keys].to(wide).repeat_interleave(each, 1) for x in (key, value))
        chance = (_scores(q, k, factor, window) - lse[:, rows, None]).exp()
        slope = chance * (torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).t()[..., None]) * factor
        grads[0][rows] = torch.einsum("hqk,khd->qhd", slope, k)
        grads[1][keys] = torch.einsum("hqk,qhd->khd", slope, q).unflatten(1, (-1, each)).sum(2)
        grads[2][keys] = torch.einsum("hqk,qhd->khd", chance, g).unflatten(1, (-1, each)).sum(2)
    louder = FAULTS["gradients"] if query.dtype == torch.bfloat16 else 1.0
    first, second, third = ((x * louder).to(query.dtype) for x in grads)
    return first, second, third


def register() -> None:
    """Give torch's operators these kernels for the CPU, where they have none."""
    if "cpu" not in torch_varlen._varlen_attn._backend_fns:
        torch_varlen._varlen_attn.register_kernel("cpu")(forward)
        torch_varlen._varlen_attn_backward.register_kernel("cpu")(backward)
