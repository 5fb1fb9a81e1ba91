"""How sure a mean is: an interval from resampling prompts, because samples of one prompt resemble each other.

>>> import numpy as np
>>> found = mean_interval(np.arange(20.0))
>>> found.mean, found.low < found.mean < found.high, found.excludes(0.0)
(9.5, True, True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUMBERS = 4_000_000
"""Values that are resampled at once: of many prompts, all resamples together would fill the memory."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds that hold it with probability ``level``, over ``count`` prompts."""

    mean: float
    low: float
    high: float
    count: int
    level: float = 0.95

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside."""
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_interval(values: npt.ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of ``values`` [prompts] with its bootstrap-t interval (Efron and Tibshirani 1993, section 12.5).

    Each value belongs to one prompt: the mean over its samples, or the difference of two such means. The bootstrap-t
    keeps its coverage with few prompts and skewed values, where plain percentiles are too narrow. Raises
    ``ValueError`` for fewer than two values: one prompt tells nothing about others.
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    if x.ndim != 1 or n < 2:
        raise ValueError("an interval needs at least two prompts")
    mean, error = float(x.mean()), float(x.std(ddof=1)) / n**0.5
    if error == 0:
        return Interval(mean, mean, mean, n, level)
    rng = np.random.Generator(np.random.PCG64(seed))
    parts = []
    for count in _parts(resamples, max(1, NUMBERS // n)):
        drawn = x[rng.integers(n, size=(count, n))]
        parts.append((drawn.mean(axis=1), drawn.std(axis=1, ddof=1) / n**0.5))
    means, errors = (np.concatenate(column) for column in zip(*parts, strict=True))
    t = (means[errors > 0] - mean) / errors[errors > 0]
    below, above = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, mean - float(above) * error, mean - float(below) * error, n, level)


def _parts(total: int, most: int) -> list[int]:
    """``total`` cut into parts of at most ``most``."""
    return [min(most, total - start) for start in range(0, total, most)]
