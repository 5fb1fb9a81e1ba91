"""Confidence intervals and tests of means and rates over prompts, and Holm's correction for several tests.

Samples of one prompt are correlated, so prompts are counted.

>>> import numpy as np
>>> found = mean_interval(np.arange(20.0))
>>> found.mean, found.low < found.mean < found.high, found.excludes(0.0)
(9.5, True, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

MIN_PROMPTS = 10
"""Below this count nothing is resampled (resamples of so few values often have almost no spread), and a comparison
reports no win rate (with nine prompts, eight wins are within chance at 1 %)."""
RESAMPLED_AT_ONCE = 4_000_000
"""Values resampled at once, which bounds memory."""
MOST_STEPS = 2**22
"""Grid steps in the values of a sign-flip test, which bounds its time and memory."""
SMALLEST_P = 1e-12
"""Smaller p-values are rounding."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over ``count`` prompts with the bounds of its confidence interval at ``level``."""

    mean: float
    low: float
    high: float
    count: int
    level: float = 0.95

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_interval(values: npt.ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of ``values`` [prompts] with its bootstrap-t interval (Efron and Tibshirani 1993, section 12.5).

    Each value belongs to one prompt: the mean over its samples, or the difference of two such means. Bootstrap-t keeps
    its coverage for skewed values, where percentile intervals are too narrow. Falls back to :func:`student_interval`
    below :data:`MIN_PROMPTS` values, and where a resample has no spread. Raises ``ValueError`` for fewer than two
    values.
    """
    plain = student_interval(values, level=level)
    x = np.asarray(values, np.float64)
    n, mean, error = len(x), plain.mean, float(x.std(ddof=1)) / len(x) ** 0.5
    if error == 0 or n < MIN_PROMPTS:
        return plain
    rng = np.random.Generator(np.random.PCG64(seed))
    parts, at_once = [], max(1, RESAMPLED_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        drawn = x[rng.integers(n, size=(min(at_once, resamples - start), n))]
        parts.append((drawn.mean(axis=1), drawn.std(axis=1, ddof=1) / n**0.5))
    means, errors = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not (errors > 1e-9 * error).all():
        return plain
    below, above = np.quantile((means - mean) / errors, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, mean - float(above) * error, mean - float(below) * error, n, level)


def student_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of ``values`` [prompts] with Student's t interval. Raises ``ValueError`` for fewer than two values.

    >>> print(student_interval([0.0, 1.0]))
    +0.500 [-5.853, +6.853]
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError("an interval needs at least two prompts")
    mean, half = float(x.mean()), student(len(x) - 1, level) * float(x.std(ddof=1)) / len(x) ** 0.5
    return Interval(mean, mean - half, mean + half, len(x), level)


def rate_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of ``values`` [prompts] between 0 and 1; its interval is Student's of the values with a 0 and a 1 added,
    clipped to [0, 1]. The mean is that of the values alone. Raises ``ValueError`` for no values.

    Agresti and Coull (1998) add two of each to a proportion, for the same reason: near 0 or 1, or with many ties, the
    sample's spread is far too small. With the two added, coverage is nominal or higher.

    >>> str(rate_interval([1.0] * 20)), str(rate_interval([0.5] * 98 + [1.0] * 2))
    ('+1.000 [+0.860, +1.000]', '+0.510 [+0.490, +0.529]')
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError("a rate needs at least one prompt")
    found = student_interval(np.append(x, [0.0, 1.0]), level=level)
    return Interval(float(x.mean()), max(0.0, found.low), min(1.0, found.high), len(x), level)


def weighted_interval(groups: Sequence[npt.ArrayLike], weights: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """The weighted mean of the means of ``groups`` of values [prompts of the group] between 0 and 1; ``weights``
    [groups] sum to one. The interval is Student's with Welch and Satterthwaite's degrees of freedom, clipped to [0, 1],
    with the variances of a stratified sample, each group's spread estimated with a 0 and a 1 added, as in
    :func:`rate_interval`, which it is for one group. Raises ``ValueError`` for an empty group.

    >>> str(weighted_interval([[1.0] * 30, [0.0] * 30], [0.75, 0.25]))
    '+0.750 [+0.700, +0.800]'
    """
    shares = np.asarray(weights, np.float64)
    values = [np.asarray(group, np.float64) for group in groups]
    if not values or any(x.ndim != 1 or not len(x) for x in values):
        raise ValueError("every group needs at least one prompt")
    if len(values) == 1:
        return rate_interval(values[0], level=level)
    mean = float(shares @ [float(x.mean()) for x in values])
    padded = [np.append(x, [0.0, 1.0]) for x in values]
    variances = shares**2 * [x.var(ddof=1) / len(x) for x in padded]
    freedom = float(variances.sum() ** 2 / (variances**2 / [len(x) - 1 for x in padded]).sum())
    half = student(freedom, level) * math.sqrt(float(variances.sum()))
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half), sum(map(len, values)), level)


def wilson(share: float, count: float, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (E. B. Wilson, JASA 22, 1927) of a ``share`` of ``count`` independent trials; (0, 1) for
    no trial. ``scipy.stats`` has it for whole successes only; here a success may be fractional, which errs to the wide
    side. For prompts with several correlated answers use :func:`rate_interval`.

    >>> [round(bound, 4) for bound in wilson(0.75, 20)]
    [0.5313, 0.8881]
    """
    if not count:
        return 0.0, 1.0
    z = float(ndtri((1 + level) / 2))
    spread = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / spread
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / spread
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def student(freedom: float, level: float = 0.95) -> float:
    """The two-sided quantile of Student's t: 12.706 for one degree of freedom and 95 %."""
    return float(stdtrit(freedom, (1 + level) / 2))


def sign_flip_test(values: npt.ArrayLike) -> float:
    """The two-sided p-value of a mean of zero: the fraction of all ways to flip signs of ``values`` [prompts] whose sum
    is at least as far from zero, at least :data:`SMALLEST_P`.

    Fisher's randomisation test (The Design of Experiments, 1935, section 21): where each value is as likely as its
    negative, at most a fraction a of p-values is below a, for any number of prompts. With one comparison a prompt it is
    the sign test, McNemar's exact test. The distribution is computed exactly, by its characteristic function
    prod cos(v t), on the grid of 1 / q, q up to 64, that all values are on. Where there is none, and for very many
    values, they are rounded to a fine grid, both signs alike, and the test is exact for the rounded ones.

    >>> [round(sign_flip_test(x), 9) for x in ([0.5] * 9 + [-0.5], [0.25, 0.5, -0.25, 0.0])]
    [0.021484375, 0.75]
    """
    x = np.asarray(values, np.float64)
    total = float(np.abs(x).sum())
    if not total:
        return 1.0
    # relative to the largest, so that small values are not taken for zeros
    scaled = (q * x for q in range(1, 65))
    steps = next((y for y in scaled if np.abs(y - np.rint(y)).max() < 1e-6 * np.abs(y).max()), None)
    if steps is None or np.abs(steps).sum() > MOST_STEPS:
        steps = x * (max(2**14, 4 * len(x)) / total)
    size, times = np.unique(np.rint(np.abs(steps)).astype(np.int64), return_counts=True)
    far = abs(int(np.rint(steps).sum()))
    most = int(size @ times)
    length = 2 ** (2 * most + 1).bit_length()
    angle = 2 * np.pi / length * np.arange(length // 2 + 1)
    transform = np.ones_like(angle)
    for one, count in zip(size, times, strict=True):
        transform *= np.cos(one * angle) ** count
    beyond = float(np.fft.irfft(transform, length)[far : most + 1].sum())
    return min(1.0, max(SMALLEST_P, 2 * beyond))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, so that the chance of any false finding is at most the level (S. Holm,
    Scandinavian Journal of Statistics 6, 1979): the k-th smallest of m times m - k + 1, in order.

    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order, found, highest = sorted(range(len(p_values)), key=p_values.__getitem__), [0.0] * len(p_values), 0.0
    for k, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - k) * p_values[i]))
        found[i] = highest
    return found


def p_text(p: float) -> str:
    """``p = 0.021``, or ``p < 1e-12`` where it is too small to compute."""
    return f"p < {SMALLEST_P:g}" if p <= SMALLEST_P else f"p = {p:.2g}"
