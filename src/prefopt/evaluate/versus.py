"""Two models compared: who won, by how much, and what the samples of both show."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefopt.evaluate.rates import AtEqualLength, WinRate
from prefopt.evaluate.tasks import TaskChange
from prefopt.interval import Interval


@dataclass(frozen=True, slots=True)
class Versus:
    """Two models: how often the first won, at any length and read at equal length; by category, where one is named.

    ``empty``: comparisons decided by one response having no words, without the judge. ``longer``: characters that the
    first's responses have more than the second's, over prompts; none for too few. ``tasks``: what they know elsewhere.
    """

    first: str
    second: str
    rate: WinRate
    equal_length: AtEqualLength | None
    categories: dict[str, WinRate] = field(default_factory=dict)
    empty: int = 0
    longer: Interval | None = None
    tasks: list[TaskChange] = field(default_factory=list)
