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
    drawn = x[np.random.Generator(np.random.PCG64(seed)).integers(n, size=(resamples, n))]
    means, errors = drawn.mean(axis=1), drawn.std(axis=1, ddof=1) / n**0.5
    t = (means[errors > 0] - mean) / errors[errors > 0]
    below, above = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, mean - float(above) * error, mean - float(below) * error, n, level)
