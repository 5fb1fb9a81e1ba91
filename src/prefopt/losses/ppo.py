"""The clipped losses of PPO (Schulman et al. 2017, arXiv 1707.06347): numerators per token or per response, to be
divided by how many there are in the global minibatch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Clipped(NamedTuple):
    """``numerator`` carries the gradient; ``clipped`` is 1 where the clipped branch was the larger loss, else 0."""

    numerator: torch.Tensor
    clipped: torch.Tensor


def policy_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, clip: float) -> Clipped:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(logp - old_logp) (equation 7, as a loss).

    Of tokens for PPO; of whole responses, whose log-probabilities are sums, for RLOO. At r = 1 its gradient is that of
    -A logp: the policy gradient.
    """
    ratio = torch.exp(logp - old_logp)
    plain, held = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return Clipped(torch.maximum(plain, held), (held > plain).to(logp.dtype).detach())


def value_loss(value: torch.Tensor, old_value: torch.Tensor, target: torch.Tensor, clip: float | None) -> Clipped:
    """Half the larger of (V - R)^2 and (clip(V, V_old - clip, V_old + clip) - R)^2, as OpenAI's baselines have it.

    Without ``clip`` half of (V - R)^2.
    """
    plain = (value - target).square()
    if clip is None:
        return Clipped(0.5 * plain, torch.zeros_like(plain).detach())
    near = torch.clamp(value, old_value - clip, old_value + clip)
    held = (near - target).square()
    return Clipped(0.5 * torch.maximum(plain, held), (held > plain).to(value.dtype).detach())
