"""Expected reward against divergence: points that were measured, which of them dominate which, and their file.

>>> a = Point("dpo", "beta=0.1", 0, 50, reward=0.6, interval=(0.5, 0.7), kl=4.0, kl_se=0.5)
>>> b = Point("ppo", "kl_target=6", 0, 80, reward=0.4, interval=(0.3, 0.5), kl=6.0, kl_se=0.5)
>>> dominates(a, b), dominates(b, a), [p.method for p in frontier([a, b])]
(True, False, ['dpo'])

>>> around = np.linspace(-0.1, 0.1, 40)
>>> plateau(0.6 + 0 * around, 0.6 + around, start=0.2, steps=20, share=0.2).verdict
'plateau'
>>> plateau(0.4 + 0 * around, 0.6 + around, start=0.2, steps=20, share=0.2).verdict
'still rising'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prefopt.core.files import printable, read_json, typed, write_json
from prefopt.core.statistics import mean_interval

VERSION = 1
FILE = "frontier.json"


@dataclass(frozen=True, slots=True)
class Plateau:
    """Whether a training had stopped raising the true reward on the held-out prompts.

    ``rise`` is what its last ``steps`` gained, ``low`` and ``high`` its bounds at 95 %; ``climb`` is what the training
    gained in all. ``reached``: the upper bound is below ``share`` of the climb, see
    :func:`prefopt.sweeps.points.plateau`.
    """

    rise: float
    low: float
    high: float
    climb: float
    steps: int
    reached: bool
    share: float

    @property
    def verdict(self) -> str:
        """In words: ``plateau``, ``still rising``, ``falling``, or ``cannot be told`` where the noise hides which."""
        if self.reached:
            return "plateau"
        return "still rising" if self.low > 0 else "falling" if self.high < 0 else "cannot be told"

    @property
    def why_not(self) -> str | None:
        """Why the training does not count, with the numbers; none where it does."""
        if self.reached:
            return None
        word = "rose" if self.rise > 0 else "fell"
        did = f"{word} by {abs(self.rise):.3g} in its last {self.steps} steps"
        did += f" (95 % interval {self.low:+.3g} to {self.high:+.3g})"
        did += f", after a climb of {self.climb:.3g}"
        if self.verdict != "cannot be told":
            return f"no plateau: the true reward still {did}"
        more = f"; about {self.more} times as many samples (--num, --held-out) could tell" if self.more else ""
        return f"whether there is a plateau cannot be told: the true reward {did}{more}"

    @property
    def more(self) -> int | None:
        """Where noise hides it: how many times as many samples would show a plateau in four of five trainings that have
        one, as the width of the interval falls with their root; none where no number up to 100 would."""
        if self.climb <= 0 or self.verdict != "cannot be told":
            return None
        width = (self.high - self.low) / 2 / (self.share * self.climb)
        times = math.ceil((1 + 0.84 / 1.96) ** 2 * width**2)
        return times if 1 < times <= 100 else None


@dataclass(frozen=True, slots=True)
class Point:
    """One policy, measured on samples of its own to prompts that no method was trained on.

    ``method`` is how it was made, ``setting`` what was swept (``beta=0.1``), ``step`` the step of its training.
    ``reward`` is the mean true reward, ``interval`` its bounds (95 %, prompts resampled); ``kl`` the divergence of
    whole responses from the reference in nats, with its standard error over prompts, or, where ``kl_is`` says so, an
    upper bound without one; ``length`` tokens of a response on average; ``seconds`` what training took to get here,
    a reward model of its own included, and none where that is not known. A point that does not count says why; one
    that has no numbers, since its training failed, never does.
    """

    method: str
    setting: str
    seed: int
    step: int
    reward: float | None = None
    interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_se: float | None = None
    kl_is: Literal["measured", "bound"] = "measured"
    length: float | None = None
    counted: bool = True
    why_not: str | None = None
    folder: str = ""
    seconds: float | None = 0.0
    plateau: Plateau | None = None

    @property
    def stands(self) -> bool:
        """Whether it is compared with others: it counts, and has numbers."""
        return self.counted and self.reward is not None and self.kl is not None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """What ``asdict`` wrote. Raises ``TypeError`` and ``ValueError`` for other names, types or ranges."""
        given = {
            "method" if name == "road" else name: value for name, value in values.items()
        }  # as first versions wrote
        if given.get("interval") is not None:
            given["interval"] = tuple(given["interval"])
        if given.get("plateau") is not None:
            given["plateau"] = typed(Plateau, given["plateau"])
        point = typed(cls, given)
        if point.kl_se is not None and point.kl_se < 0:
            raise ValueError(f"kl_se is {point.kl_se!r:.80}")
        return point


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points of a sweep. ``prompts`` were answered ``samples`` times each, of at most ``max_new_tokens``.

    ``finished``: no point is still to come. ``made``: how the preferences came to be, in words.
    """

    reference: str
    reward: str
    prompts: int
    samples: int
    max_new_tokens: int
    finished: bool
    made: str = ""
    points: tuple[Point, ...] = field(default=())

    def write(self, folder: Path) -> Path:
        """``frontier.json`` in ``folder``, whole or not at all. Raises :class:`prefopt.errors.RunError`."""
        path = folder / FILE
        write_json(path, {"version": VERSION, **asdict(self)})
        return path


