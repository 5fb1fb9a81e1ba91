"""The head of a language model: from the last hidden state to logits, log-probabilities and divergences.

How a class's head computes its logits: :mod:`prefopt.model.kernels.head_class`.

For hidden states h [M, H], the head's weight W [V, H], targets y [M] and another model's logits r [M, V]::

    z      = cap * tanh(scale * (h W^T + b) / cap)      (soft-cap and scale only where the model has them)
    logp   = z[y] - logsumexp(z)
    square = logsumexp(2 z) - 2 logsumexp(z)            (log of the sum of squared probabilities)
    a divergence of softmax(z) from softmax(r), see :mod:`prefopt.model.kernels.divergence`

in tiles of rows, with sums in float32 (float64 for a float64 model). Its backward computes the tiles again, that of
logp works in one of three ways:

frozen head     d logp / d h is computed in the forward pass and kept as [M, H]; backward multiplies it by a factor per
                row. 4 units of matrix work.
kept            one-hot - p [M, V] is kept in the working dtype where it fits ``KEEP_BYTES``: 6 units. The difference is
                rounded, since 1 - p of a rounded p would be rounding alone where p is near 1.
recomputed      otherwise the tiles are computed again: 8 units, no memory.

Unlike Cut Cross-Entropy and Liger this returns every token's value, in float32: sums over hundreds of tokens are
compared with the reference's to a few thousandths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefopt.model.kernels.device import kind_of
from prefopt.model.kernels.divergence import Divergence
from prefopt.model.kernels.head_device import aligned, fused_head, tiles
from prefopt.model.kernels.top_tokens import TopTokens

KEEP_BYTES = 256 * 2**20
"""Largest [M, V] that is kept between forward and backward."""
FORWARD = Divergence("forward")


@dataclass(frozen=True, slots=True)
class Distributions:
    """A model's next-token distributions at M positions, computed when needed: ``logits`` maps a slice of the positions
    to [rows, V], float32 or wider, without gradients."""

    vocabulary: int
    logits: Callable[[slice], Tensor]


Compared = Distributions | TopTokens
"""What a model's distributions are compared with."""


