"""Small statistics on curves: what changed between the first steps of a run and its last, and what is noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prefopt.core.statistics import student
from prefopt.runs.history import Curve, History

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


@dataclass(frozen=True, slots=True)
class Finding:
    """``name`` says which rule found it; ``look``: something to look at, not only something that happened."""

    name: str
    text: str
    look: bool = False


Check = Callable[[History], Iterator[Finding]]


GREW = 1.25  # times the tokens of the first samples


def _reward(run: History) -> Iterator[Finding]:
    found = change(run.curve("objective/scores"))
    if found is None:
        return
    numbers = (
        f"from {found.first:.4g} to {found.last:.4g} (mean of the first and the last {found.window} of {found.steps}"
        f" steps; noise {found.noise:.2g})"
    )
    far = _kl(run)
    if found.direction > 0:
        yield Finding("reward rose", f"the reward of the policy's samples rose {numbers}{far}")
    elif found.direction < 0:
        yield Finding(
            "reward fell",
            f"the reward of the policy's samples fell {numbers}{far}: so it is with a learning rate that is too large;"
            " try a third of it, or a larger --beta",
            look=True,
        )
    else:
        yield Finding(
            "reward flat",
            f"the reward of the policy's samples did not change beyond noise: {numbers}{far}; a larger --learning-rate,"
            " a smaller --beta or more steps move it",
            look=True,
        )


def _grew(run: History) -> Iterator[Finding]:
    lengths, reward = change(run.curve("val/length")), change(run.curve("objective/scores"))
    if lengths is None or reward is None or lengths.direction <= 0 or reward.direction <= 0:
        return
    if lengths.last > GREW * lengths.first:
        yield Finding(
            "samples grew",
            f"samples grew from {lengths.first:.3g} to {lengths.last:.3g} tokens while the reward rose from"
            f" {reward.first:.3g} to {reward.last:.3g}: the reward may be one of length. prefopt compare reads the win"
            " rate at equal length; a reward model that length does not move, or fewer --max-new-tokens, stop it",
            look=True,
        )


def _kl(run: History) -> str:
    found: Change | None = change(run.curve("objective/kl"))
    return "" if found is None else f", at {found.last:.3g} nats from its reference"


CHECKS: tuple[Check, ...] = (_reward, _grew)
