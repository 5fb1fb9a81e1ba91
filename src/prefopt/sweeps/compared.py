"""The methods of a sweep side by side, as tables: reward at fixed KLs, their differences, areas, dominance, alignment
tax, sensitivity and cost.

>>> points = [Point("reference", "", 0, 0, reward=0.1, kl=0.0, rewards=(0.0, 0.2), kls=(0.0, 0.0))]
>>> points += [Point("dpo", "beta=1", 0, 9, reward=0.5, kl=4.0, rewards=(0.4, 0.6), kls=(3.0, 5.0))]
>>> sweep = Frontier("m", "vader", 2, 4, 48, True, points=tuple(points), kl_at=(1.0, 16.0))
>>> [cell.partition(" ")[0] for cell in tables(sweep)[0].rows[0]]
['dpo', '0.300', 'not', '0.500']
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from prefopt.core.statistics import Interval, holm, p_text
from prefopt.core.terminal import duration, size
from prefopt.sweeps.fixed_kl import Chance, RewardCurve, dominance_by_chance, interpolated, permutation_test, rewards_at
from prefopt.sweeps.points import Frontier, Point, dominates, last_points


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a head, with a title and a note on how to read them."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def tables(sweep: Frontier) -> list[Table]:
    """All tables that the sweep's points can fill."""
    makers = (_done, _at_fixed_kl, _judged, _differences, _areas, _tax, _task, _rates, _costs)
    return [table for make in makers if (table := make(sweep)).rows]


def methods_of(sweep: Frontier) -> list[str]:
    """The methods with an included point, in order."""
    return list(dict.fromkeys(p.method for p in sweep.points if p.included and p.method != "reference"))


def curves_of(sweep: Frontier, method: str, rewards: str = "rewards") -> dict[int, RewardCurve]:
    """The curve of each seed, of the last points of its included trainings; best-of-n is at its bound for every prompt.
    ``rewards``: the field of points that holds them, ``judged`` for those of the judge. None for sweeps of earlier
    versions, which kept no rewards of prompts."""
    start = next((p for p in sweep.points if p.method == "reference"), None)
    found: dict[int, list[Point]] = {}
    for p in last_points(sweep.points):
        if p.method == method and getattr(p, rewards) and (p.kls or p.kl_is == "bound"):
            found.setdefault(p.seed, []).append(p)
    if start is None or not getattr(start, rewards):
        return {}
    return {
        seed: RewardCurve(
            np.array([p.kls or [p.kl or 0.0] * len(p.rewards) for p in points]),
            np.array([getattr(p, rewards) for p in points]),
            np.array(getattr(start, rewards)),
        )
        for seed, points in found.items()
    }


def _done(sweep: Frontier) -> Table:
    """What is missing of an unfinished sweep."""
    rows = [
        (d.method, f"{d.tried} of {d.trials}" if d.trials else "-", f"{d.trained} of {d.trainings}")
        for d in sweep.done
        if not sweep.finished
    ]
    return Table(
        "Finished so far",
        ("method", "trials of rates", "trainings"),
        tuple(rows),
        f"All other tables hold what is finished{_open_rates(sweep)}",
    )


def _open_rates(sweep: Frontier) -> str:
    """By which rate methods are shown that have others to be tried."""
    waiting = {d.method for d in sweep.done if d.tried < d.trials}
    shown = dict.fromkeys((p.method, p.factor) for p in sweep.points if p.method in waiting)
    if not shown:
        return ""
    words = ", ".join(f"{method} at {factor:g} times its rate" for method, factor in shown)
    return f". Methods of which not all rates were tried are shown by the first that was trained: {words}"


def _kl(target: float) -> str:
    return f"at {target:g}"


def _interval(found: Interval | None, sign: str = "") -> str:
    return (
        "not reached" if found is None else f"{found.mean:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"
    )


def _at_fixed_kl(sweep: Frontier) -> Table:
    rows = []
    for method in methods_of(sweep):
        curves = curves_of(sweep, method)
        if not curves:
            continue
        cells = [_interval(found) for found in rewards_at([*curves.values()], sweep.kl_at)]
        best = max((p for p in sweep.points if p.method == method and p.included), key=lambda p: p.reward or 0.0)
        rows.append((method, *cells, f"{best.reward:.3f} at {best.kl:.2f}"))
    return Table(
        "Reward at fixed KL, nats",
        ("method", *map(_kl, sweep.kl_at), "best"),
        tuple(rows),
        "Average over seeds, interpolated between the settings of each; 95 % intervals over prompts, for these"
        " trainings. A KL that a seed does not reach has no number. Best: the most that was reached, and where",
    )