def read_frontier(path: str | Path) -> Frontier:
    """The sweep in a folder or a file. Raises :class:`RunError` where there is none, or of another version."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    return read_json(file, _sweep, "run prefopt frontier again")


def _sweep(found: dict[str, Any]) -> Frontier:
    if (version := found.pop("version")) != VERSION:
        raise ValueError(f"it is of version {version}, and this prefopt reads version {VERSION}")
    found = printable(found)
    points = tuple(Point.from_dict(p) for p in found.pop("points"))
    return typed(Frontier, {**found, "points": points})


def dominates(one: Point, other: Point) -> bool:
    """Whether ``one`` has at least the reward of ``other`` at no more divergence, and is not equal in both.

    By the numbers as they are, whatever their errors; see :func:`clearly_dominates`. False where one does not stand.
    """
    if not (one.stands and other.stands):
        return False
    assert one.reward is not None and one.kl is not None and other.reward is not None and other.kl is not None
    return one.reward >= other.reward and one.kl <= other.kl and (one.reward, one.kl) != (other.reward, other.kl)


def clearly_dominates(one: Point, other: Point) -> bool:
    """The same beyond the errors: intervals of reward apart, and divergences by two standard errors of each."""
    if not dominates(one, other) or one.interval is None or other.interval is None:
        return False
    assert one.kl is not None and other.kl is not None
    return one.interval[0] > other.interval[1] and one.kl + 2 * (one.kl_se or 0) < other.kl - 2 * (other.kl_se or 0)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that none other dominates, by rising divergence."""
    standing = [p for p in points if p.stands]
    best = [p for p in standing if not any(dominates(q, p) for q in standing)]
    return sorted(best, key=lambda p: (p.kl or 0.0, -(p.reward or 0.0)))


def dominated(points: Sequence[Point], by: str, of: str, *, clearly: bool = False) -> tuple[int, int]:
    """How many points of method ``of`` a point of method ``by`` dominates, and how many ``of`` has that count.

    Of each training the last point alone, and only against those of the same seed: a method with more checkpoints or
    seeds would have more chances. What nothing was trained for (step 0) has no seed of its own.
    """
    better = clearly_dominates if clearly else dominates
    ends = last_points(points)
    ours = [p for p in ends if p.method == by and p.stands]
    theirs = [p for p in ends if p.method == of and p.stands]
    meets = [[p for p in ours if p.seed == q.seed or 0 in (p.step, q.step)] for q in theirs]
    return sum(any(better(p, q) for p in met) for q, met in zip(theirs, meets, strict=True)), len(theirs)


def last_points(points: Sequence[Point]) -> list[Point]:
    """Of each training (method, setting, seed) the point of its last step, whether it counts or not."""
    last: dict[tuple[str, str, int], Point] = {}
    for p in points:
        key = p.method, p.setting, p.seed
        if key not in last or p.step > last[key].step:
            last[key] = p
    return list(last.values())


def plateau(before_P: npt.ArrayLike, after_P: npt.ArrayLike, *, start: float, steps: int, share: float) -> Plateau:
    """From the mean reward of each prompt [prompts] ``steps`` before the end of a training, and at its end.

    A test of equivalence: the reward has reached a plateau where even the upper bound of its rise over these steps (95
    % interval of the mean difference, prompts resampled) is below ``share`` of the climb, from ``start`` where the
    training began to its end, and it does not surely fall by as much. That no rise can be seen in the noise is not
    enough. Prompts are those that were not trained on, the same ones twice, so that what differs between them is not
    in the way. Raises ``ValueError`` for fewer than two.
    """
    before, after = np.asarray(before_P, np.float64), np.asarray(after_P, np.float64)
    rise = mean_interval(after - before)
    climb = float(after.mean()) - start
    small = share * climb
    reached = rise.high < small and (rise.high >= 0 or rise.low > -small)
    return Plateau(rise.mean, rise.low, rise.high, climb, steps, bool(reached), share)
