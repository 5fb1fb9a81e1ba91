"""Methods compared at equal KL: reward at fixed KLs, area under the frontier, and what chance alone gives.

A method that goes further gets more reward, so a single number per method says little. A curve holds the policies of
one method and one seed; between them the reward is interpolated, beyond the last it is unknown.

>>> curve = RewardCurve(np.array([[1.0], [4.0]]), np.array([[0.3], [0.5]]), np.array([0.1]))
>>> curve.reward_at([1.0, 2.25, 9.0]).tolist()
[0.3, 0.4, nan]
>>> round(curve.area(4.0), 6)
0.6
>>> permutation_test([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
0.02857142857142857
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefopt.core.statistics import Interval

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000
MOST_SPLITS = 20_000
"""Ways to deal seeds or trainings that are all counted; beyond, as many are drawn."""


@dataclass(frozen=True, slots=True)
class RewardCurve:
    """The policies S of one method and seed, on the same prompts P: ``kl_SP`` and ``reward_SP`` are means over samples.

    ``start_P`` is the reward of the reference, at a KL of 0. ``apart``: the rewards are not of those prompts but of
    others, such as the questions of a task [Q]; then ``reward_SP`` and ``start_P`` have theirs.
    """

    kl_SP: Floats
    reward_SP: Floats
    start_P: Floats
    apart: bool = False

    def reward_at(self, targets: Sequence[float]) -> Floats:
        """The reward at KLs ``targets``, NaN beyond the curve's largest."""
        start = float(self.start_P.mean())
        found: Floats = interpolated(self.kl_SP.mean(1)[None], self.reward_SP.mean(1)[None], start, targets)[0]
        return found

    def area(self, limit: float) -> float:
        """See :func:`area_under`."""
        return area_under(self.kl_SP.mean(1), self.reward_SP.mean(1), float(self.start_P.mean()), limit)


def interpolated(kl_BS: Floats, reward_BS: Floats, start: float | Floats, targets: Sequence[float]) -> Floats:
    """Rewards [B, targets] of B curves with S policies each at KLs ``targets``, NaN beyond the largest KL.

    A straight line in d = sqrt(KL) from ``start`` [B] at 0 to each policy in turn: monotone between neighbours, and
    close to the d (a - b d) that optimisation follows (Gao et al. 2023, arXiv 2210.10760, section 3). A reward that
    falls at higher KL falls here too.
    """
    count = len(kl_BS)
    order = np.argsort(kl_BS, axis=1, kind="stable")
    d = np.sqrt(np.clip(np.take_along_axis(kl_BS, order, 1), 0.0, None))
    d = np.concatenate([np.zeros((count, 1)), d], 1)
    first = np.broadcast_to(np.asarray(start, np.float64), (count,))[:, None]
    reward = np.concatenate([first, np.take_along_axis(reward_BS, order, 1)], 1)
    found = np.full((count, len(targets)), np.nan)
    rows = np.arange(count)
    for n, target in enumerate(np.sqrt(np.asarray(targets, np.float64)).tolist()):
        after = np.minimum((d < target).sum(1), d.shape[1] - 1)
        before = np.maximum(after - 1, 0)
        low, high = d[rows, before], d[rows, after]
        part = np.where(high > low, (target - low) / np.where(high > low, high - low, 1.0), 1.0)
        value = reward[rows, before] + np.clip(part, 0.0, 1.0) * (reward[rows, after] - reward[rows, before])
        found[:, n] = np.where(target <= d[:, -1] * (1 + 1e-12), value, np.nan)
    return found


def area_under(kl_S: npt.ArrayLike, reward_S: npt.ArrayLike, start: float, limit: float) -> float:
    """The hypervolume of policies to ``start`` and ``limit``: the area above ``start`` and left of ``limit`` that they
    dominate, in reward times nats (Zitzler and Thiele 1998). More reward at less KL has more."""
    best, at, area = start, 0.0, 0.0
    for kl, reward in sorted(zip(np.asarray(kl_S).tolist(), np.asarray(reward_S).tolist(), strict=True)):
        kl = min(max(kl, 0.0), limit)
        area += (best - start) * (kl - at)
        at, best = kl, max(best, reward) if kl < limit else best
    return area + (best - start) * (limit - at)


