"""Losses on pairs that sort the whole global batch, or use statistics of it.

Columns are [P], one entry per pair of the *global* batch, see :data:`prefopt.losses.declare.INPUTS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.common import BETA, SMOOTHING, LossOutput, Target, logistic, loss_option, pair_output
from prefopt.losses.declare import loss

BETA_FLOOR = 1e-3


@loss(
    formula="-log sigmoid(beta d(i)), d = sorted(log pi(w) - log pi(l)) - sorted(log ref(w) - log ref(l))",
    paper="Melnyk et al. 2024 (AOT, paired), arXiv 2406.05882",
    when="Margins should exceed the reference's as a distribution, quantile by quantile, not pair by pair.",
    options=(BETA, SMOOTHING),
    whole_batch=True,
    per_row=False,
)
def aot(logp_2P: Tensor, ref_logp_2P: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """Alignment via optimal transport on paired data, Melnyk et al. 2024 (arXiv 2406.05882).

    The margins of policy and of reference are sorted over the batch; the loss is logistic on the differences of equal
    rank.
    """
    policy, reference = (torch.sort(logp[0] - logp[1]).values for logp in (logp_2P, ref_logp_2P))
    numerator = logistic(beta * (policy - reference), label_smoothing)
    return pair_output(numerator, *(beta * (logp_2P - ref_logp_2P)), *logp_2P)


@loss(
    formula="-log sigmoid(beta d(i)), d = sorted(s(w)) - sorted(s(l))",
    paper="Melnyk et al. 2024 (AOT, unpaired), arXiv 2406.05882",
    when="Chosen and rejected responses do not belong together, or pairs say little: distributions are compared.",
    options=(SMOOTHING,),
    whole_batch=True,
    per_row=False,
)
def aot_unpaired(chosen_reward_P: Tensor, rejected_reward_P: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Alignment via optimal transport on unpaired data, Melnyk et al. 2024 (arXiv 2406.05882).

    The log-ratios of chosen and of rejected responses are sorted over the batch, each by itself; the loss is logistic
    on the differences of equal rank.
    """
    return logistic(torch.sort(chosen_reward_P).values - torch.sort(rejected_reward_P).values, label_smoothing)


@loss(
    formula="-log sigmoid(r(w) - delta) - log sigmoid(-(r(l) - delta)), r = beta s, delta the mean reward so far",
    paper="Jung et al. 2024 (BCO), arXiv 2404.04656",
    when="A classifier of good and bad responses: an upper bound of DPO's loss that the shift makes tight.",
    options=(
        loss_option("shift", "subtract delta; false: delta is 0, as in TRL's bco_pair"),
        loss_option(
            "decay",
            "weight of earlier batches in the running mean: 1 counts all alike (TRL's BCO trainer), 0 only this one",
            at_least=0,
            at_most=1,
            only=("shift", True),
        ),
    ),
    whole_batch=True,
    state0={"mean": 0.0, "count": 0.0},
)
def bco(
    reward_2P: Tensor, logp_2P: Tensor, *, shift: bool = True, decay: float = 1.0, state: dict[str, Tensor]
) -> LossOutput:
    r"""Binary classifier optimisation, Jung et al. 2024 (arXiv 2404.04656).

    Delta, without gradient, is the mean reward of all responses, chosen and rejected, this batch included; sources
    differ on the batches of the mean, and some code has no delta: ``decay`` and ``shift``. ``state`` holds the mean and
    its number of rewards. For thumbs up and down without pairs there is ``bco_unpaired``.
    """
    chosen, rejected = reward_2P
    rewards = reward_2P.detach().flatten().to(state["mean"].dtype)
    count = decay * state["count"] + len(rewards)
    mean = state["mean"] + (rewards.sum() - len(rewards) * state["mean"]) / count
    delta = mean.to(chosen.dtype) if shift else torch.zeros_like(mean, dtype=chosen.dtype)
    numerator = -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
    new = {"mean": mean, "count": count}
    return pair_output(numerator, *reward_2P, *logp_2P, state=new, metrics={"delta": delta.expand_as(numerator)})


