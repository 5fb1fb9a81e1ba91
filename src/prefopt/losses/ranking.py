"""The Plackett-Luce loss on rankings of K responses, with ties.

Columns are [N], one entry per response, those of a group together, see :data:`prefopt.losses.declare.INPUTS`; the
output is [G], one entry per group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.common import BETA, DIVERGENCE, LossOutput, accuracy, implied, log1m_exp
from prefopt.losses.declare import loss
from prefopt.transfer import on_device


@dataclass(frozen=True, slots=True)
class Stage:
    """One tier of one group that is chosen before others: positions of its responses, and of all later ones."""

    group: int
    tier: tuple[int, ...]
    later: tuple[int, ...]


def stages(tier_N: Sequence[int], group_N: Sequence[int]) -> Iterator[Stage]:
    """The stages of every group, best tier first; the last tier of a group is no stage: nothing comes after it."""
    for group, run in itertools.groupby(range(len(group_N)), key=lambda i: group_N[i]):
        positions = list(run)
        for level in sorted({tier_N[i] for i in positions})[:-1]:
            tier = tuple(i for i in positions if tier_N[i] == level)
            yield Stage(group, tier, tuple(i for i in positions if tier_N[i] > level))


@loss(
    formula="-sum over tiers of log P(this tier before all later ones), P by Plackett-Luce with rewards beta s",
    paper="Rafailov et al. 2023, arXiv 2305.18290, appendix A.3; ties by the marginal over their orders",
    when="Rankings or scores of three and more responses: a loss on the order, not on pairs. dpo for K = 2.",
    options=(BETA, *DIVERGENCE),
    notes="The last tier adds nothing: a top-k list fits.",
)
def plackett_luce(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    tier_N: Tensor,
    group_N: Tensor,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""DPO on rankings, Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3.

    With rewards :math:`r = \beta s`, responses are drawn one by one without replacement, each with probability
    proportional to :math:`e^r`; without ties the loss is :math:`-\sum_k [r_{(k)} - \log\sum_{j\ge k}e^{r_{(j)}}]`.

    Responses of one tier are tied: their order is unknown, and the probability is the sum over all orders, exact for
    any number of them. With :math:`\lambda_i = e^{r_i}` of the tied and :math:`\Lambda` the sum over all later
    responses, it is :math:`\int_0^1 \prod_i (1 - u^{\lambda_i/\Lambda})\,du`: draws without replacement come in the
    order of independent exponential times with rates :math:`\lambda`, and u is the chance that all later ones take
    longer. The orders within the last tier sum to 1: with all other responses in a last tier, a top-k list has its
    marginal probability.

    ``tier_N`` and ``group_N`` are read on the CPU: leave them there. A group of one tier has weight 0. The accuracy of
    a group is that of its ordered pairs.
    """
    reward = beta * implied(logp_N - ref_logp_N, divergence, divergence_alpha)
    tiers, groups = tier_N.tolist(), group_N.tolist()
    found = list(stages(tiers, groups))
    sizes = sorted({len(s.tier) for s in found})
    same = [[s for s in found if len(s.tier) == tied] for tied in sizes]
    arrays = [array for some in same for array in _stage_places(some)]
    arrays += [_whole(sorted({s.group for s in found})), *_metric_places(found)]
    places = iter(on_device(arrays, reward.device))
    numerator = reward.new_zeros(groups[-1] + 1)
    for _ in sizes:
        tier_SD, later_SL, absent_SL, group_S = (next(places) for _ in range(4))
        total = reward[later_SL].masked_fill(absent_SL, -math.inf).logsumexp(1)
        probability = _all_before(reward[tier_SD] - total[:, None])
        numerator = numerator.index_add(0, group_S, -probability)
    weight = torch.zeros_like(numerator.detach()).index_fill(0, next(places), 1.0)
    return LossOutput(numerator, weight, _metrics(reward.detach(), logp_N.detach(), [*places], len(weight)))


