"""Expected reward against divergence: measured points, dominance between them, and their file.

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from prefopt.core.files import printable, read_json, typed, write_json
from prefopt.core.shown import ShownLines
from prefopt.core.statistics import mean_interval

VERSION = 1
LISTS = ("rewards", "kls", "earlier", "judged", "task")
"""Fields of a point with a number for each prompt or question."""
FILE = "frontier.json"
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Plateau:
    """Whether a PPO training had stopped raising the true reward on the held-out prompts, see :func:`plateau`.

    ``rise`` is the gain over its last ``steps`` with bounds ``low`` and ``high`` (95 %), ``climb`` the gain over the
    whole training. ``reached``: the upper bound is below ``share`` of the climb.
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
        """``plateau``, ``still rising``, ``falling``, or ``cannot be told`` where noise hides which."""
        if self.reached:
            return "plateau"
        return "still rising" if self.low > 0 else "falling" if self.high < 0 else "cannot be told"

    @property
    def why_not(self) -> str | None:
        """Why the training is excluded, with the numbers; None where it is included."""
        if self.reached:
            return None
        moved = f"{'rose' if self.rise > 0 else 'fell'} by {abs(self.rise):.3g} in its last {self.steps} steps"
        change = f"{moved} (95 % interval {self.low:+.3g} to {self.high:+.3g}), after a climb of {self.climb:.3g}"
        if self.verdict != "cannot be told":
            return f"no plateau: the true reward still {change}"
        return f"noise hides whether there is a plateau: the true reward {change}; try more --num or --held-out"


@dataclass(frozen=True, slots=True)
class Trial:
    """A ``factor`` on the learning rate of a method, tried with all its settings and one seed: the ``area`` under their
    frontier on the prompts for that, None where all diverged, and whether it was ``chosen``."""

    method: str
    factor: float
    area: float | None
    chosen: bool


@dataclass(frozen=True, slots=True)
class Done:
    """How many of a method's trials of rates, ``tried`` of ``trials``, and of its trainings, ``trained`` of
    ``trainings``, are finished. Without rates to choose from there are no trials."""

    method: str
    tried: int
    trials: int
    trained: int
    trainings: int

    @property
    def complete(self) -> bool:
        return (self.tried, self.trained) == (self.trials, self.trainings)


@dataclass(frozen=True, slots=True)
class Point:
    """One policy, measured on its own samples for prompts that no method was trained on.

    ``setting`` is what was swept (``beta=0.1``). ``reward`` is the mean true reward, ``interval`` its bounds (95 %,
    prompts resampled); ``kl`` the divergence from the reference in nats per response, with its standard error over
    prompts, or an upper bound (``kl_is``); ``length`` tokens per response; ``seconds`` the training time, including a
    reward model of its own, None where unknown. ``counted`` is False, with ``why_not``, for an excluded point.

    ``factor``: on the learning rate. ``rewards`` and ``kls`` are those of each prompt, ``kls`` empty for a bound.
    ``judged``: scores of each prompt by a second reward. ``task``: whether each question of a task is answered right.
    ``perplexity``: of the text of ``--perplexity``. ``costs``: :class:`prefopt.model.costs.Costs` of its trainings.
    ``earlier``: of PPO and RLOO, the rewards of each prompt at ``earlier_step``, which show a plateau.
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
    factor: float = 1.0
    rewards: tuple[float, ...] = ()
    kls: tuple[float, ...] = ()
    perplexity: float | None = None
    costs: dict[str, float] = field(default_factory=dict)
    earlier: tuple[float, ...] = ()
    earlier_step: int = 0
    judged: tuple[float, ...] = ()
    task: tuple[float, ...] = ()

    @property
    def included(self) -> bool:
        """Whether it counts and has numbers: then it is compared with others."""
        return self.counted and self.reward is not None and self.kl is not None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """What ``asdict`` wrote. Raises ``TypeError`` and ``ValueError`` for other names, types or ranges."""
        plateau = values.get("plateau")
        lists = {name: tuple(values.get(name, ())) for name in LISTS}
        point = parse_result(cls, {**values, **lists, "plateau": None if plateau is None else typed(Plateau, plateau)})
        if point.kl_se is not None and point.kl_se < 0:
            raise ValueError(f"kl_se is {point.kl_se!r:.80}")
        return point


@dataclass(frozen=True, slots=True, repr=False)
class Frontier(ShownLines):
    """All points of a sweep: ``samples`` responses of at most ``max_new_tokens`` to each of ``prompts`` prompts.
    ``made`` describes the preferences. ``kl_at``: KLs to compare methods at. ``tuning``: how rates were chosen, on
    ``tune`` prompts of their own. ``judge``: a second reward, that no method was trained on. ``seconds``: processor
    seconds of each training, where their number is what all have in common, not that of responses. ``task``: the data
    of a task that every policy answers. ``done``: how far each method has come."""

    reference: str
    reward: str
    prompts: int
    samples: int
    max_new_tokens: int
    finished: bool
    made: str = ""
    points: tuple[Point, ...] = field(default=())
    kl_at: tuple[float, ...] = ()
    tune: int = 0
    tuning: tuple[Trial, ...] = ()
    judge: str | None = None
    seconds: float | None = None
    task: tuple[str, ...] | None = None
    done: tuple[Done, ...] = ()

    def lines(self) -> Iterator[str]:
        """The points, their comparisons, and what they say."""
        from prefopt.sweeps.report import lines  # which reads points

        yield from lines(self)

    def write(self, folder: Path) -> Path:
        """Write ``frontier.json`` in ``folder``. Raises :class:`prefopt.errors.RunError`."""
        write_json(folder / FILE, {"version": VERSION, **asdict(self)})
        return folder / FILE


def read_frontier(path: str | Path) -> Frontier:
    """The sweep in a folder or a file. Raises :class:`RunError` where there is none, or of another version."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    return read_json(file, _sweep, "run prefopt frontier again")


