"""Variable-length flash attention on CUDA: keys and values gathered per segment, one call per layer.

The operators behind ``torch.nn.attention.varlen.varlen_attn`` are called, not the function itself: sinks need the
log-sum-exp, and its gradient is dropped there. They run FlashAttention-2, or the implementation that is switched on
(:mod:`prefopt.model.kernels.flash`). Gathered keys and values are not
kept for the backward pass but gathered again.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from prefopt.model.kernels.gather import summed
from prefopt.model.kernels.shared import How

WIDEST, WIDTH_STEP = 256, 8
"""Largest head width, and what widths are multiples of: the hook pads others."""


def takes(*widths: int) -> bool:
    """Whether flash attention takes heads of these widths, padded to one."""
    return max(widths) <= WIDEST


def padded_width(*widths: int) -> int:
    """The head width that these are padded to: one for keys and values, a multiple of :data:`WIDTH_STEP`."""
    return -(-max(widths) // WIDTH_STEP) * WIDTH_STEP


def forward(query: Tensor, key: Tensor, value: Tensor, plan: dict[str, Any], how: How) -> tuple[Tensor, Tensor]:
    """See :class:`prefopt.model.kernels.shared.Kernel`. ``plan``: of
    :func:`prefopt.model.kernels.attention.gather_plan`."""
    operands = _operands(query, key, value, plan)
    options: dict[str, Any] = {"scale": how.scale, "window_size": _window(how), "is_causal": how.window is None}
    if "enable_gqa" in _forward_arguments():  # since torch 2.12; before, grouped heads needed no flag
        options["enable_gqa"] = query.shape[0] != key.shape[0]
    out, lse, _ = torch.ops.torch_attn._varlen_attn(*operands, *_lengths(plan), **options)
    return out, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: dict[str, Any], how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`prefopt.model.kernels.shared.Kernel`."""
    operands = _operands(query, key, value, plan)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        grad.contiguous(), *operands, out, lse, *_lengths(plan), how.window is None, no_dropout, how.scale, _window(how)
    )
    tokens, sums = key.shape[1], plan["sums"]
    dk, dv = (summed(x, tokens, sums, key.dtype).transpose(0, 1) for x in (dk, dv))
    return dq.transpose(0, 1), dk, dv


def _operands(query: Tensor, key: Tensor, value: Tensor, plan: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, Hq, D], and gathered keys and values [rows, Hk, D]."""
    keys, values = (x.transpose(0, 1).index_select(0, plan["index"]) for x in (key, value))
    return query.transpose(0, 1).contiguous(), keys, values


def _lengths(plan: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
    return plan["cu_q"], plan["cu_k"], plan["max_q"], plan["max_k"]


def _window(how: How) -> list[int]:
    """Keys to the left of the query and to its right; transformers counts the query too."""
    return [-1 if how.window is None else how.window - 1, 0]


@cache
def _forward_arguments() -> frozenset[str]:
    return frozenset(a.name for a in torch.ops.torch_attn._varlen_attn.default._schema.arguments)


@cache
def has_varlen() -> bool:
    """Whether this torch has the operators."""
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return False
    return hasattr(torch.ops.torch_attn, "_varlen_attn_backward") and "window_size" in _forward_arguments()
