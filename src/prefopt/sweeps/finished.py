"""What is finished of a sweep, from its folder alone: the points of its trainings, the rates that were tried, and how
much of each method is missing. Nothing is trained or loaded for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.frontier import ONLINE, TRAINED_BY, FrontierConfig, Training
from prefopt.core.files import parsed, read_json
from prefopt.errors import RunError
from prefopt.model.costs import combine_costs
from prefopt.runs.history import POINTS, RECORD, History, read_history, read_record
from prefopt.sweeps.data import made_from
from prefopt.sweeps.fixed_kl import area_under
from prefopt.sweeps.points import Done, Frontier, Point, Trial, plateau

TUNE = "tune"
"""Folder of the policies on the prompts for choosing rates, in folders of their trainings' names."""
SAMPLES = "samples"
"""``samples.jsonl`` is drawn from the final policy, ``samples-84.jsonl`` from that of step 84."""


def finished_points(config: FrontierConfig) -> Frontier:
    """The sweep in the folder of ``config``, as far as it has come. Of a method with rates still to be tried, the
    trainings at the first rate that has any are the results so far. The task is named where the reference answered it.
    Raises :class:`RunError` where not even the reference was measured, and for a damaged file."""
    folder = Path(config.output)
    start = read_points(folder / "reference")
    if not start or start[0].reward is None:
        raise RunError(f"{folder}: the reference was not measured yet: run prefopt frontier without --report-only")
    trials = list(config.trials())
    tuning = tried_rates(config, trials)
    trainings = planned(config, tuning)
    found = [point for one in trainings for point in _points_of(config, one, start[0].reward)]
    done = _done(config, trials, trainings)
    return Frontier(
        config.model,
        config.reward,
        config.held_out,
        config.num,
        config.max_new_tokens,
        all(d.complete for d in done),
        made_from(config),
        (*start, *found),
        config.targets,
        config.tune or 0,
        tuple(tuning),
        config.judge,
        config.seconds,
        tuple(config.task) if config.task is not None and start[-1].task else None,
        done,
    )


def tried_rates(config: FrontierConfig, trials: Sequence[Training]) -> list[Trial]:
    """The rates of which every setting was tried; the best is chosen once all of a method were."""
    folder = Path(config.output) / TUNE
    start = read_points(folder / "reference")
    if not start:
        return []
    tried = {one: read_points(folder / one.folder) for one in trials}
    open_rates = {(one.method, one.factor) for one, points in tried.items() if not points}
    points = [p for one, of_one in tried.items() if (one.method, one.factor) not in open_rates for p in of_one]
    assert start[0].reward is not None
    return chosen_rates(points, start[0].reward, config.targets[-1], {method for method, _ in open_rates})


def planned(config: FrontierConfig, tuning: Sequence[Trial]) -> list[Training]:
    """All trainings: at the chosen rates; where none is chosen yet, at the first one that has points."""
    chosen = {trial.method: trial.factor for trial in tuning if trial.chosen}
    rates = {method: chosen.get(method) or _first_trained(config, method) for method in TRAINED_BY}
    return list(config.trainings(rates))


def _first_trained(config: FrontierConfig, method: str) -> float:
    """The first rate at which a training of the first seed has points, the one as given before all others."""
    factors = sorted(config.factors, key=lambda factor: factor != 1.0)
    for factor in factors:
        for one in config.trainings({method: factor}):
            if (one.method, one.seed) == (method, config.seed) and _is_measured(config, one):
                return factor
    return factors[0]


def _is_measured(config: FrontierConfig, one: Training) -> bool:
    return (Path(config.output) / one.folder / POINTS).exists()


def _points_of(config: FrontierConfig, one: Training, start: float) -> list[Point]:
    folder = Path(config.output) / one.folder
    if one.kind is None:
        return read_points(folder)
    before = [config.reward_folder(one.seed)] if one.learned else []
    share = config.plateau_share
    return [update_point(p, folder, start=start, share=share, before=before) for p in read_points(folder)]


def _done(config: FrontierConfig, trials: Sequence[Training], trainings: Sequence[Training]) -> tuple[Done, ...]:
    folder = Path(config.output)
    found = []
    for method in dict.fromkeys(one.method for one in trainings):
        tried = [(folder / TUNE / one.folder / POINTS).exists() for one in trials if one.method == method]
        trained = [_is_measured(config, one) for one in trainings if one.method == method]
        found.append(Done(method, sum(tried), len(tried), sum(trained), len(trained)))
    return tuple(found)


# -- rates ------------------------------------------------------------------------------------------------------