def _all_before(ahead_SD: Tensor) -> Tensor:
    """Log-probability [S] that D tied responses, in any order, come before all later ones; ``ahead_SD``: their rewards
    less the log-sum-exp of those of the later ones.

    One is ahead with the logistic of its value. For several the integral over u is taken in x = log(-log u), where the
    logarithm of what is integrated, x - e^x + sum over i of log(1 - exp(-e^(x + ahead_i))), is concave: its maximum
    lies between 0 and log(1 + D), and the tails fall at least like e^x and exp(-e^x). So the trapezoidal rule over a
    fixed range converges exponentially; its step is for rounding of float64, also where all of D are alike.
    """
    tied = ahead_SD.shape[1]
    if tied == 1:
        return F.logsigmoid(ahead_SD[:, 0])
    dtype = ahead_SD.dtype if ahead_SD.device.type == "mps" else torch.float64  # which mps does not have
    step = min(0.25 / math.log1p(tied), 0.7 / math.sqrt(1 + tied))
    span = torch.arange(-38.0, math.log1p(tied) + 4, step, dtype=dtype, device=ahead_SD.device)
    terms_SX = _log_taken(span + ahead_SD.to(dtype)[:, :, None]).sum(1) + span - span.exp()
    return (terms_SX.logsumexp(1) + math.log(step)).to(ahead_SD.dtype)


def _log_taken(x: Tensor) -> Tensor:
    """log(1 - exp(-e^x)), with its limits x below and 0 above."""
    return torch.where(x < -36, x, log1m_exp(-x.clamp(-36, 8).exp()))


def _whole(numbers: Sequence[object]) -> npt.NDArray[Any]:
    return np.array(numbers, np.int64)


def _stage_places(same: Sequence[Stage]) -> list[npt.NDArray[Any]]:
    """Of stages whose tiers are of one size D: responses of the tiers [S, D], all later ones [S, L], where fewer than L
    are later [S, L], and groups [S]."""
    widest = max(len(s.later) for s in same)
    later = _whole([[*s.later, *[0] * (widest - len(s.later))] for s in same])
    absent = np.arange(widest) >= np.array([len(s.later) for s in same])[:, None]
    return [_whole([s.tier for s in same]), later, absent, _whole([s.group for s in same])]


def _metric_places(found: Sequence[Stage]) -> list[npt.NDArray[Any]]:
    """Responses and groups of the best tiers, of the last tiers, and of ordered pairs (better, worse, group)."""
    best = {s.group: s.tier for s in reversed(found)}
    last = {s.group: s.later for s in found}
    sides = [(i, group) for sets in (best, last) for group, members in sets.items() for i in members]
    split = sum(map(len, best.values()))
    pairs = [(i, j, s.group) for s in found for i in s.tier for j in s.later]
    tables: list[tuple[Sequence[object], int]] = [(sides[:split], 2), (sides[split:], 2), (pairs, 3)]
    return [column for rows, width in tables for column in _whole(rows).reshape(-1, width).T]


def _metrics(reward: Tensor, logp: Tensor, places: Sequence[Tensor], groups: int) -> dict[str, Tensor]:
    """Means of the best and last tier of each group, and the accuracy of its ordered pairs; NaN without an order."""
    best, of_best, last, of_last, better, worse, of_pair = places

    def mean(values: Tensor, owner: Tensor) -> Tensor:
        zero = torch.zeros(groups, dtype=values.dtype, device=values.device)
        return zero.index_add(0, owner, values) / zero.index_add(0, owner, torch.ones_like(values))

    sides = {"chosen": (best, of_best), "rejected": (last, of_last)}
    metrics = {f"rewards/{name}": mean(reward[at], owner) for name, (at, owner) in sides.items()}
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/accuracies"] = mean(accuracy(reward[better] - reward[worse]), of_pair)
    return metrics | {f"logps/{name}": mean(logp[at], owner) for name, (at, owner) in sides.items()}