def _judged(sweep: Frontier) -> Table:
    """The same policies by a reward that none was trained on or chosen by."""
    rows = []
    for method in methods_of(sweep):
        if curves := [*curves_of(sweep, method, "judged").values()]:
            cells = [_interval(found) for found in rewards_at(curves, sweep.kl_at)]
            furthest = max((p for p in last_points(sweep.points) if p.method == method), key=lambda p: p.kl or 0.0)
            rows.append((method, *cells, f"{np.mean(furthest.judged):.3f} at {furthest.kl:.2f}"))
    start = next((p.judged for p in sweep.points if p.method == "reference" and p.judged), (math.nan,))
    return Table(
        f"Judged by {sweep.judge}, at fixed KL, nats",
        ("method", *map(_kl, sweep.kl_at), "furthest"),
        tuple(rows),
        f"Mean score of the same samples by a reward that no method saw; {np.mean(start):.3f} of the reference. Where"
        " it stops rising with the reward above, that one is over-optimised. Furthest: the policy of most KL",
    )


def _differences(sweep: Frontier) -> Table:
    rows = []
    for one, other in combinations(methods_of(sweep), 2):
        first, second = (list(curves_of(sweep, m).values()) for m in (one, other))
        if first and second:
            found = rewards_at(first, sweep.kl_at, others=second)
            if any(x is not None for x in found):
                rows.append((f"{one} less {other}", *(_interval(x, "+") for x in found)))
    return Table(
        "Differences of reward at fixed KL",
        ("methods", *map(_kl, sweep.kl_at)),
        tuple(rows),
        "Paired by prompt. Intervals hold one at a time, and for these trainings: the areas say whether seeds agree",
    )


def _areas(sweep: Frontier) -> Table:
    if not sweep.kl_at:
        return Table("", (), (), "")
    limit = sweep.kl_at[-1]
    areas = {m: [c.area(limit) for c in curves_of(sweep, m).values()] for m in methods_of(sweep)}
    trained = [m for m in areas if areas[m] and not _is_bound(sweep, m)]
    pairs = list(combinations(trained, 2))
    corrected = holm([permutation_test(areas[a], areas[b]) for a, b in pairs])
    rows: list[tuple[str, ...]] = [(m, _values(areas[m]), "", "", "") for m in areas if areas[m] and not pairs]
    for (a, b), p in zip(pairs, corrected, strict=True):
        chances = [dominance(sweep, x, y) for x, y in ((a, b), (b, a))]
        rows.append((f"{a}, {b}", f"{_values(areas[a])}; {_values(areas[b])}", p_text(p), *map(_chance, chances)))
    least = min((2 / math.comb(len(areas[a]) + len(areas[b]), len(areas[a])) for a, b in pairs), default=1.0)
    few = ""
    if pairs and least * len(pairs) > 0.05:
        few = f"; with so few seeds even the clearest difference has p = {min(1.0, least * len(pairs)):.2g}"
    return Table(
        f"Area under the frontier to {limit:g} nats, and dominance",
        ("methods", "area of each (over seeds)", "p", "first dominates", "second dominates"),
        tuple(rows),
        "Area: reward above the reference's times nats. p: seeds dealt to the two methods in all ways, corrected for"
        f" {len(pairs)} comparisons (Holm){few}. Dominates: trainings of the other with no more reward at no less KL"
        " than one of its own of that seed; in brackets how many it would be if trainings were dealt at random, and the"
        " chance of as many",
    )


def _is_bound(sweep: Frontier, method: str) -> bool:
    return any(p.kl_is == "bound" for p in sweep.points if p.method == method)


def _values(areas: Sequence[float]) -> str:
    if len(areas) == 1:
        return f"{areas[0]:.2f}"
    return f"{np.mean(areas):.2f} ({min(areas):.2f} to {max(areas):.2f})"


def _chance(found: Chance) -> str:
    return f"{found.beaten} of {found.total} ({found.average:.1f} by chance, p = {found.p:.2f})"


def dominance(sweep: Frontier, by: str, of: str) -> Chance:
    """How many trainings of ``of`` method ``by`` dominates, beside what chance gives."""
    points = [p for p in last_points(sweep.points) if p.method in (by, of)]
    beats = [[dominates(p, q) for q in points] for p in points]
    return dominance_by_chance(beats, [p.seed for p in points], [p.method == by for p in points])