@loss(
    formula="-log sigmoid(b h), b = beta (1 + alpha (mean h of the batch - running mean of h))",
    paper="Wu et al. 2024 (beta-DPO), arXiv 2407.08639",
    when="Pairs of mixed quality: batches with wide margins stay closer to the reference, outliers are left out.",
    options=(
        BETA,
        loss_option("alpha", "how strongly beta follows the mean of h in the batch", at_least=0),
        loss_option("momentum", "momentum of the running mean", at_least=0, below=1),
        loss_option("keep", "fraction of the pairs that count", above=0, at_most=1),
        loss_option(
            "filter",
            "pairs that count. nearest: those with h nearest to the running mean; drawn: sampled, with probabilities of"
            " a Gaussian of the running deviation around it (the authors' code)",
            choices=("nearest", "drawn"),
        ),
    ),
    whole_batch=True,
    state0={"mean": 0.0, "deviation": 0.0, "batches": 0.0},
    notes="beta moves with the batch and carries no gradient: the loss itself need not fall while margins grow.",
)
def beta_dpo(
    log_ratio_2P: Tensor,
    logp_2P: Tensor,
    target_P: Target,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
    keep: float = 0.8,
    filter: str = "nearest",
    state: dict[str, Tensor],
) -> LossOutput:
    r"""DPO with a beta per batch, Wu et al. 2024 (arXiv 2407.08639).

    :math:`m \leftarrow \mu m + (1-\mu)\overline h`, then :math:`b = \beta(1 + \alpha(\overline h_{kept} - m))`, at
    least 0.001 and without gradient, and :math:`-\log\sigma(b h)` over the kept pairs; the others have weight 0. Pairs
    with equal h are kept or left out together, so that the first step, where all h are 0, uses the whole batch.

    Sources differ in two places. The paper measures :math:`\beta h`, its code h, as here: alpha of the paper is
    alpha / beta here. The code draws the pairs that count without replacement, with probabilities proportional to
    :math:`e^{-(h-m)^2/2v^2}`, v the running deviation of h (``drawn``); ``nearest`` takes the most likely ones, so that
    the result is deterministic. A draw depends only on the number of batches so far, so that a resumed run draws the
    same. ``state`` holds m, v and the number of batches.
    """
    difference = log_ratio_2P[0] - log_ratio_2P[1]
    seen = difference.detach().to(state["mean"].dtype)
    mean = momentum * state["mean"] + (1 - momentum) * seen.mean()
    spread = seen.std() if len(seen) > 1 else torch.zeros_like(mean)
    deviation = momentum * state["deviation"] + (1 - momentum) * spread
    count = max(1, int(keep * len(seen) + 1e-9))
    far = (seen - mean).abs() if filter == "nearest" else _draw(seen, mean, deviation, state["batches"])
    # All that are as near as the last kept one count: in the first step of a run all h are 0, and none is an outlier.
    kept = far <= torch.kthvalue(far, count).values
    weight = kept.to(difference.dtype)
    used = (beta * (1 + alpha * ((seen * kept).sum() / kept.sum() - mean))).clamp(min=BETA_FLOOR).to(difference.dtype)
    numerator = weight * logistic(used * difference, label=target_P)
    rewards = beta * log_ratio_2P
    metrics = {"beta": used.expand_as(weight), "kept": weight}
    new = {"mean": mean, "deviation": deviation, "batches": state["batches"] + 1}
    return pair_output(numerator, *rewards, *logp_2P, weight_P=weight, state=new, metrics=metrics)


def _draw(seen: Tensor, mean: Tensor, deviation: Tensor, batches: Tensor) -> Tensor:
    """Numbers [P] whose k smallest are a draw of k pairs without replacement, with the Gaussian's probabilities.

    This is the Gumbel top-k trick, in log space, where a narrow Gaussian has no probability of exactly zero. The noise
    depends on the rank, so that the order of a batch does not matter.
    """
    rank = torch.argsort(torch.argsort(seen))
    chance = _hashed(rank * 0x9E3779B9 + _hashed(batches.long() + 1)).to(seen.dtype) + 0.5
    gumbel = -torch.log(-torch.log((chance / 2**32).clamp(max=1 - 1e-7)))
    return 0.5 * ((seen - mean) / deviation.clamp(min=1e-6)) ** 2 - gumbel


def _hashed(x: Tensor) -> Tensor:
    """Pseudo-random whole numbers [...] below 2^32, the same for the same int64 ``x`` on any device.

    A random generator's state would have to be synchronised with the device.
    """
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
