"""Losses on single responses that are labelled desirable or not.

Columns are [N], one entry per response, see :data:`prefopt.losses.declare.INPUTS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.common import BETA, LossOutput, accuracy, loss_option
from prefopt.losses.declare import loss

DESIRABLE = loss_option("desirable_weight", "weight of desirable responses", at_least=0)
UNDESIRABLE = loss_option("undesirable_weight", "weight of undesirable responses", at_least=0)


@loss(
    formula="lambda (1 - sigmoid(+-beta (s - z))), + where desirable, z = max(0, mean s of mismatched responses)",
    paper="Ethayarajh et al. 2024 (KTO), arXiv 2402.01306, equation 7 of version 1 (later versions have other numbers)",
    when="Thumbs up and down, without pairs. Weight the labels so that both count about the same.",
    options=(BETA, DESIRABLE, UNDESIRABLE),
    whole_batch=True,
)
def kto(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    label_N: Tensor,
    mismatched_logp_N: Tensor,
    mismatched_ref_logp_N: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    r"""Kahneman-Tversky optimisation, Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7 of version 1.

    z estimates KL(policy || reference) by the mean log-ratio over the batch of responses to other prompts, clamped at
    0, without gradient. The mean of the losses is over all responses of the batch, so that lambda_D times the number of
    desirable responses should be 1 to 4/3 times lambda_U times that of undesirable ones (equation 8 of version 1; TRL's
    bounds too). Versions from the second on write the same loss as :math:`\lambda_y - v(x, y)`.
    """
    reward = beta * (logp_N - ref_logp_N)
    z = beta * (mismatched_logp_N - mismatched_ref_logp_N).detach().mean().clamp(min=0)
    sign, weight = _sign_and_weight(label_N, reward.dtype, desirable_weight, undesirable_weight)
    numerator = weight * torch.sigmoid(-sign * (reward - z))
    metrics = label_metrics(reward, label_N, logp_N, z)
    return LossOutput(numerator, torch.ones_like(numerator), metrics | {"kl": (z / beta).expand_as(reward)})


@loss(
    formula="lambda (1 - sigmoid(+-beta s)), + where desirable",
    paper="D'Oosterlinck et al. 2024 (APO), arXiv 2408.06266, equation 7, each half by itself",
    when="As kto, without its estimate of the KL: no mismatched responses are needed.",
    options=(BETA, DESIRABLE, UNDESIRABLE),
)
def apo_zero_unpaired(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    label_N: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    r"""Anchored preference optimisation, zero, on labels: :math:`\lambda_y(1 - \sigma(\pm\beta s))`; kto with z = 0.

    The two halves of equation 7 of D'Oosterlinck et al. 2024 (arXiv 2408.06266), as TRL offers them.
    """
    reward = beta * (logp_N - ref_logp_N)
    sign, weight = _sign_and_weight(label_N, reward.dtype, desirable_weight, undesirable_weight)
    numerator = weight * torch.sigmoid(-sign * reward)
    return LossOutput(numerator, torch.ones_like(numerator), label_metrics(reward, label_N, logp_N, 0.0))


@loss(
    formula="-lambda log sigmoid(+-(r - delta)), + where desirable, r = beta s, delta between the two labels' means",
    paper="Jung et al. 2024 (BCO), arXiv 2404.04656",
    when="Thumbs up and down, as a classifier of good and bad responses: no mismatched responses are needed.",
    options=(
        BETA,
        DESIRABLE,
        UNDESIRABLE,
        loss_option("shift", "subtract delta; false: delta is 0"),
        loss_option(
            "middle",
            "delta. labels: half the mean reward of desirable responses plus half that of undesirable ones (the paper);"
            " responses: the mean over all responses (TRL's BCO trainer), nearer to that of the larger class",
            choices=("labels", "responses"),
            only=("shift", True),
        ),
        loss_option(
            "decay",
            "weight of earlier batches in the running means: 1 counts all alike, 0 only this one",
            at_least=0,
            at_most=1,
            only=("shift", True),
        ),
    ),
    whole_batch=True,
    state0={"desirable": 0.0, "desirable_count": 0.0, "undesirable": 0.0, "undesirable_count": 0.0},
)
def bco_unpaired(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    label_N: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    shift: bool = True,
    middle: str = "labels",
    decay: float = 1.0,
    state: dict[str, Tensor],
) -> LossOutput:
    r"""Binary classifier optimisation on labels, Jung et al. 2024 (arXiv 2404.04656).

    Delta, without gradient, is between the mean rewards of both labels (``middle``), this batch included. The mean of
    the losses is over all responses, as in TRL; the paper's mean per label results from weights in inverse proportion
    to the number of responses of a label. ``state`` holds the mean of each label and its number of rewards.

    Not implemented: the distribution matching of the paper's first version, which weights undesirable rows by how
    likely their prompt is rated desirable, from a classifier on prompt embeddings. Its later version drops it.
    """
    reward = beta * (logp_N - ref_logp_N)
    new: dict[str, Tensor] = {}
    for side, mask in (("desirable", label_N), ("undesirable", ~label_N)):
        rewards = reward.detach().to(state[side].dtype) * mask
        count = decay * state[f"{side}_count"] + mask.sum()
        moved = rewards.sum() - mask.sum() * state[side]
        new |= {side: state[side] + moved / count.clamp(min=1), f"{side}_count": count}
    counts = torch.stack([new["desirable_count"], new["undesirable_count"]])
    share = counts if middle == "responses" else (counts > 0).to(counts.dtype)  # an unseen label has no mean
    mean = (share * torch.stack([new["desirable"], new["undesirable"]])).sum() / share.sum()
    delta = mean.to(reward.dtype) if shift else torch.zeros_like(mean, dtype=reward.dtype)
    sign, weight = _sign_and_weight(label_N, reward.dtype, desirable_weight, undesirable_weight)
    numerator = -weight * F.logsigmoid(sign * (reward - delta))
    metrics = label_metrics(reward, label_N, logp_N, delta) | {"delta": delta.expand_as(reward)}
    return LossOutput(numerator, torch.ones_like(numerator), metrics, new)


def _sign_and_weight(
    label_N: Tensor, dtype: torch.dtype, desirable_weight: float, undesirable_weight: float
) -> tuple[Tensor, Tensor]:
    """1 or -1 of each response, and its weight."""
    desirable = label_N.to(dtype)
    return 2 * desirable - 1, desirable * desirable_weight + (1 - desirable) * undesirable_weight


def label_metrics(reward_N: Tensor, label_N: Tensor, logp_N: Tensor, anchor: Tensor | float) -> dict[str, Tensor]:
    """Rewards and log-probabilities by label, NaN in the entries of the other; accuracy: on the label's side of anchor.

    ``rewards/margins`` is not averaged over responses: it is the difference of the means, the same in every entry.
    """
    reward, logp, nothing = reward_N.detach(), logp_N.detach(), torch.full_like(reward_N.detach(), torch.nan)
    sides = {"chosen": label_N, "rejected": ~label_N}
    rewards = {f"rewards/{name}": torch.where(mask, reward, nothing) for name, mask in sides.items()}
    margin = rewards["rewards/chosen"].nanmean() - rewards["rewards/rejected"].nanmean()
    sign = 2 * label_N.to(reward.dtype) - 1
    return (
        rewards
        | {"rewards/margins": margin.expand_as(reward), "rewards/accuracies": accuracy(sign * (reward - anchor))}
        | {f"logps/{name}": torch.where(mask, logp, nothing) for name, mask in sides.items()}
    )