def _sweep(found: dict[str, Any]) -> Frontier:
    if (version := found.pop("version")) != VERSION:
        raise ValueError(f"it is of version {version}, and this prefopt reads version {VERSION}")
    found = printable(found)
    points = tuple(Point.from_dict(p) for p in found.pop("points"))
    tuning = tuple(typed(Trial, t) for t in found.pop("tuning", ()))
    done = tuple(typed(Done, d) for d in found.pop("done", ()))
    task = None if (names := found.pop("task", None)) is None else tuple(names)
    lists = {"points": points, "tuning": tuning, "done": done, "task": task, "kl_at": tuple(found.pop("kl_at", ()))}
    return typed(Frontier, {**found, **lists})


def parse_result(kind: type[Result], values: Mapping[str, Any]) -> Result:
    """The dataclass of one policy, also as first versions wrote it (``road``). Raises as :func:`typed`."""
    given = {"method" if name == "road" else name: value for name, value in values.items()}
    interval = given.get("interval")
    return typed(kind, {**given, "interval": None if interval is None else tuple(interval)})


def dominates(one: Point, other: Point, *, clearly: bool = False) -> bool:
    """Whether ``one`` has at least the reward of ``other`` at no more KL, and differs in one of them.

    ``clearly``: beyond the errors, with disjoint intervals of reward, and KL apart by two standard errors of each.
    False where a point is excluded or has no numbers.
    """
    if not (one.included and other.included):
        return False
    assert one.reward is not None and one.kl is not None and other.reward is not None and other.kl is not None
    if clearly:
        if one.interval is None or other.interval is None:
            return False
        kl_apart = one.kl + 2 * (one.kl_se or 0) < other.kl - 2 * (other.kl_se or 0)
        return one.interval[0] > other.interval[1] and kl_apart and one.reward >= other.reward
    return one.reward >= other.reward and one.kl <= other.kl and (one.reward, one.kl) != (other.reward, other.kl)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates, by increasing KL."""
    included = [p for p in points if p.included]
    best = [p for p in included if not any(dominates(q, p) for q in included)]
    return sorted(best, key=lambda p: (p.kl or 0.0, -(p.reward or 0.0)))


def dominated(points: Sequence[Point], by: str, of: str, *, clearly: bool = False) -> tuple[int, int]:
    """How many trainings of method ``of`` are dominated by one of method ``by``, and how many there are.

    Only last points of trainings of the same seed are compared: else a method with more checkpoints or seeds would
    have more chances. Untrained points (step 0) have no seed of their own.
    """
    last = last_points(points)
    ours = [p for p in last if p.method == by]
    theirs = [p for p in last if p.method == of]
    meets = [[p for p in ours if p.seed == q.seed or 0 in (p.step, q.step)] for q in theirs]
    beaten = [any(dominates(p, q, clearly=clearly) for p in met) for q, met in zip(theirs, meets, strict=True)]
    return sum(beaten), len(theirs)


def last_points(points: Sequence[Point]) -> list[Point]:
    """The last point of each training, where it is included."""
    last = {(p.method, p.setting, p.seed): p for p in sorted(points, key=lambda p: p.step)}
    return [p for p in last.values() if p.included]


def plateau(before_P: npt.ArrayLike, after_P: npt.ArrayLike, *, start: float, steps: int, share: float) -> Plateau:
    """Test a training for a plateau, from the mean reward of each prompt [prompts] ``steps`` before its end and at it.

    An equivalence test: the upper bound of the rise (95 % interval of the mean difference, prompts resampled) is below
    ``share`` of the climb from ``start``, and the reward does not clearly fall (the whole interval is below 0) by what
    may be as much; a smaller fall is a plateau. The same held-out prompts are used twice, so their differences cancel.
    Raises ``ValueError`` for fewer than two prompts.
    """
    before, after = np.asarray(before_P, np.float64), np.asarray(after_P, np.float64)
    rise = mean_interval(after - before)
    climb = float(after.mean()) - start
    small = share * climb
    reached = rise.high < small and (rise.high >= 0 or rise.low > -small)
    return Plateau(rise.mean, rise.low, rise.high, climb, steps, bool(reached), share)
