"""Whether a training reward has stopped rising: prefopt's own test, by a straight line through its last third.

>>> import numpy as np
>>> noise = np.random.Generator(np.random.PCG64(0)).normal(0, 0.05, 60)
>>> plateau(np.tanh(np.arange(60) / 6) + noise).reached, plateau(np.arange(60) / 60 + noise).reached
(True, False)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from prefopt.evaluate.frontier import Plateau

FEWEST = 6
"""Steps in the last third at least: a line through fewer says nothing."""
SHARE = 0.2
"""A rise surely below this share of the climb is none; a reward that rises evenly gains 0.43 of it in a third."""


def plateau(
    reward_S: npt.ArrayLike, responses_S: npt.ArrayLike | None = None, *, share: float = SHARE
) -> Plateau | None:
    """Least squares through the last third of a training reward [steps]; none where that has fewer than six steps.

    A test of equivalence: the reward has reached a plateau where even the upper bound (95 % interval, Student's t) of
    what the line gains over the third is below ``share`` of the climb, and it does not surely fall by as much. That no
    rise can be seen in the noise is not enough. ``responses_S``, whose mean each reward is, weigh the steps (else all
    are alike); their noise is taken as independent, since each step draws responses of its own.
    """
    y = np.asarray(reward_S, np.float64)
    w = np.ones(len(y)) if responses_S is None else np.asarray(responses_S, np.float64)
    n = len(y) // 3
    if n < FEWEST or not np.isfinite(y).all():
        return None
    last, weight = y[-n:], w[-n:]
    mean = float(np.average(last, weights=weight))
    x = np.arange(n) - np.average(np.arange(n), weights=weight)
    spread = float(weight @ (x * x))
    slope = float(weight @ (x * last)) / spread
    left = last - mean - slope * x
    error = math.sqrt(float(weight @ (left * left)) / (n - 2) / spread)
    rise, half = slope * (n - 1), student(n - 2) * error * (n - 1)
    early = max(1, len(y) // 10)
    climb = mean - float(np.average(y[:early], weights=w[:early]))
    low, high = rise - half, rise + half
    reached = high < share * climb and (high >= 0 or low > -share * climb)
    return Plateau(rise, low, high, climb, n, bool(reached), share)


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t, by four terms of its expansion around the normal's (Abramowitz and Stegun 1964,
    26.7.5): right to a part in a thousand from four degrees of freedom on."""
    z, v = 1.959963984540054, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / math.pow(v, k) for k, term in enumerate(terms, 1))
