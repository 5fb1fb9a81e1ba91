"""Losses on single responses that are labelled desirable or not.

Tensors are [N], one entry per response, as :data:`prefopt.losses.declare.INPUTS` describes them.
"""

from __future__ import annotations

import torch

from prefopt.losses.declare import LossOption, LossOutput, loss
from prefopt.losses.metrics import BETA, right

DESIRABLE = LossOption(name="desirable_weight", help="weight of desirable responses", at_least=0)
UNDESIRABLE = LossOption(name="undesirable_weight", help="weight of undesirable responses", at_least=0)


@loss(
    kind="labels",
    formula="lambda (1 - sigmoid(+-beta (s - z))), + where desirable, z = max(0, mean s of mismatched responses)",
    paper="Ethayarajh et al. 2024 (KTO), arXiv 2402.01306, equation 7",
    when="Thumbs up and down, with no pairs. Weigh the labels so that both sides count about the same.",
    options=(BETA, DESIRABLE, UNDESIRABLE),
    whole_batch=True,
)
def kto(
    logp_N: torch.Tensor,
    ref_logp_N: torch.Tensor,
    label_N: torch.Tensor,
    mismatched_logp_N: torch.Tensor,
    mismatched_ref_logp_N: torch.Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    r"""Kahneman-Tversky optimisation, Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7.

    :math:`\lambda_y - \lambda_y\sigma(\pm\beta(s - z))`, plus for desirable responses. z estimates KL(policy ||
    reference) by the mean log-ratio over the batch of responses to other prompts, clamped at 0, without gradient. The
    mean of the losses is over all responses of the batch, whatever their label, so that lambda_D times the number of
    desirable ones should be 1 to 4/3 times that of the others (section 4.2).
    """
    reward = beta * (logp_N - ref_logp_N)
    z = beta * (mismatched_logp_N - mismatched_ref_logp_N).detach().mean().clamp(min=0)
    wanted = label_N.to(reward.dtype)
    sign, weight = 2 * wanted - 1, wanted * desirable_weight + (1 - wanted) * undesirable_weight
    numerator = weight * torch.sigmoid(-sign * (reward - z))
    metrics = label_metrics(reward, label_N, logp_N, z)
    return LossOutput(numerator, torch.ones_like(numerator), metrics | {"kl": (z / beta).expand_as(reward)})


@loss(
    kind="labels",
    formula="lambda (1 - sigmoid(+-beta s)), + where desirable",
    paper="D'Oosterlinck et al. 2024 (APO), arXiv 2408.06266, equation 7, each side by itself",
    when="As kto, without its estimate of the divergence: no mismatched responses are scored.",
    options=(BETA, DESIRABLE, UNDESIRABLE),
)
def apo_zero_unpaired(
    logp_N: torch.Tensor,
    ref_logp_N: torch.Tensor,
    label_N: torch.Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    r"""Anchored preference optimisation, zero, on labels: :math:`\lambda_y(1 - \sigma(\pm\beta s))`; kto with z = 0.

    The two halves of equation 7 of D'Oosterlinck et al. 2024 (arXiv 2408.06266), as TRL offers them.
    """
    reward = beta * (logp_N - ref_logp_N)
    wanted = label_N.to(reward.dtype)
    sign, weight = 2 * wanted - 1, wanted * desirable_weight + (1 - wanted) * undesirable_weight
    numerator = weight * torch.sigmoid(-sign * reward)
    return LossOutput(numerator, torch.ones_like(numerator), label_metrics(reward, label_N, logp_N, 0.0))


def label_metrics(
    reward_N: torch.Tensor, label_N: torch.Tensor, logp_N: torch.Tensor, anchor: torch.Tensor | float
) -> dict[str, torch.Tensor]:
    """Rewards and log-probabilities by label, NaN in the entries of the other; accuracy: on the label's side of z.

    ``rewards/margins`` is no mean over responses: it is the difference of the means, the same in every entry.
    """
    reward, logp, nothing = reward_N.detach(), logp_N.detach(), torch.full_like(reward_N.detach(), torch.nan)
    sides = {"chosen": label_N, "rejected": ~label_N}
    rewards = {f"rewards/{name}": torch.where(mask, reward, nothing) for name, mask in sides.items()}
    margin = rewards["rewards/chosen"].nanmean() - rewards["rewards/rejected"].nanmean()
    sign = 2 * label_N.to(reward.dtype) - 1
    return (
        rewards
        | {"rewards/margins": margin.expand_as(reward), "rewards/accuracies": right(sign * (reward - anchor))}
        | {f"logps/{name}": torch.where(mask, logp, nothing) for name, mask in sides.items()}
    )