def rewards_at(
    curves: Sequence[RewardCurve], targets: Sequence[float], *, others: Sequence[RewardCurve] = (), seed: int = 0
) -> list[Interval | None]:
    """The mean reward over ``curves`` (the seeds of a method) at each KL, less that of ``others``, with a 95 %
    interval; None where a curve does not reach it.

    A paired bootstrap: each resample of the prompts is that of all curves and of both methods, since their prompts are
    the same, and so is each of the questions of a task, which are drawn apart from the prompts; the interval is for
    these trainings, and says nothing of other seeds. A KL that a tenth of the resamples do not reach counts as not
    reached.
    """
    every = [*curves, *others]
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn_BP = _resampled(every[0].kl_SP.shape[1], rng)
    count = every[0].reward_SP.shape[1]
    drawn_BQ = _resampled(count, rng) if every[0].apart else drawn_BP

    def mean(some: Sequence[RewardCurve], of_kl: Floats, of_reward: Floats) -> Floats:
        parts = [
            interpolated(of_kl @ c.kl_SP.T, of_reward @ c.reward_SP.T, of_reward @ c.start_P, targets) for c in some
        ]
        return np.mean(parts, axis=0) if parts else np.zeros((len(of_kl), len(targets)))

    whole = [np.full((1, drawn.shape[1]), 1 / drawn.shape[1]) for drawn in (drawn_BP, drawn_BQ)]
    value = (mean(curves, *whole) - mean(others, *whole))[0]
    resampled = mean(curves, drawn_BP, drawn_BQ) - mean(others, drawn_BP, drawn_BQ)
    found: list[Interval | None] = []
    for middle, column in zip(value.tolist(), resampled.T, strict=True):
        known = column[~np.isnan(column)]
        if math.isnan(middle) or len(known) < 0.9 * RESAMPLES:
            found.append(None)
            continue
        low, high = np.quantile(known, [0.025, 0.975])
        found.append(Interval(middle, float(low), float(high), count))
    return found


def _resampled(count: int, rng: np.random.Generator) -> Floats:
    """Weights [resamples, count] that sum to 1."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def permutation_test(one: Sequence[float], other: Sequence[float]) -> float:
    """The two-sided p-value that two methods' seeds differ in mean: the fraction of all ways to deal their values to
    two methods whose means are as far apart (Fisher 1935). With n seeds each, the least is 2 / C(2n, n): 0.1 for three,
    0.029 for four, 0.008 for five.
    """
    values, size = np.array([*one, *other]), len(one)
    apart = abs(float(np.mean(one)) - float(np.mean(other)))
    if math.comb(len(values), size) <= MOST_SPLITS:
        chosen = np.array(list(combinations(range(len(values)), size)))
    else:
        rng = np.random.Generator(np.random.PCG64(0))
        drawn = np.argsort(rng.random((MOST_SPLITS - 1, len(values))), axis=1)[:, :size]
        chosen = np.concatenate([np.arange(size)[None], drawn])  # what was observed is one of them
    firsts = values[chosen].sum(1)
    means = firsts / size - (values.sum() - firsts) / max(1, len(values) - size)
    return float(np.mean(np.abs(means) >= apart - 1e-12))


class Chance(NamedTuple):
    """How many of the ``total`` trainings of a method another one has ``beaten``; how many it would on ``average`` if
    the trainings of each seed were dealt to the two at random; and the chance ``p`` of at least as many."""

    beaten: int
    total: int
    average: float
    p: float


def dominance_by_chance(beats: npt.ArrayLike, seeds: Sequence[int], ours: Sequence[bool], draws: int = 2000) -> Chance:
    """The number of dominated trainings beside its null.

    ``beats`` [trainings, trainings]: whether one dominates another, ``seeds`` of the trainings, ``ours``: of which
    method they are. Identical methods with three settings and one seed dominate at least one of three in more than half
    of all sweeps, since one may just have gone less far.
    """
    matrix, seed, mine = np.asarray(beats, bool), np.asarray(seeds), np.asarray(ours, bool)
    matrix = matrix & (seed[:, None] == seed[None])

    def dominated(first: npt.NDArray[np.bool_]) -> int:
        return int((matrix & first[:, None] & ~first[None]).any(0).sum())

    count, rng = dominated(mine), np.random.Generator(np.random.PCG64(0))
    found = [count]  # what was observed is one of the ways
    for _ in range(draws - 1):
        dealt = mine.copy()
        for one in np.unique(seed):
            of_seed = np.flatnonzero(seed == one)
            dealt[of_seed] = mine[rng.permutation(of_seed)]
        found.append(dominated(dealt))
    return Chance(count, int((~mine).sum()), float(np.mean(found)), float(np.mean(np.array(found) >= count)))