def _tax(sweep: Frontier) -> Table:
    start = next((p.perplexity for p in sweep.points if p.method == "reference"), None)
    rows = []
    for method in methods_of(sweep) if start is not None else ():
        points = [p for p in last_points(sweep.points) if p.method == method]
        if any(p.perplexity is None for p in points):
            continue
        seeds = [[p for p in points if p.seed == seed] for seed in dict.fromkeys(p.seed for p in points)]
        found = np.mean(
            [
                interpolated(
                    np.array([[p.kl or 0.0 for p in of_seed]]),
                    np.array([[p.perplexity or 0.0 for p in of_seed]]),
                    start or 0.0,
                    sweep.kl_at,
                )[0]
                for of_seed in seeds
            ],
            axis=0,
        )
        rows.append((method, *("not reached" if math.isnan(x) else f"{x:.1f}" for x in found.tolist())))
    return Table(
        "Alignment tax: perplexity at fixed KL",
        ("method", *map(_kl, sweep.kl_at)),
        tuple(rows),
        f"Of the reference text; {start or 0:.1f} before. Average over seeds, interpolated as the reward is",
    )


def _task(sweep: Frontier) -> Table:
    """The change of accuracy on a task, question by question. Of trainings measured without it there is no number."""
    start = next((p for p in sweep.points if p.method == "reference" and p.task), None)
    if start is None:
        return Table("", (), (), "")
    rows = []
    for method in methods_of(sweep):
        if curves := _task_curves(sweep, method, start):
            cells = [_interval(found, "+") for found in rewards_at(curves, sweep.kl_at)]
            furthest = max((p for p in last_points(sweep.points) if p.method == method), key=lambda p: p.kl or 0.0)
            rows.append((method, *cells, f"{np.mean(furthest.task) - np.mean(start.task):+.3f} at {furthest.kl:.2f}"))
    return Table(
        "Alignment tax: change of accuracy on the task, at fixed KL",
        ("method", *map(_kl, sweep.kl_at), "furthest"),
        tuple(rows),
        f"Of {len(start.task):,} questions, {np.mean(start.task):.3f} right before. Average over seeds,"
        " interpolated as the reward is; 95 % intervals over questions, and over prompts for the KL. Furthest: the"
        " policy of most KL",
    )


def _task_curves(sweep: Frontier, method: str, start: Point) -> list[RewardCurve]:
    """Curves of the change of each question against the reference; none where a training was not measured."""
    points = [p for p in last_points(sweep.points) if p.method == method]
    if any(len(p.task) != len(start.task) or not p.kls for p in points):
        return []
    before = np.array(start.task)
    seeds = [[p for p in points if p.seed == seed] for seed in dict.fromkeys(p.seed for p in points)]
    return [
        RewardCurve(
            np.array([p.kls for p in of_seed]),
            np.array([np.array(p.task) - before for p in of_seed]),
            np.zeros(len(before)),
            apart=True,
        )
        for of_seed in seeds
    ]


def _rates(sweep: Frontier) -> Table:
    factors = list(dict.fromkeys(t.factor for t in sweep.tuning))
    rows = []
    for method in dict.fromkeys(t.method for t in sweep.tuning):
        of_method = {t.factor: t for t in sweep.tuning if t.method == method}
        known = (of_method.get(f) for f in factors)
        rows.append((method, *("not tried yet" if t is None else _trial(t.area, t.chosen) for t in known)))
    return Table(
        "Sensitivity: area by learning rate",
        ("method", *(f"{f:g} times" for f in factors)),
        tuple(rows),
        f"Equal trials, with the first seed, on {sweep.tune} prompts of their own; * is the rate of all other tables",
    )


def _trial(area: float | None, chosen: bool) -> str:
    return ("diverged" if area is None else f"{area:.2f}") + (" *" if chosen else "")


def _costs(sweep: Frontier) -> Table:
    rows = []
    for method in methods_of(sweep):
        known = [p.costs for p in last_points(sweep.points) if p.method == method and p.costs]
        if known:
            rows.append((method, *_cost_cells(known)))
    return Table(
        "Cost of a training",
        ("method", "models in memory", "forward passes", "tokens trained", "scored", "decoded", "time", "peak memory"),
        tuple(rows),
        "Averages over trainings, a reward model of their own included; of memory the most, of a process that may have"
        " made several trainings. Measuring and the true reward are not counted",
    )


def _cost_cells(known: Sequence[dict[str, float]]) -> Iterator[str]:
    def mean(name: str) -> float:
        return float(np.mean([costs.get(name, 0.0) for costs in known]))

    def most(name: str) -> float:
        return max(costs.get(name, 0.0) for costs in known)

    yield f"{most('models'):.0f}, {size(most('model_bytes'))}"
    yield from (f"{mean(n):,.0f}" for n in ("forward_passes", "trained_tokens", "scored_tokens", "decoded_tokens"))
    yield duration(mean("seconds"))
    yield size(most("peak_memory_bytes"))
