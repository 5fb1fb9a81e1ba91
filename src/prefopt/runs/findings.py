"""What a rule finds in the metrics of a run, and the change of a metric with its noise."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from prefopt.core.statistics import student
from prefopt.runs.history import Curve

LEAST = 4  # steps in a window: fewer say nothing about their spread


@dataclass(frozen=True, slots=True)
class Finding:
    """``name`` is that of the rule; ``look``: the reader should look into it."""

    name: str
    text: str
    look: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """The averages of a metric over the first and the last ``window`` steps.

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
    """The change over a run, from a tenth of its steps at either end; None where there are too few steps.

    ``since`` is the value before training where it is known exactly. It replaces the first window, so that what
    changed within that counts too.
    """
    window = max(LEAST, math.ceil(len(curve.values) / 10))
    if len(curve.values) < 2 * window:
        return None
    ends = [curve.values[-window:]] + ([curve.values[:window]] if since is None else [])
    spread = math.sqrt(sum(statistics.variance(end) for end in ends) / window)
    noise = student(len(ends) * (window - 1)) * spread
    first = statistics.fmean(curve.values[:window]) if since is None else since
    return Change(first, statistics.fmean(ends[0]), noise, window, len(curve.values))
