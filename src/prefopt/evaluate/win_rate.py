"""Win rates with intervals over prompts, a sign test, length-controlled win rates and Bradley-Terry strengths.

An outcome is 1 where the first of two models wins, 1/2 for a tie, 0 where it loses. Samples of one prompt are
correlated, so prompts are counted, not samples.

>>> found = win_rate(np.array([[1.0, 0.5], [1.0, 1.0], [0.0, 1.0]] * 10))
>>> found.wins, found.ties, found.losses, found.rate.mean, found.needed
(40, 10, 10, 0.75, 10)
>>> few = win_rate(np.array([[1.0], [1.0]]))
>>> few.rate is None, few.wins
(True, 2)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components
from scipy.special import bdtr, expit, ndtri

from prefopt.core.statistics import MIN_PROMPTS, Interval, rate_interval, student

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Verdict = Literal["better", "worse", "not shown"]

Z95 = float(ndtri(0.975))
PRIOR = 1e-3
"""Precision of a normal prior on Bradley-Terry strengths in log-odds: it only keeps fits finite where a model never
lost."""


def tier_outcome(tiers: Iterable[Iterable[int]], i: int = 0, k: int = 1) -> float:
    """1 where tiers rank response ``i`` above ``k``, 1/2 for the same tier, 0 below; NaN where one is not ranked."""
    rank = {response: n for n, tier in enumerate(tiers) for response in tier}
    if i not in rank or k not in rank:
        return math.nan
    return 0.5 if rank[i] == rank[k] else float(rank[i] < rank[k])


@dataclass(frozen=True, slots=True)
class WinRate:
    """``wins``, ``ties`` and ``losses`` count samples, ``undecided`` those without a verdict of the judge.

    ``rate``: the mean outcome over prompts, None below :data:`~prefopt.core.statistics.MIN_PROMPTS` prompts. ``p``:
    two-sided sign test over the prompts whose mean outcome is not 1/2. ``needed``: prompts for 80 % power to detect the
    observed difference at 5 %, None where there is no difference. ``verdict``: ``better`` or ``worse`` for the first
    model where the interval excludes 1/2 and the sign test agrees (``p`` below 5 %, most prompts on the same side).
    """

    wins: int
    ties: int
    losses: int
    undecided: int
    prompts: int
    rate: Interval | None
    p: float | None
    needed: int | None
    verdict: Verdict | None = None

    def swapped(self) -> WinRate:
        """The rate of the second model."""
        opposite: dict[Verdict | None, Verdict] = {"better": "worse", "worse": "better"}
        verdict = opposite.get(self.verdict, self.verdict)
        return replace(self, wins=self.losses, losses=self.wins, rate=swapped(self.rate, 1.0), verdict=verdict)


def swapped(i: Interval | None, total: float) -> Interval | None:
    """The interval of ``total`` minus a value."""
    return None if i is None else replace(i, mean=total - i.mean, low=total - i.high, high=total - i.low)


def win_rate(outcomes: npt.ArrayLike) -> WinRate:
    """The win rate of outcomes [prompts, samples], NaN where undecided, with the interval of :func:`rate_interval`."""
    x = np.asarray(outcomes, np.float64)
    decided = ~np.isnan(x)
    some = decided.any(1)
    means = np.nansum(x[some], 1) / decided[some].sum(1)
    wins, ties, losses = (int(part.sum()) for part in (x[decided] > 0.5, x[decided] == 0.5, x[decided] < 0.5))
    counts = WinRate(wins, ties, losses, int((~decided).sum()), len(means), None, None, None)
    if len(means) < MIN_PROMPTS:
        return counts
    above, below = int((means > 0.5).sum()), int((means < 0.5).sum())
    rate, p = rate_interval(means), sign_test(above, below)
    verdict: Verdict = "better" if above > below else "worse"
    if p >= 0.05 or not rate.excludes(0.5) or (above > below) != (rate.mean > 0.5):
        verdict = "not shown"
    needed = None
    if difference := float(means.mean()) - 0.5:
        variance = float(means.var(ddof=1)) or 1 / len(means)
        needed = max(MIN_PROMPTS, math.ceil((Z95 + float(ndtri(0.8))) ** 2 * variance / difference**2))
    return replace(counts, rate=rate, p=p, needed=needed, verdict=verdict)


def sign_test(above: int, below: int) -> float:
    """The two-sided p-value of ``above`` and ``below`` under a fair coin.

    >>> round(sign_test(9, 1), 9), sign_test(3, 3)
    (0.021484375, 1.0)
    """
    return min(1.0, 2 * float(bdtr(min(above, below), above + below, 0.5)))


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """``rate``: win rate predicted for responses of equal length. ``slope``: change of the log-odds of winning per
    standard deviation of the length difference. Both are None where one model's responses are longer in every
    comparison: the prediction at equal length would be an extrapolation."""

    rate: Interval | None
    slope: Interval | None


def length_controlled(outcomes: npt.ArrayLike, longer: npt.ArrayLike) -> LengthControlled | None:
    r"""The length-controlled win rate of outcomes [prompts, samples]; ``longer``: differences of length likewise.

    A logistic regression of the outcome on the difference d over its root mean square,
    :math:`\operatorname{logit} P = a + b\,d`, evaluated at d = 0. A tie is an outcome of 1/2 (quasi-likelihood). Two
    prompts are added at d = 0, one won and one lost: the prior log-F(2, 2) on a (Greenland and Mansournia 2015, section
    3). The slope has a wide normal prior, of standard deviation 10. Both keep the fit finite where one model always
    wins or length alone decides, for which the likelihood has no maximum. Bounds are Student's with standard errors
    clustered by prompt (Liang and Zeger 1986); the prior of the slope counts as one more observation. None below
    :data:`~prefopt.core.statistics.MIN_PROMPTS` prompts, and where all responses are equally long.
    """
    y, d = np.asarray(outcomes, np.float64), np.asarray(longer, np.float64)
    decided = ~np.isnan(y)
    prompt = np.unique(np.broadcast_to(np.arange(len(y))[:, None], y.shape)[decided], return_inverse=True)[1]
    y, d = y[decided], d[decided]
    scale = float(np.sqrt((d**2).mean())) if len(d) else 0.0
    prompts = int(prompt.max(initial=-1)) + 1
    if prompts < MIN_PROMPTS or not scale:
        return None
    if d.min() > 0 or d.max() < 0:
        return LengthControlled(None, None)
    y, d, prompt = np.append(y, [1, 0]), np.append(d, [0, 0]), np.append(prompt, [prompts, prompts + 1])
    x, prior = np.stack([np.ones_like(d), d / scale], 1), np.diag([0.0, 1e-2])
    beta = _logistic_regression(x, y, prior)
    p = expit(x @ beta)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + prior)
    scores = np.zeros((prompts + 2, 2))
    np.add.at(scores, prompt, x * (y - p)[:, None])
    cover = bread @ (scores.T @ scores * (prompts + 2) / (prompts + 1) + prior) @ bread
    half = student(prompts + 1) * np.sqrt(np.diag(cover))
    low, high = (beta - half).tolist(), (beta + half).tolist()
    slope = Interval(float(beta[1]), low[1], high[1], prompts)
    # On each side the wider of two intervals: of the log-odds, and of the rate itself (delta method). Near 1 the former
    # excludes rates that so few losses cannot rule out.
    rate, below, above = (float(expit(v)) for v in (beta[0], low[0], high[0]))
    delta = rate * (1 - rate) * float(half[0])
    bounds = (max(0.0, min(below, rate - delta)), min(1.0, max(above, rate + delta)))
    return LengthControlled(Interval(rate, *bounds, prompts), slope)


def _logistic_regression(x: Floats, y: Floats, prior: Floats) -> Floats:
    """Coefficients of maximal penalised likelihood, by Newton's method."""
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = expit(x @ beta)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(hessian, x.T @ (y - p) - prior @ beta)
        beta += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-12:
            break
    return beta


