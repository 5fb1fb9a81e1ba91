"""Confidence intervals of means over prompts, whose samples are not independent, and of rates.

>>> import numpy as np
>>> found = mean_interval(np.arange(20.0))
>>> found.mean, found.low < found.mean < found.high, found.excludes(0.0)
(9.5, True, True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

FEWEST = 10
"""Fewest values to resample: resamples of fewer often have almost no spread."""
NUMBERS = 4_000_000
"""Values resampled at once, to bound the memory."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over ``count`` prompts with its confidence interval at ``level``."""

    mean: float
    low: float
    high: float
    count: int
    level: float = 0.95

    def excludes(self, value: float) -> bool:
        """Whether ``value`` is outside the interval."""
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_interval(values: npt.ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of ``values`` [prompts] with its bootstrap-t interval (Efron and Tibshirani 1993, section 12.5).

    Each value belongs to one prompt: the mean over its samples, or the difference of two such means. The bootstrap-t
    keeps its coverage with skewed values, where percentiles are too narrow. Below :data:`FEWEST` values, and where a
    resample has no spread, the interval is that of :func:`student_interval`. Raises ``ValueError`` for fewer than two
    values.
    """
    plain = student_interval(values, level=level)
    x = np.asarray(values, np.float64)
    n, mean, error = len(x), plain.mean, float(x.std(ddof=1)) / len(x) ** 0.5
    if error == 0 or n < FEWEST:
        return plain
    rng = np.random.Generator(np.random.PCG64(seed))
    parts = []
    for count in _parts(resamples, max(1, NUMBERS // n)):
        drawn = x[rng.integers(n, size=(count, n))]
        parts.append((drawn.mean(axis=1), drawn.std(axis=1, ddof=1) / n**0.5))
    means, errors = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not (errors > 1e-9 * error).all():
        return plain
    below, above = np.quantile((means - mean) / errors, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, mean - float(above) * error, mean - float(below) * error, n, level)


def student_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of ``values`` [prompts] with Student's interval. Raises ``ValueError`` for fewer than two values.

    >>> print(student_interval([0.0, 1.0]))
    +0.500 [-5.853, +6.853]
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError("an interval needs at least two prompts")
    mean, half = float(x.mean()), student(len(x) - 1, level) * float(x.std(ddof=1)) / len(x) ** 0.5
    return Interval(mean, mean - half, mean + half, len(x), level)


def rate_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of ``values`` [prompts] between 0 and 1, with Student's interval of the values and a 0 and a 1, clipped.

    Agresti and Coull (1998) add two of each to a rate, for the same reason: the spread of samples near 0 or 1, or of
    nearly equal values (ties), is too small. With the added values the coverage is at least about nominal. The mean is
    that of the values alone. Raises ``ValueError`` for no value.

    >>> str(rate_interval([1.0] * 20)), str(rate_interval([0.5] * 98 + [1.0] * 2))
    ('+1.000 [+0.860, +1.000]', '+0.510 [+0.490, +0.529]')
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError("a rate needs at least one prompt")
    found = student_interval(np.append(x, [0.0, 1.0]), level=level)
    return Interval(float(x.mean()), max(0.0, found.low), min(1.0, found.high), len(x), level)


def wilson(share: float, count: float, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (JASA 22, 1927) of a ``share`` of ``count`` independent cases; 0 and 1 without cases.

    Conservative where cases are averages or half successes. For dependent cases, such as several answers per prompt,
    there is :func:`rate_interval`.

    >>> [round(bound, 4) for bound in wilson(0.75, 20)]
    [0.5313, 0.8881]
    """
    if not count:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    spread = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / spread
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / spread
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def student(freedom: int, level: float = 0.95) -> float:
    """The two-sided quantile of Student's t at ``level``: 12.706 for one degree of freedom and 95 %.

    Up to 30 degrees of freedom by the distribution itself, a finite sum (Abramowitz and Stegun 1964, 26.7.3 and
    26.7.4), and beyond by four terms of its expansion around the normal's (26.7.5), right to a part in a million.
    """
    if freedom > 30:
        return _expanded(NormalDist().inv_cdf((1 + level) / 2), float(freedom))
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t over the root of the degrees of freedom
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """The probability that Student's t is within the bounds of ``angle``."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (k - 1) / k * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _expanded(z: float, v: float) -> float:
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / math.pow(v, k) for k, term in enumerate(terms, 1))


def _parts(total: int, most: int) -> list[int]:
    """``total`` in parts of at most ``most``."""
    return [min(most, total - start) for start in range(0, total, most)]
