"""What losses share: the metrics that every loss on pairs gives, under the names that dashboards know, and options."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prefopt.losses.declare import LossOption, LossOutput

BETA = LossOption(name="beta", help="strength of the pull to the reference; 0.01 to 0.5 is usual", above=0)
SMOOTHING = LossOption(
    name="label_smoothing", help="assumed part of labels that are wrong (conservative DPO)", at_least=0, below=0.5
)


NLL_WEIGHT = LossOption(name="nll_weight", help="weight of the chosen response's negative log-likelihood", at_least=0)


def pair_output(
    numerator_G: torch.Tensor,
    chosen_reward_G: torch.Tensor,
    rejected_reward_G: torch.Tensor,
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
    *,
    weight_G: torch.Tensor | None = None,
    state: dict[str, torch.Tensor] | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
) -> LossOutput:
    """The output of a loss on pairs, each of weight 1 unless told, with rewards as the loss implies them.

    Metrics carry no gradients. A tie is half right: equal responses under an untrained policy give an accuracy of 0.5,
    not 0. ``more`` are further metrics.
    """
    margin = chosen_reward_G.detach() - rejected_reward_G.detach()
    metrics = {
        "rewards/chosen": chosen_reward_G.detach(),
        "rewards/rejected": rejected_reward_G.detach(),
        "rewards/margins": margin,
        "rewards/accuracies": right(margin),
        "logps/chosen": chosen_logp_G.detach(),
        "logps/rejected": rejected_logp_G.detach(),
    }
    metrics |= {name: value.detach() for name, value in (more or {}).items()}
    return LossOutput(numerator_G, torch.ones_like(margin) if weight_G is None else weight_G, metrics, state)


def right(margin: torch.Tensor) -> torch.Tensor:
    """1 where the margin is positive, 1/2 where it is zero, 0 below."""
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
