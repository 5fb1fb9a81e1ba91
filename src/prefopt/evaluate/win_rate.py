"""Win rates over prompts: an interval, one test for the verdict, and how many prompts would show a difference.

An outcome is 1 where the first of two models wins, 1/2 for a tie, 0 where it loses. Samples of one prompt are
correlated, so prompts are counted, not samples.

>>> found = win_rate(np.array([[1.0, 0.5], [1.0, 1.0], [0.0, 1.0]] * 10))
>>> found.wins, found.ties, found.losses, found.rate.mean, found.verdict
(40, 10, 10, 0.75, 'better')
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
from scipy.special import ndtri

from prefopt.core.statistics import MIN_PROMPTS, Interval, holm, rate_interval, sign_flip_test, student

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Verdict = Literal["better", "worse", "not shown"]
Needed = tuple[int, int | None]

LEVEL, POWER = 0.05, 0.8
"""Chance of a verdict on equal models, and the chance of one that the number of prompts in advice is for."""
PLAUSIBLE = 0.85
"""Level of the interval of the difference that advice on prompts is a range over."""


def tier_outcome(tiers: Iterable[Iterable[int]], i: int = 0, k: int = 1) -> float:
    """1 where tiers rank response ``i`` above ``k``, 1/2 for the same tier, 0 below; NaN where one is not ranked."""
    rank = {response: n for n, tier in enumerate(tiers) for response in tier}
    if i not in rank or k not in rank:
        return math.nan
    return 0.5 if rank[i] == rank[k] else float(rank[i] < rank[k])


@dataclass(frozen=True, slots=True)
class WinRate:
    """``wins``, ``ties`` and ``losses`` count samples, ``undecided`` those without a verdict of the judge.

    ``rate``: the mean outcome over prompts, None below :data:`~prefopt.core.statistics.MIN_PROMPTS` prompts, as are the
    others. ``spread``: standard deviation of the prompts' mean outcomes. ``p``: two-sided sign-flip test of the
    prompts' mean outcomes around 1/2. ``p_holm``: the same corrected for ``comparisons`` made together. ``verdict``:
    ``better`` or ``worse`` for the first model where ``p_holm`` is at most 5 %. ``needed``: see :func:`needed_prompts`.
    """

    wins: int
    ties: int
    losses: int
    undecided: int
    prompts: int
    rate: Interval | None = None
    spread: float | None = None
    p: float | None = None
    p_holm: float | None = None
    comparisons: int = 1
    needed: Needed | None = None
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
    """The win rate of outcomes [prompts, samples], NaN where undecided, with the interval of :func:`rate_interval`, and
    the verdict of this comparison alone; :func:`corrected` gives those of several."""
    x = np.asarray(outcomes, np.float64)
    decided = ~np.isnan(x)
    some = decided.any(1)
    means = np.nansum(x[some], 1) / decided[some].sum(1)
    wins, ties, losses = (int(part.sum()) for part in (x[decided] > 0.5, x[decided] == 0.5, x[decided] < 0.5))
    counts = WinRate(wins, ties, losses, int((~decided).sum()), len(means))
    if len(means) < MIN_PROMPTS:
        return counts
    p = sign_flip_test(means - 0.5)
    return corrected([replace(counts, rate=rate_interval(means), spread=float(means.std(ddof=1)), p=p)])[0]


def corrected(rates: Sequence[WinRate]) -> list[WinRate]:
    """The rates of comparisons made together: Holm's p-values, and the verdicts and advice that follow."""
    tested = [(rate, rate.p) for rate in rates if rate.p is not None]
    p_values = iter(holm([p for _, p in tested]))
    return [_judged(rate, next(p_values), len(tested)) if rate.p is not None else rate for rate in rates]


def _judged(rate: WinRate, p_holm: float, comparisons: int) -> WinRate:
    assert rate.rate is not None
    verdict: Verdict = "better" if rate.rate.mean > 0.5 else "worse"
    if p_holm > LEVEL:
        verdict = "not shown"
    return replace(rate, p_holm=p_holm, comparisons=comparisons, needed=_needed(rate, comparisons), verdict=verdict)


def _needed(rate: WinRate, comparisons: int) -> Needed | None:
    """:func:`needed_prompts` for the largest and for the smallest difference within an interval of level
    :data:`PLAUSIBLE`, None for the latter where the interval holds no difference. None where nothing varies."""
    assert rate.rate is not None and rate.spread is not None
    n, mean = rate.prompts, rate.rate.mean
    if not rate.spread:
        return None
    # As in rate_interval, a 0 and a 1 are added.
    squares = (n - 1) * rate.spread**2 + n * (mean - 0.5) ** 2 + 0.5
    centre = n * (mean - 0.5) / (n + 2)
    error = ((squares / (n + 2) - centre**2) / (n + 1)) ** 0.5
    half, samples = student(n + 1, PLAUSIBLE) * error, (rate.wins + rate.ties + rate.losses) / n
    least = needed_prompts(abs(centre) + half, rate.spread, samples, comparisons)
    if abs(centre) <= half:
        return least, None
    return least, needed_prompts(abs(centre) - half, rate.spread, samples, comparisons)


def needed_prompts(difference: float, spread: float, samples: float = 1, comparisons: int = 1) -> int:
    """The number of prompts at which a win rate of 1/2 +- ``difference`` is found in 8 of 10 experiments.

    ``spread``: standard deviation of the mean outcomes of prompts with so many ``samples``; it is cut to the largest
    that outcomes between 0 and 1 can have. The sign-flip test finds a difference, at the strictest level of Holm's
    correction for so many ``comparisons``, where the sum of n mean outcomes, less 1/2 each, exceeds z times their root
    sum of squares, z sqrt(n (spread^2 + difference^2)), and half of the step in which that sum changes.

    >>> needed_prompts(0.1, 0.49), needed_prompts(0.1, 0.49, comparisons=15)
    (204, 364)
    """
    difference = min(difference, 0.5)
    spread = min(spread, (0.25 - difference**2) ** 0.5)
    quantiles = float(ndtri(1 - LEVEL / (2 * comparisons))) * math.hypot(spread, difference)
    quantiles += float(ndtri(POWER)) * spread
    # n difference = quantiles sqrt(n) + 1 / (2 samples), solved for sqrt(n).
    root = (quantiles + math.sqrt(quantiles**2 + 2 * difference / samples)) / (2 * difference)
    return max(MIN_PROMPTS, math.ceil(root**2))
