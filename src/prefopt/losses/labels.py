"""Losses on single responses that are labelled desirable or not.

Tensors are [N], one entry per response, as :data:`prefopt.losses.declare.INPUTS` describes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prefopt.losses.common import BETA, right
from prefopt.losses.declare import LOSSES, LossOption, LossOutput, loss

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
    desirable ones should be 1 to 4/3 times that of the others (equation 8).
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


@loss(
    kind="labels",
    formula="-lambda log sigmoid(+-(r - delta)), + where desirable, r = beta s, delta between the two labels' means",
    paper="Jung et al. 2024 (BCO), arXiv 2404.04656",
    when="Thumbs up and down, as a classifier of good and bad: no mismatched responses are scored, as kto does.",
    options=(
        BETA,
        DESIRABLE,
        UNDESIRABLE,
        LossOption(name="shift", help="subtract delta; false takes 0"),
        LossOption(
            name="middle",
            help="what delta is. labels: half of the mean reward of desirable responses plus half of that of the others"
            " (the paper); responses: the mean over all of them (TRL's BCO trainer), nearer the larger side",
            choices=("labels", "responses"),
            only=("shift", True),
        ),
        LossOption(
            name="decay",
            help="what the means remember: 1 all batches alike, 0 this batch alone, between them older batches less and"
            " less",
            at_least=0,
            at_most=1,
            only=("shift", True),
        ),
    ),
    whole_batch=True,
    state0={"desirable": 0.0, "desirable_count": 0.0, "undesirable": 0.0, "undesirable_count": 0.0},
)
def bco_unpaired(
    logp_N: torch.Tensor,
    ref_logp_N: torch.Tensor,
    label_N: torch.Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    shift: bool = True,
    middle: str = "labels",
    decay: float = 1.0,
    state: dict[str, torch.Tensor] | None = None,
) -> LossOutput:
    r"""Binary classifier optimisation on labels, Jung et al. 2024 (arXiv 2404.04656).

    :math:`-\lambda_y\log\sigma(\pm(r - \delta))`, :math:`r = \beta s`, plus for desirable responses. Delta, without
    gradient, is between the mean rewards of both labels (``middle``), this batch included. The mean of the losses is
    over all responses, as in TRL; the paper takes each label's own, which weights in inverse proportion to the number
    of responses of a label give. ``state`` holds the mean of each label and how many rewards it stands for.

    What is not done: the first version of the paper multiplies undesirable rows by the ratio of the chances that a
    prompt like theirs is rated desirable or not, told from embeddings of prompts by another model and a classifier
    fitted to the data (distribution matching). The paper leaves both open, and its later version leaves it out; rows
    can be weighed by ``undesirable_weight``, all alike.
    """
    reward = beta * (logp_N - ref_logp_N)
    state = state or LOSSES["bco_unpaired"].start(reward.device)
    assert state is not None
    new: dict[str, torch.Tensor] = {}
    for side, mask in (("desirable", label_N), ("undesirable", ~label_N)):
        rewards = reward.detach().to(state[side].dtype) * mask
        count = decay * state[f"{side}_count"] + mask.sum()
        moved = rewards.sum() - mask.sum() * state[side]
        new |= {side: state[side] + moved / count.clamp(min=1), f"{side}_count": count}
    counts = torch.stack([new["desirable_count"], new["undesirable_count"]])
    share = counts if middle == "responses" else (counts > 0).to(counts.dtype)  # a label never seen has no mean
    mean = (share * torch.stack([new["desirable"], new["undesirable"]])).sum() / share.sum()
    delta = mean.to(reward.dtype) if shift else torch.zeros_like(mean, dtype=reward.dtype)
    wanted = label_N.to(reward.dtype)
    sign, weight = 2 * wanted - 1, wanted * desirable_weight + (1 - wanted) * undesirable_weight
    numerator = -weight * F.logsigmoid(sign * (reward - delta))
    metrics = label_metrics(reward, label_N, logp_N, delta) | {"delta": delta.expand_as(reward)}
    return LossOutput(numerator, torch.ones_like(numerator), metrics, new)


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
