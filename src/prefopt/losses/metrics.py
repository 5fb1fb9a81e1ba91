"""The metrics that every loss on pairs gives, under the names that dashboards know, and options that many share."""

from __future__ import annotations

import torch

from prefopt.losses.declare import LossOption

BETA = LossOption(name="beta", help="strength of the pull to the reference; 0.01 to 0.5 is usual", above=0)
SMOOTHING = LossOption(
    name="label_smoothing", help="assumed part of labels that are wrong (conservative DPO)", at_least=0, below=0.5
)


@torch.no_grad()
def pair_metrics(
    chosen_reward_G: torch.Tensor,
    rejected_reward_G: torch.Tensor,
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Rewards as the loss implies them, their margin and accuracy, and log-probabilities, all [G], without gradients.

    A tie is half right: equal responses under an untrained policy give an accuracy of 0.5, not 0.
    """
    margin = chosen_reward_G.detach() - rejected_reward_G.detach()
    return {
        "rewards/chosen": chosen_reward_G.detach(),
        "rewards/rejected": rejected_reward_G.detach(),
        "rewards/margins": margin,
        "rewards/accuracies": right(margin),
        "logps/chosen": chosen_logp_G.detach(),
        "logps/rejected": rejected_logp_G.detach(),
    }


def right(margin: torch.Tensor) -> torch.Tensor:
    """1 where the margin is positive, 1/2 where it is zero, 0 below."""
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
