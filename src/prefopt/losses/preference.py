"""Losses on pairs: pure functions from log-probabilities to numerators, weights and metrics.

They read no configuration and know no model. A loop divides the sum of the numerators by the sum of the weights of
the whole global batch, so that micro-batches never change the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class LossOutput(NamedTuple):
    """``numerator_G`` and ``weight_G`` (constant with respect to the policy), and metrics [G] to be averaged."""

    numerator_G: torch.Tensor
    weight_G: torch.Tensor
    metrics: dict[str, torch.Tensor]


def dpo(
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
    chosen_ref_logp_G: torch.Tensor,
    rejected_ref_logp_G: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    r"""Direct Preference Optimization, Rafailov et al. 2023 (arXiv 2305.18290), equation 7.

    Arguments are sums of log-probabilities over the response tokens, [G], natural logarithm. With
    :math:`h = (\log\pi_w - \log\mathrm{ref}_w) - (\log\pi_l - \log\mathrm{ref}_l)` the loss of a pair is
    :math:`-\log\sigma(\beta h)`.

    ``label_smoothing`` e, in [0, 0.5), assumes that this part of the labels is flipped (conservative DPO, Mitchell
    2023): :math:`-(1-e)\log\sigma(\beta h) - e\log\sigma(-\beta h)`, least where :math:`\sigma(\beta h) = 1-e`.

    Needs the reference; separable over pairs; every pair weighs 1.
    """
    chosen_reward = beta * (chosen_logp_G - chosen_ref_logp_G)
    rejected_reward = beta * (rejected_logp_G - rejected_ref_logp_G)
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-margin)
    with torch.no_grad():
        # A tie is half right: equal responses under an untrained policy give an accuracy of 0.5, not 0.
        accuracy = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
        metrics = {
            "rewards/chosen": chosen_reward.detach(),
            "rewards/rejected": rejected_reward.detach(),
            "rewards/margins": margin.detach(),
            "rewards/accuracies": accuracy,
            "logps/chosen": chosen_logp_G.detach(),
            "logps/rejected": rejected_logp_G.detach(),
        }
    return LossOutput(loss, torch.ones_like(loss), metrics)
