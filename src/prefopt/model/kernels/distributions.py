"""Next-token distributions of two models compared at every scored token, in tiles of logits.

Beside a token's log-probability (:mod:`prefopt.model.kernels.head`), with z the policy's logits and r the reference's::

    kl     = sum over v of ref(v) (log ref(v) - log pi(v)),   ref = softmax(r), pi = softmax(z)
    square = log of the sum over v of pi(v)^2 = logsumexp(2 z) - 2 logsumexp(z)

The gradient of kl with respect to z is pi - ref. Nothing [M, V] is kept: backward computes the tiles again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefopt.model.kernels.head import HeadGradients, head_logits, tiles, transformed, wide_dtype


@dataclass(frozen=True, slots=True)
class Distributions:
    """A model's next-token distributions at M positions, computed when needed.

    ``logits`` maps a slice of the positions to [rows, V], float32 or wider, without gradients.
    """

    vocabulary: int
    logits: Callable[[slice], Tensor]


class TokenScores(NamedTuple):
    """What a forward pass computes for M tokens. ``kl_M`` and ``other_logp_M`` with distributions to compare with;
    ``square_M`` (log of the sum of squared probabilities, without gradient), ``distributions`` and ``hidden_M`` [M, H]
    where requested."""

    logp_M: Tensor
    square_M: Tensor | None = None
    kl_M: Tensor | None = None
    other_logp_M: Tensor | None = None
    distributions: Distributions | None = None
    hidden_M: Tensor | None = None


def head_scores(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    other: Distributions,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """Scores of hidden [M, H] under a head weight [V, H], compared with ``other``; target [M], bias [V]."""
    found = _HeadScores.apply(hidden, weight, bias, target, scale, softcap, other)  # type: ignore[no-untyped-call]
    return TokenScores(*found)


def logit_scores(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, other: Distributions
) -> TokenScores:
    """The same by any other head: ``logits`` maps hidden [rows, H] to [rows, V], in checkpointed tiles."""

    def tile(h: Tensor, y: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        z, r = logits(h), other.logits(slice(int(first), int(first) + len(y)))
        logp, ref = z.log_softmax(-1), r.log_softmax(-1)
        square = (2 * logp.detach()).logsumexp(-1)
        kl = (ref.exp() * (ref - logp)).sum(-1)
        return logp.gather(-1, y[:, None])[:, 0], square, kl, ref.gather(-1, y[:, None])[:, 0]

    done = [
        checkpoint(tile, hidden[rows], target[rows], torch.tensor(rows.start), use_reentrant=False)
        for rows in tiles(len(target), other.vocabulary, hidden.device)
    ]
    logp, square, kl, ref = (torch.cat(parts) for parts in zip(*done, strict=True))
    return TokenScores(logp, square, kl, ref)


def squares(logits: Callable[[Tensor], Tensor], hidden: Tensor, vocabulary: int) -> Tensor:
    """Log of the sum of squared probabilities [M], without gradient."""
    with torch.no_grad():
        parts = [
            (2 * logits(hidden[rows]).log_softmax(-1)).logsumexp(-1)
            for rows in tiles(len(hidden), vocabulary, hidden.device)
        ]
    return torch.cat(parts)


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
        other: Distributions,
    ) -> tuple[Tensor, ...]:
        ctx.scale, ctx.softcap, ctx.other = scale, softcap, other
        logp = hidden.new_empty(len(target), dtype=wide_dtype(hidden.dtype))
        square, kl, ref_logp, lse, ref_lse = (torch.empty_like(logp) for _ in range(5))
        for part in tiles(len(target), weight.shape[0], hidden.device):
            z = transformed(head_logits(hidden[part], weight, bias), scale, softcap)
            r = other.logits(part).to(z.dtype)
            lse[part], ref_lse[part] = z.logsumexp(-1), r.logsumexp(-1)
            square[part] = (2 * z).logsumexp(-1) - 2 * lse[part]
            logp[part] = z.gather(-1, target[part, None])[:, 0] - lse[part]
            ref_logp[part] = r.gather(-1, target[part, None])[:, 0] - ref_lse[part]
            r.sub_(ref_lse[part, None])
            kl[part] = (r.exp() * (r - z.sub_(lse[part, None]))).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, target, lse, ref_lse)
        ctx.mark_non_differentiable(square, ref_logp)
        return logp, square, kl, ref_logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_logp, _, g_kl, _ = grads
        hidden, weight, bias, target, lse, ref_lse = ctx.saved_tensors
        gradients = HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for part in tiles(len(target), weight.shape[0], hidden.device):
            z = transformed(head_logits(hidden[part], weight, bias), ctx.scale, ctx.softcap)
            r = ctx.other.logits(part).to(z.dtype)
            # d logp / dz is one-hot - pi, d kl / dz is pi - ref.
            slope = torch.exp(z - lse[part, None]).mul_((g_kl[part] - g_logp[part])[:, None])
            slope[torch.arange(len(z), device=z.device), target[part]] += g_logp[part]
            slope.sub_(r.sub_(ref_lse[part, None]).exp_().mul_(g_kl[part, None]))
            if ctx.softcap is not None:
                slope *= 1 - (z / ctx.softcap) ** 2
            gradients.add(part, slope.mul_(ctx.scale).to(hidden.dtype))
        return *gradients.rounded(), *(None,) * 4