class TokenScores(NamedTuple):
    """Scores of M tokens by one forward pass. ``divergence_M`` and ``other_logp_M`` with distributions to compare with;
    ``square_M`` (log of the sum of squared probabilities, without gradient), ``distributions`` and ``hidden_M`` [M, H]
    where requested."""

    logp_M: Tensor
    square_M: Tensor | None = None
    divergence_M: Tensor | None = None
    other_logp_M: Tensor | None = None
    distributions: Distributions | None = None
    hidden_M: Tensor | None = None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target: hidden [M, H], weight [V, H], target [M], bias [V] -> float32 or float64 [M].

    With ``squares`` also the log of the sum over the vocabulary of squared probabilities [M], without gradient. On CUDA
    narrow heads take fused kernels (:mod:`prefopt.model.kernels.head_triton`).
    """
    if (fused := fused_head(hidden, weight, bias, scale, softcap)) is not None:
        from prefopt.model.kernels.head_triton import fused_logprobs

        return fused_logprobs(hidden, fused, target, squares=squares)
    arguments = (hidden, weight, bias, target, scale, softcap, squares, torch.is_grad_enabled())
    return cast(tuple[Tensor, Tensor], _HeadLogprobs.apply(*arguments))  # type: ignore[no-untyped-call]


def module_logprobs(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, vocabulary: int, *, squares: bool = False
) -> tuple[Tensor, Tensor]:
    """The same by any other head, such as one with an adapter: ``logits`` maps hidden [rows, H] to [rows, V], float32
    or wider, in checkpointed tiles."""

    def tile(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = logits(h)
        square = (2 * z.detach().log_softmax(-1)).logsumexp(-1) if squares else z.new_empty(0)
        return z.gather(-1, y[:, None])[:, 0] - z.logsumexp(-1), square

    done = [
        checkpoint(tile, hidden[rows], target[rows], use_reentrant=False)
        for rows in tiles(len(target), vocabulary, hidden.device)
    ]
    logp, square = map(torch.cat, zip(*done, strict=True))
    return logp, square


def head_scores(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    other: Compared,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    divergence: Divergence = FORWARD,
) -> TokenScores:
    """Scores of hidden [M, H] under a head weight [V, H], compared with ``other``; target [M], bias [V]."""
    arguments = (hidden, weight, bias, target, scale, softcap, other, divergence)
    found = _HeadScores.apply(*arguments)  # type: ignore[no-untyped-call]
    return TokenScores(*found)


def logit_scores(
    logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target: Tensor,
    other: Compared,
    divergence: Divergence = FORWARD,
) -> TokenScores:
    """The same by any other head: ``logits`` maps hidden [rows, H] to [rows, V], in checkpointed tiles."""

    def tile(h: Tensor, y: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        rows, logp = slice(int(first), int(first) + len(y)), logits(h).log_softmax(-1)
        square, own = (2 * logp.detach()).logsumexp(-1), logp.gather(-1, y[:, None])[:, 0]
        if isinstance(other, TopTokens):
            return own, square, other.value(rows, logp, divergence), other.own_M[rows].to(logp.dtype)
        ref = other.logits(rows).log_softmax(-1)
        return own, square, divergence.value(logp, ref), ref.gather(-1, y[:, None])[:, 0]

    done = [
        checkpoint(tile, hidden[rows], target[rows], torch.tensor(rows.start), use_reentrant=False)
        for rows in tiles(len(target), other.vocabulary, hidden.device)
    ]
    logp, square, apart, ref = map(torch.cat, zip(*done, strict=True))
    return TokenScores(logp, square, apart, ref)


def vocabulary_of(head: torch.nn.Module) -> int:
    """Logits per token, or many where the head does not give their number."""
    return int(getattr(head, "out_features", 0)) or 2**17


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute logits in: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def transformed(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits after scale and soft-cap."""
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [rows, V], accumulated in float32 or float64 where the device can."""
    if kind_of(hidden.device) == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16):
        if len(weight) % 8 == 0:
            z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            z = aligned(len(hidden), len(weight), torch.float32, hidden.device)
            torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=z)
    else:
        z = torch.mm(hidden, weight.t()).to(wide_dtype(hidden.dtype))
    return z if bias is None else z.add_(bias)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: float,
        softcap: float | None,
        squares: bool,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
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
                slope = _slope(z, lse[part], target[part], scale, softcap)
                ctx.slope[part] = _narrowed(slope, hidden.dtype) @ weight
        if grad:
            ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.mark_non_differentiable(square)
        return logp, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, _ = grads
        hidden, weight, bias, target, lse = ctx.saved_tensors
        if ctx.slope is not None:
            return (ctx.slope * g[:, None]).to(ctx.slope.dtype), *(None,) * 7
        gradients = HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        whole = [slice(0, len(target))] if ctx.kept is not None else None
        for part in whole or tiles(len(target), weight.shape[0], hidden.device):
            if ctx.kept is not None:
                slope = ctx.kept[part].mul_((g[part] * ctx.scale)[:, None])
            else:
                z = transformed(head_logits(hidden[part], weight, bias), ctx.scale, ctx.softcap)
                z = _slope(z, lse[part], target[part], ctx.scale, ctx.softcap)
                slope = _narrowed(z.mul_(g[part, None]), hidden.dtype)
            gradients.add(part, slope)
        ctx.kept = None
        return *gradients.rounded(), *(None,) * 5


class _HeadScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: float,
        softcap: float | None,
        other: Compared,
        divergence: Divergence,
    ) -> tuple[Tensor, ...]:
        ctx.scale, ctx.softcap, ctx.other, ctx.divergence = scale, softcap, other, divergence
        logp = hidden.new_empty(len(target), dtype=wide_dtype(hidden.dtype))
        square, apart, ref_logp, lse, ref_lse = (torch.empty_like(logp) for _ in range(5))
        for part in tiles(len(target), weight.shape[0], hidden.device):
            z = transformed(head_logits(hidden[part], weight, bias), scale, softcap)
            lse[part] = z.logsumexp(-1)
            square[part] = (2 * z).logsumexp(-1) - 2 * lse[part]
            logp[part] = z.gather(-1, target[part, None])[:, 0] - lse[part]
            if isinstance(other, TopTokens):
                apart[part] = other.value(part, z.sub_(lse[part, None]), divergence)
                ref_logp[part] = other.own_M[part]
                continue
            r = other.logits(part).to(z.dtype)
            ref_lse[part] = r.logsumexp(-1)
            ref_logp[part] = r.gather(-1, target[part, None])[:, 0] - ref_lse[part]
            apart[part] = divergence.value(z.sub_(lse[part, None]), r.sub_(ref_lse[part, None]))
        ctx.save_for_backward(hidden, weight, bias, target, lse, ref_lse)
        ctx.mark_non_differentiable(square, ref_logp)
        return logp, square, apart, ref_logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_logp, _, g_apart, _ = grads
        hidden, weight, bias, target, lse, ref_lse = ctx.saved_tensors
        gradients = HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for part in tiles(len(target), weight.shape[0], hidden.device):
            z = transformed(head_logits(hidden[part], weight, bias), ctx.scale, ctx.softcap)
            logp, ref = z - lse[part, None], None
            if isinstance(ctx.other, Distributions):
                ref = ctx.other.logits(part).to(z.dtype).sub_(ref_lse[part, None])
            # d logp / dz is one-hot - p.
            if ref is not None and ctx.divergence.kind == "forward":  # p - ref: one product less
                slope = logp.exp_().mul_((g_apart[part] - g_logp[part])[:, None])
                other = ref.exp_().mul_(g_apart[part, None])
            else:
                other = ctx.other.slope(part, logp, ctx.divergence) if ref is None else ctx.divergence.slope(logp, ref)
                other.mul_(-g_apart[part, None])
                slope = logp.exp_().mul_(-g_logp[part, None])
            slope[torch.arange(len(z), device=z.device), target[part]] += g_logp[part]
            slope.sub_(other)
            if ctx.softcap is not None:
                slope *= 1 - (z / ctx.softcap) ** 2
            gradients.add(part, _narrowed(slope.mul_(ctx.scale), hidden.dtype))
        return *gradients.rounded(), *(None,) * 5


class HeadGradients:
    """Gradients of hidden states, head weight and bias, summed over tiles in float32 or wider."""

    def __init__(self, wanted: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._hidden, self._weight, self._weight_trains = hidden, weight, wanted[1]
        wide = wide_dtype(weight.dtype)
        self._grad_h = torch.empty_like(hidden) if wanted[0] else None
        self._grad_w: Tensor | None = None
        self._grad_b = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None

    def add(self, part: slice, slope: Tensor) -> None:
        """Add a tile, of which ``slope`` [rows, V] is the gradient with respect to h W^T + b."""
        if self._grad_h is not None:
            self._grad_h[part] = slope @ self._weight
        if self._weight_trains:
            hidden = self._hidden[part]
            if self._grad_w is None:
                self._grad_w = (slope.t() @ hidden).to(wide_dtype(slope.dtype))
            elif slope.dtype == self._grad_w.dtype:
                self._grad_w.addmm_(slope.t(), hidden)
            else:
                self._grad_w.add_(slope.t() @ hidden)
        if self._grad_b is not None:
            self._grad_b += slope.sum(0, dtype=self._grad_b.dtype)

    def rounded(self) -> tuple[Tensor | None, ...]:
        """The three gradients in the dtypes of their tensors; None for those not wanted."""
        dtype = self._weight.dtype
        return self._grad_h, *(None if g is None else g.to(dtype) for g in (self._grad_w, self._grad_b))


def _narrowed(slope: Tensor, dtype: torch.dtype) -> Tensor:
    """A tile [rows, V] in ``dtype``."""
    if kind_of(slope.device) == "cuda" and slope.shape[1] % 8:
        return aligned(slope.shape[0], slope.shape[1], dtype, slope.device).copy_(slope)
    return slope.to(dtype)


def _slope(z: Tensor, lse: Tensor, target: Tensor, scale: float, softcap: float | None) -> Tensor:
    """d logp / d (h W^T + b) of a tile, [rows, V]: (one-hot - p) times the derivatives of soft-cap and scale."""
    slope = torch.exp(z - lse[:, None]).neg_()
    slope[torch.arange(len(z), device=z.device), target] += 1
    if softcap is not None:
        slope *= 1 - (z / softcap) ** 2
    return slope.mul_(scale) if scale != 1.0 else slope
