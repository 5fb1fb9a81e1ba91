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
SMALL = 0.05
"""A rise of the last third that is surely above zero, but below this part of all that was climbed, is none."""


def plateau(reward_S: npt.ArrayLike) -> Plateau | None:
    """Least squares through the last third of a training reward [steps]; none where that has fewer than six steps.

    The reward has reached a plateau where the interval (95 %, Student's t; the noise of steps taken as independent,
    since each draws samples of its own) of what the line gains over the third holds 0, or where the gain is above 0 but
    smaller than a twentieth of the climb before. A reward that surely falls has reached none.
    """
    y = np.asarray(reward_S, np.float64)
    n = len(y) // 3
    if n < FEWEST or not np.isfinite(y).all():
        return None
    last, x = y[-n:], np.arange(n) - (n - 1) / 2
    slope = float(x @ last / (x @ x))
    left = last - last.mean() - slope * x
    error = float(np.sqrt(left @ left / (n - 2) / (x @ x)))
    rise, half = slope * (n - 1), student(n - 2) * error * (n - 1)
    climb = float(last.mean() - y[: max(1, len(y) // 10)].mean())
    low, high = rise - half, rise + half
    reached = low <= 0 <= high or 0 < rise < SMALL * climb
    return Plateau(rise, low, high, climb, n, bool(reached))


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
