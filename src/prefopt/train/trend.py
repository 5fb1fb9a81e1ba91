"""Small statistics on curves: what changed between the first steps of a run and its last, and what is noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.interval import student
from prefopt.train.history import Curve

LEAST = 4
"""Steps in a window: fewer say nothing about their own spread."""


@dataclass(frozen=True, slots=True)
class Change:
    """A metric in the first ``window`` steps and in the last, in the mean, and how far chance may bring them apart.

    ``noise`` is the half width of the 95 % interval of the difference, from the spread within the two windows.
    """

    first: float
    last: float
    noise: float
    window: int
    steps: int

    @property
    def by(self) -> float:
        """The difference; negative where the metric fell."""
        return self.last - self.first

    @property
    def direction(self) -> int:
        """-1, 0 or 1; 0 where the difference is within noise."""
        return 0 if abs(self.by) <= self.noise else int(math.copysign(1, self.by))


def change(curve: Curve, *, since: float | None = None) -> Change | None:
    """The change over a run, from a tenth of its steps at either end; none where there are too few of them.

    ``since``: the value before training, where it is known exactly; it then stands for the first steps, so that what
    moved within them counts too.
    """
    window = max(LEAST, math.ceil(len(curve.values) / 10))
    if len(curve.values) < 2 * window:
        return None
    ends = [curve.values[-window:]] + ([curve.values[:window]] if since is None else [])
    spread = math.sqrt(sum(statistics.variance(end) for end in ends) / window)
    noise = student(len(ends) * (window - 1)) * spread
    first = statistics.fmean(curve.values[:window]) if since is None else since
    return Change(first, statistics.fmean(ends[0]), noise, window, len(curve.values))


def mean_with_noise(values: Sequence[float]) -> tuple[float, float]:
    """A mean, and the half width of its 95 % interval."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    return statistics.fmean(values), student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