def chosen_rates(
    points: Sequence[Point], start: float, limit: float, open_methods: Collection[str] = ()
) -> list[Trial]:
    """Every rate that was tried, by method. The best has the largest area under its points' frontier, from the reward
    ``start`` of the reference to a KL of ``limit``; of equally good ones, and where all diverged, it is the first. None
    is chosen of ``open_methods``, which have rates that are still to be tried."""
    found: list[Trial] = []
    for method in dict.fromkeys(p.method for p in points):
        areas: dict[float, float | None] = {}
        for factor in dict.fromkeys(p.factor for p in points if p.method == method):
            known = [p for p in points if (p.method, p.factor) == (method, factor) and p.included]
            kls, rewards = [p.kl or 0.0 for p in known], [p.reward or 0.0 for p in known]
            areas[factor] = area_under(kls, rewards, start, limit) if known else None
        best = max(areas, key=lambda factor: -math.inf if (area := areas[factor]) is None else area)
        decided = method not in open_methods
        found += [Trial(method, factor, area, decided and factor == best) for factor, area in areas.items()]
    return found


# -- points -----------------------------------------------------------------------------------------------------


def read_points(folder: Path) -> list[Point]:
    """The points of a training, none where they are not made yet. Raises :class:`RunError` for a damaged file."""

    def parse(found: list[dict[str, Any]]) -> list[Point]:
        if not found:
            raise ValueError("it holds no point")
        # Plateaus are recomputed; first versions kept another object here.
        return [Point.from_dict({**p, "plateau": None}) for p in found]

    file = folder / POINTS
    return read_json(file, parse, f"remove {folder} to redo it") if file.exists() else []


# -- what follows from a run folder, recomputed each time -------------------------------------------------------


def update_point(point: Point, folder: Path, *, start: float, share: float, before: Sequence[Path] = ()) -> Point:
    """Recompute a point's training time and costs, and of PPO and RLOO its plateau, from its run folder.

    ``start`` (the reward of the reference) and ``share`` are those of :func:`prefopt.sweeps.points.plateau`, ``before``
    the run folders whose time counts too. Raises :class:`prefopt.errors.RunError` for a damaged folder.
    """
    if not point.costs or (folder / RECORD).exists():  # else it was made elsewhere, and says so itself
        point = replace(point, seconds=_seconds(point, folder, before), costs=_costs(folder, before))
    if TRAINED_BY.get(point.method) not in ONLINE or point.reward is None:
        return point
    if point.earlier:
        return _tested(point, point.earlier, point.rewards, point.earlier_step, start=start, share=share)
    steps = sorted(int(p.stem.removeprefix(f"{SAMPLES}-")) for p in folder.glob(f"{SAMPLES}-*.jsonl"))
    if not steps:
        why_not = f"{point.step} steps, and no samples of an earlier one: a plateau cannot be tested"
        return replace(point, plateau=None, counted=False, why_not=why_not)
    earlier, end = (_rewards(folder / name) for name in (f"{SAMPLES}-{steps[-1]}.jsonl", f"{SAMPLES}.jsonl"))
    if len(earlier) != len(end):
        raise RunError(f"{folder}: its samples answer other prompts at step {steps[-1]} than at the end; remove it")
    return _tested(point, earlier, end, steps[-1], start=start, share=share)


def _tested(
    point: Point, earlier: Sequence[float], end: Sequence[float], at: int, *, start: float, share: float
) -> Point:
    """``point`` counts where its reward was on a plateau since the step ``at``."""
    flat = plateau(earlier, end, start=start, steps=point.step - at, share=share)
    return replace(point, plateau=flat, counted=flat.reached, why_not=flat.why_not)


def _seconds(point: Point, folder: Path, before: Sequence[Path]) -> float | None:
    """Training time up to the point's step; None where a folder does not say."""
    if not all((path / RECORD).exists() for path in (folder, *before)):
        return None
    history = read_history(folder)
    times = [_run_seconds(history), *(_run_seconds(read_history(path)) for path in before)]
    known = [t for t in times if t is not None]
    after = sum(line.get("step_seconds") or 0.0 for line in history.training if line["step"] > point.step > 0)
    return sum(known) - after if len(known) == len(times) else None


def _costs(folder: Path, before: Sequence[Path]) -> dict[str, float]:
    """What the whole training cost, with the runs before it; empty where a folder does not say."""
    records = [read_record(path).get("costs") for path in (folder, *before) if (path / RECORD).exists()]
    known = [costs for costs in records if costs]
    return combine_costs(known) if len(known) == 1 + len(before) else {}


def _run_seconds(history: History) -> float | None:
    """Time of all processes of a run. First versions lost that before a kill: then the steps' times are more."""
    steps, costs = history.curve("step_seconds").values, history.record.get("costs", {})
    known = ([float(costs["seconds"])] if "seconds" in costs else []) + ([sum(steps)] if steps else [])
    return max(known, default=None)


def _rewards(file: Path) -> list[float]:
    """The mean true reward of every prompt."""
    try:
        with file.open("rb") as lines:  # texts may hold characters at which splitlines() would part them
            return [float(np.mean(parsed(line)["scores"])) for line in lines]
    except Exception as error:  # a row that something else wrote fails in any way
        raise RunError(f"{file} cannot be read ({error}); remove its folder to measure again") from None
