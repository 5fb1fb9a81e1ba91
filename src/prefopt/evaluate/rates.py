"""Who wins how often: rates with intervals over prompts, a sign test, and a rate at equal length.

An outcome is 1 where the first of two models wins, 1/2 at a tie, 0 where it loses. Samples of one prompt resemble each
other, so that prompts, not samples, are what is counted.

>>> import numpy as np
>>> found = win_rate(np.array([[1.0, 0.5], [1.0, 1.0], [0.0, 1.0]] * 10))
>>> found.wins, found.ties, found.losses, found.rate.mean, found.needed
(40, 10, 10, 0.75, 10)
>>> few = win_rate(np.array([[1.0], [1.0]]))
>>> few.rate is None, few.wins
(True, 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from prefopt.interval import Interval, mean_interval
from prefopt.studies.agreement import wilson

Floats = npt.NDArray[np.float64]

FEWEST = 10
"""Prompts below which no rate is told: with nine, eight wins out of nine would still be within chance at 1 %, and an
interval would span most of what is possible."""
Z95, _Z80 = 1.959963984540054, 0.8416212335729143  # quantiles of the normal: 97.5 % and 80 %


@dataclass(frozen=True, slots=True)
class WinRate:
    """``wins``, ``ties`` and ``losses`` count samples, ``undecided`` those of which the judge said nothing.

    ``rate``: the mean outcome, a tie counting half, over prompts; none below :data:`FEWEST` of them. ``p``: two-sided
    sign test over prompts that lean to one side, against no difference. ``needed``: prompts from which a difference as
    large as this one is told from none in 8 of 10 experiments, at 5 %; none where there is none.
    """

    wins: int
    ties: int
    losses: int
    undecided: int
    prompts: int
    rate: Interval | None
    p: float | None
    needed: int | None


def win_rate(outcomes: npt.ArrayLike, *, seed: int = 0) -> WinRate:
    """Of outcomes [prompts, samples]; NaN where the judge said nothing. The interval is :func:`mean_interval`'s, cut
    at 0 and 1; where all prompts say the same, which leaves a bootstrap nothing to resample, it is Wilson's."""
    x = np.asarray(outcomes, np.float64)
    said = ~np.isnan(x)
    means = means_of(x)
    wins, ties, losses = (int(part.sum()) for part in (x[said] > 0.5, x[said] == 0.5, x[said] < 0.5))
    bare = WinRate(wins, ties, losses, int((~said).sum()), len(means), None, None, None)
    if len(means) < FEWEST:
        return bare
    above, below = int((means > 0.5).sum()), int((means < 0.5).sum())
    p = sign_test(above, below)
    return replace(bare, rate=rate_of(means, seed=seed), p=p, needed=_needed(means))


def means_of(outcomes: Floats) -> Floats:
    """The mean outcome of each prompt of which something was said."""
    said = ~np.isnan(outcomes)
    some = said.any(1)
    found: Floats = np.nansum(outcomes[some], 1) / said[some].sum(1)
    return found


def rate_of(means: Floats, *, seed: int = 0) -> Interval:
    """A rate over prompts with its interval."""
    if means.std() == 0:
        mean = float(means[0])
        bounds = wilson(mean, len(means))
        return Interval(mean, bounds.low, bounds.high, len(means))
    found = mean_interval(means, seed=seed)
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high), found.count, found.level)


def sign_test(above: int, below: int) -> float:
    """The chance of a split at least as uneven of ``above + below`` fair coins, exactly.

    >>> sign_test(9, 1), sign_test(3, 3)
    (0.021484375, 1.0)
    """
    n, k = above + below, min(above, below)
    # In exact integers: the counts may be thousands.
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return float(min(1.0, 2 * tail / 2**n))


def _needed(means: Floats) -> int | None:
    difference = float(means.mean()) - 0.5
    if not difference:
        return None
    variance = float(means.var(ddof=1)) or 1 / len(means)
    return max(FEWEST, math.ceil((Z95 + _Z80) ** 2 * variance / difference**2))


@dataclass(frozen=True, slots=True)
class AtEqualLength:
    """``rate``: win rate read where both responses are equally long. ``slope``: how much the log-odds of winning rise
    with a standard deviation of the difference of lengths, with its interval."""

    rate: Interval
    slope: Interval


def at_equal_length(outcomes: npt.ArrayLike, longer: npt.ArrayLike) -> AtEqualLength | None:
    r"""The length-controlled win rate of outcomes [prompts, samples], ``longer`` the difference of lengths likewise.

    A logistic regression of the outcome on the difference d over its root mean square,
    :math:`\operatorname{logit} P = a + b\,d`, read at d = 0. A tie is an outcome of 1/2 (quasi-likelihood). The slope
    has a wide normal prior, of standard deviation 10 (the intercept's is 1000): where length alone decides who wins,
    and where one model wins always, likelihood has no maximum. Bounds are those of
    the normal with standard errors clustered by prompt (Liang and Zeger 1986), put through the logistic. None below
    :data:`FEWEST` prompts, and where all responses are equally long.
    """
    y, d = np.asarray(outcomes, np.float64), np.asarray(longer, np.float64)
    said = ~np.isnan(y)
    prompt = np.broadcast_to(np.arange(len(y))[:, None], y.shape)[said]
    y, d = y[said], d[said]
    scale = float(np.sqrt((d**2).mean())) if len(d) else 0.0
    prompts = len(np.unique(prompt))
    if prompts < FEWEST or not scale:
        return None
    x = np.stack([np.ones_like(d), d / scale], 1)
    prior = np.diag([1e-6, 1e-2])
    beta = np.zeros(2)
    for _ in range(100):
        p = _logistic(x @ beta)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(hessian, x.T @ (y - p) - prior @ beta)
        beta += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-12:
            break
    p = _logistic(x @ beta)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + prior)
    scores = np.zeros((int(prompt.max()) + 1, 2))
    np.add.at(scores, prompt, x * (y - p)[:, None])
    cover = bread @ (scores.T @ scores) @ bread * prompts / (prompts - 1)
    errors = np.sqrt(np.diag(cover))
    low, high = beta - Z95 * errors, beta + Z95 * errors
    at_zero, least, most = (float(_logistic(v)) for v in (beta[0], low[0], high[0]))
    rate = Interval(at_zero, least, most, prompts)
    return AtEqualLength(rate, Interval(float(beta[1]), float(low[1]), float(high[1]), prompts))


def _logistic(x: npt.ArrayLike) -> Floats:
    found: Floats = 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))
    return found
