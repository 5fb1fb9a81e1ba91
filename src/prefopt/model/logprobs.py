"""Token log-probabilities from hidden states, without ever holding the logits of a batch.

For hidden states h [M, H], the head's weight W [V, H] and targets y [M]::

    z = cap * tanh(scale * (h W^T + b) / cap)      (soft-cap and scale only where the model has them)
    logp = z[y] - logsumexp(z)

computed a tile of rows at a time, sums in float32 (float64 for a float64 model). For backward there are three ways:

frozen head     d logp / d h needs no upstream gradient but a factor per row: it is made in the forward pass, from
                the probabilities at hand, and kept as [M, H]. 4 units of matrix work instead of 6, and no recomputing.
kept            the slopes one-hot - p [M, V] stay, in the working dtype, where they fit ``KEEP_BYTES``: 6 units. What
                is rounded is the difference: 1 - p of a rounded p would be nothing but rounding where p is near 1.
recomputed      otherwise the tiles are computed again: 8 units, no memory.

Where Cut Cross-Entropy and Liger stop at the mean loss, this returns every token's value in float32, since sums over
hundreds of tokens are compared with the reference's to a few thousandths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

KEEP_BYTES = 256 * 2**20
"""Slopes kept between forward and backward, at most."""

_TILE_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Logits of one tile; on a GPU a tile must be tall enough to keep its matrix product compute-bound."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-probability of each target: hidden [M, H], weight [V, H], target [M], bias [V] -> float32 or float64 [M]."""
    return _head(hidden, weight, bias, target, scale, softcap, False)[0]


def token_logprobs_and_squares(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the logarithm of the sum over the vocabulary of squared probabilities [M], without gradient."""
    return _head(hidden, weight, bias, target, scale, softcap, True)


def _head(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = _HeadLogprobs.apply(*arguments, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return cast(tuple[torch.Tensor, torch.Tensor], out)


def module_logprobs(
    logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, target: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """The same for any other head, one that carries an adapter say: ``logits`` maps hidden [rows, H] to [rows, V],
    float32 or wider, in checkpointed tiles."""

    def tile(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = logits(h)
        return z.gather(-1, y[:, None])[:, 0] - z.logsumexp(-1)

    parts = [
        checkpoint(tile, hidden[rows], target[rows], use_reentrant=False)
        for rows in tiles(len(target), vocabulary, hidden.device)
    ]
    return torch.cat(parts)


def vocabulary_of(head: torch.nn.Module) -> int:
    """How many logits a head makes, or many where it does not say."""
    return int(getattr(head, "out_features", 0)) or 2**17


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of this dtype are computed in: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def tiles(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """The rows in even parts, few enough for their logits to be held."""
    height = max(16, _TILE_ELEMENTS.get(device.type, 2**25) // vocabulary)
    height = -(-rows // -(-rows // height)) if rows else 1  # even tiles
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def transformed(z: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Logits after scale and soft-cap, where the model has them."""
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits [rows, V] in float32 or float64, accumulated in it where the device can."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        z = torch.mm(hidden, weight.t()).to(wide_dtype(hidden.dtype))
    return z if bias is None else z.add_(bias)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        scale: float,
        softcap: float | None,
        squares: bool,
        grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, vocabulary = len(target), weight.shape[0]
        ctx.scale, ctx.softcap = scale, softcap
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.slope = hidden.new_empty(hidden.shape) if grad and not head_trains and hidden.requires_grad else None
        fits = rows * vocabulary * hidden.element_size() <= KEEP_BYTES and softcap is None
        ctx.kept = hidden.new_empty(rows, vocabulary) if grad and head_trains and fits else None
        logp = hidden.new_empty(rows, dtype=wide_dtype(hidden.dtype))
        lse, square = torch.empty_like(logp), logp.new_empty(rows if squares else 0)
        for part in tiles(rows, vocabulary, hidden.device):
            z = transformed(head_logits(hidden[part], weight, bias), scale, softcap)
            chosen = z.gather(-1, target[part, None])[:, 0]
            lse[part] = torch.logsumexp(z, -1)
            logp[part] = chosen - lse[part]
            if squares:
                square[part] = torch.logsumexp(2 * z, -1) - 2 * lse[part]
            if ctx.kept is not None:
                ctx.kept[part] = _slope(z, lse[part], target[part], 1.0, None)
            elif ctx.slope is not None:
                ctx.slope[part] = _slope(z, lse[part], target[part], scale, softcap).to(hidden.dtype) @ weight
        if grad:
            ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.mark_non_differentiable(square)
        return logp, square

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, _ = grads
        hidden, weight, bias, target, lse = ctx.saved_tensors
        if ctx.slope is not None:
            return (ctx.slope * g[:, None]).to(ctx.slope.dtype), *(None,) * 7
        wants = ctx.needs_input_grad
        grad_h = torch.empty_like(hidden) if wants[0] else None
        grad_w = None
        grad_b = torch.zeros_like(bias, dtype=wide_dtype(weight.dtype)) if bias is not None and wants[2] else None
        # What is kept is there whole: one tall matrix product each, and no sums.
        whole = [slice(0, len(target))] if ctx.kept is not None else None
        for part in whole or tiles(len(target), weight.shape[0], hidden.device):
            if ctx.kept is not None:
                slope = ctx.kept[part].mul_((g[part] * ctx.scale)[:, None])
            else:
                z = transformed(head_logits(hidden[part], weight, bias), ctx.scale, ctx.softcap)
                z = _slope(z, lse[part], target[part], ctx.scale, ctx.softcap)
                slope = z.mul_(g[part, None]).to(hidden.dtype)
            if grad_h is not None:
                grad_h[part] = slope @ weight
            if wants[1]:
                grad_w = accumulate(grad_w, slope, hidden[part])
            if grad_b is not None:
                grad_b += slope.sum(0, dtype=grad_b.dtype)
        ctx.kept = None
        return (
            grad_h,
            None if grad_w is None else grad_w.to(weight.dtype),
            None if grad_b is None else grad_b.to(weight.dtype),
            *(None,) * 5,
        )


def accumulate(total: torch.Tensor | None, slope: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """``total`` [V, H], in float32 or wider, plus slope^T hidden."""
    if total is None:
        return (slope.t() @ hidden).to(wide_dtype(slope.dtype))
    if slope.dtype == total.dtype:
        return total.addmm_(slope.t(), hidden)
    return total.add_(slope.t() @ hidden)


def _slope(
    z: torch.Tensor, lse: torch.Tensor, target: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """d logp / d (h W^T + b) of a tile, [rows, V]: (one-hot - p) times the slopes of soft-cap and scale."""
    slope = torch.exp(z - lse[:, None]).neg_()
    slope[torch.arange(len(z), device=z.device), target] += 1
    if softcap is not None:
        slope *= 1 - (z / softcap) ** 2
    return slope.mul_(scale) if scale != 1.0 else slope