def win_counts(games: Sequence[tuple[int, int, int, float]], models: int) -> Floats:
    """Wins of one model over another, [prompts, models, models], of games (first, second, prompt, outcome); a tie is
    half a win of each."""
    table = np.array(games, np.float64).reshape(-1, 4)
    first, second, prompt = table[:, :3].astype(np.int64).T
    names, place = np.unique(prompt, return_inverse=True)
    found = np.zeros((len(names), models, models))
    np.add.at(found, (place, first, second), table[:, 3])
    np.add.at(found, (place, second, first), 1 - table[:, 3])
    return found


def connected_groups(wins: Floats) -> list[list[int]]:
    """Strongly connected components of the graph "won against or tied with", from :func:`win_counts`. Strengths are
    finite within one component only: between two of them the likelihood has no maximum (Ford 1957).

    >>> both = [(0, 1, 0, 1.0), (0, 1, 1, 0.0)]
    >>> [connected_groups(win_counts([*both, (1, 2, 0, outcome)], 3)) for outcome in (0.5, 1.0)]
    [[[0, 1, 2]], [[0, 1], [2]]]
    """
    _, label = connected_components(wins.sum(0) > 0, connection="strong")
    return sorted(np.flatnonzero(label == n).tolist() for n in np.unique(label))


def fit_strengths(wins: Floats) -> Floats:
    """Maximum-likelihood strengths [..., models] in log-odds, centred, from wins [..., models, models].

    Bradley and Terry 1952: a model wins with the logistic of the difference of strengths; a tie is half a win of each.
    """
    models = wins.shape[-1]
    played = wins + wins.swapaxes(-1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(200):
        chance = expit(strength[..., :, None] - strength[..., None, :])
        slope = (wins - played * chance).sum(-1) - PRIOR * strength
        curve = played * chance * (1 - chance)
        hessian = (curve.sum(-1)[..., None] + PRIOR) * np.eye(models) - curve
        step = np.linalg.solve(hessian, slope[..., None])[..., 0]
        strength += step / np.maximum(1.0, np.abs(step).max(-1, keepdims=True))
        if np.abs(step).max() < 1e-10:
            break
    centred: Floats = strength - strength.mean(-1, keepdims=True)
    return centred


def bradley_terry(wins: Floats, *, resamples: int = 1000, seed: int = 0) -> list[Interval]:
    """The strength of each model of one connected group, with percentile bootstrap intervals over prompts, from
    :func:`win_counts`.

    Intervals are too narrow where one model wins nearly always: at 4 and more log-odds apart they covered 75 to 83 % in
    simulations.

    >>> games = [(0, 1, k, 1.0) for k in range(30)] + [(0, 1, k, 0.0) for k in range(10)]  # won 30 of 40
    >>> (a, b) = bradley_terry(win_counts(games, 2))
    >>> round(a.mean - b.mean, 2), round(math.log(30 / 10), 2)
    (1.1, 1.1)
    """
    prompts = len(wins)
    rng = np.random.Generator(np.random.PCG64(seed))
    times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)
    drawn = fit_strengths(np.tensordot(times, wins, 1))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    best = fit_strengths(wins.sum(0))
    return [Interval(float(b), float(a), float(c), prompts) for b, a, c in zip(best, low, high, strict=True)]
