"""``prefopt frontier``: every method at every setting, each trained into its own folder and measured alike.

The results of a training are kept in ``points.json`` of its folder: a stopped sweep continues where it was, and new
methods, settings or seeds are added. Any other change of options is refused: points would not be comparable.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.frontier import ONLINE, TRAINED_BY, FrontierConfig, Training
from prefopt.config.methods import MethodConfig
from prefopt.config.ppo import PpoConfig
from prefopt.core.files import parsed, read_json, write_json
from prefopt.core.terminal import Reporter
from prefopt.errors import ConfigError, Diverged, RunError
from prefopt.generate.model_io import SampledModel
from prefopt.generate.rewards import best_of_n_kl
from prefopt.methods.rlhf import started_again
from prefopt.model.costs import combine_costs
from prefopt.model.load import local_folder
from prefopt.model.precision import scoring_dtype
from prefopt.runs.callbacks import Callback, Metrics, RunInfo
from prefopt.runs.history import RECORD, History, read_history, read_record
from prefopt.sweeps.data import Measure, Measurement, prepare_data, true_reward
from prefopt.sweeps.fixed_kl import area_under
from prefopt.sweeps.points import Frontier, Point, Trial, plateau
from prefopt.sweeps.timing import TIMED, steps_within, timed
from prefopt.sweeps.train import model_of, take_folder, train_once
from prefopt.train import checkpoint
from prefopt.train.loss_options import losses_of
from prefopt.train.named_adapter import with_base
from prefopt.train.policy import Policy

POINTS = "points.json"
TUNE = "tune"
"""Folder of the policies on the prompts for choosing rates, in folders of their trainings' names."""
SAMPLES = "samples"
"""``samples.jsonl`` is drawn from the final policy, ``samples-84.jsonl`` from that of step 84."""
MAY_GROW = {"methods", "seeds", "plateau_share", "kl_at", "progress", "output", "threads"}
"""Options that may change when a sweep is continued: they add points, or change only how points are reported."""


def run(config: FrontierConfig) -> Frontier:
    """Make all points that are not done yet; ``frontier.json`` is written after each training. Raises
    :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop; the same command continues.
    A diverged training is an excluded point."""
    with started_again():
        return _FrontierSweep(config).run()


@dataclass
class _SaveAt(Callback):
    steps: Sequence[int]

    def on_step(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        if step in self.steps:
            run.save()


class _FrontierSweep:
    def __init__(self, config: FrontierConfig) -> None:
        self.config, self.reporter = config, Reporter(config.progress)
        self.folder = Path(config.output)

    def prepare(self) -> None:
        """Take the folder, and make all that the trainings have in common."""
        config = self.config
        for one in config.trainings():  # options of losses are checked before anything runs
            if one.kind == "dpo":
                losses_of(config.config_of(one, data=["data"], prompts="prompts", each=2.0))
        take_folder(config, MAY_GROW, judge=config.judge)
        self.reference = SampledModel(config.model, device=config.device, dtype=scoring_dtype(config.dtype))
        self.data = prepare_data(config, self.reference, self.reporter, tune=config.tune or 0)
        self.reward = true_reward(config)
        judge = true_reward(config, config.judge) if config.judge is not None else None
        self.measure = Measure(config, self.data.held_out, self.reference, self.reward, config.perplexity, judge)
        self.steps = self._equal_cost()

    def run(self) -> Frontier:
        config = self.config
        self.prepare()
        self._once(self.folder / "reference", self._start)
        self.tuning = self._choose()
        rates = {trial.method: trial.factor for trial in self.tuning if trial.chosen}
        trainings = list(config.trainings(rates))
        for n, one in enumerate(trainings, 1):
            folder = self.folder / one.folder
            done = f", done already{self._other_steps(one, folder)}" if (folder / POINTS).exists() else ""
            self.reporter.say(f"{n} of {len(trainings)}: {one.method} {one.setting}, seed {one.seed}{done}")
            self._once(folder, partial(self._points, one, folder))
            self._write(trainings, finished=False)
        self.reference.release()
        return self._write(trainings, finished=True)

    # -- learning rates ----------------------------------------------------------------------------------------

    def _choose(self) -> list[Trial]:
        """Try every rate of every method with the first seed, equally often, on prompts that no result is reported of.
        The best one has the largest area under its settings' frontier there."""
        trials, config = list(self.config.trials()), self.config
        if not trials:
            return []
        assert self.data.tune is not None
        measure = Measure(config, self.data.tune, self.reference, self.reward)
        start = self._tuned("reference", lambda file: measure(config.model, file), Point("reference", "", 0, 0))
        points = []
        for n, one in enumerate(trials, 1):
            self.reporter.say(f"rate {n} of {len(trials)}: {one.method} {one.setting}, {one.factor:g} times its rate")
            points.append(self._trial(one, measure))
        assert start.reward is not None
        found = chosen_rates(points, start.reward, config.targets[-1])
        chosen = {trial.method: trial.factor for trial in found if trial.chosen}
        for one in trials:
            if one.factor != chosen[one.method]:
                shutil.rmtree(self.folder / one.folder / "checkpoints", ignore_errors=True)
        return found

    def _trial(self, one: Training, measure: Measure) -> Point:
        """The end of a training on the prompts for choosing rates. Its checkpoints stay, since it may be chosen."""
        point = Point(one.method, one.setting, one.seed, 0, factor=one.factor)
        return self._tuned(one.folder, lambda file: measure(file=file, **model_of(self._train(one))), point)

    def _tuned(self, name: str, make: Callable[[Path], Measurement], point: Point) -> Point:
        folder = self.folder / TUNE / name
        file = folder / POINTS
        if not file.exists():
            try:
                point = replace(point, **asdict(make(folder / f"{SAMPLES}.jsonl")))
            except Diverged as error:
                point = replace(point, counted=False, why_not=error.reason)
            write_json(file, [asdict(point)])
        return _read(folder)[0]

    def _other_steps(self, one: Training, folder: Path) -> str:
        """A note where another version, which divided the steps otherwise, trained for another number of them."""
        done = max(point.step for point in _read(folder))
        steps = self.config.marks(self._config_of(one))[-1] if one.kind is not None else done
        if done in (0, steps):  # a training that diverged has no step
            return ""
        return f" (by another version: {done} steps, not {steps}; remove {folder} to redo it)"

    def _config_of(self, one: Training, steps: int | None = None) -> MethodConfig:
        data, prompts = [str(self.data.preferences)], str(self.data.train)
        steps = steps or self.steps.get((one.method, one.setting))
        return self.config.config_of(one, data=data, prompts=prompts, each=self.data.each, steps=steps)

    def _reward_config(self, one: Training) -> MethodConfig:
        return self.config.reward_config(one.seed, data=[str(self.data.preferences)], each=self.data.each)

    def _equal_cost(self) -> dict[tuple[str, str], int]:
        """Steps by method and setting, where ``--seconds`` says how long each may take, with its reward model if it
        has one. Every setting is timed: some change what a step costs. A reward model is trained before, since PPO
        cannot be timed without."""
        config = self.config
        if config.seconds is None:
            return {}
        if self.reference.device.type != "cpu":
            raise ConfigError("--seconds counts processor seconds, which a GPU does not spend: give --device cpu")
        first = {(one.method, one.setting): one for one in config.trainings() if one.seed == config.seed and one.kind}
        configs = {f"{method} {setting}": self._config_of(one, TIMED) for (method, setting), one in first.items()}
        learned = next((one for one in first.values() if one.learned), None)
        if learned is not None:
            train_once(self._reward_config(learned))
            configs["reward"] = self._reward_config(learned)
        self.reporter.say(f"equal cost: {TIMED} steps of each setting of each method are timed")
        per_step = timed(configs, self.folder)
        before = per_step["reward"] * (configs["reward"].max_steps or 1) if learned is not None else 0.0
        found = {}
        for (method, setting), one in first.items():
            each, spent = per_step[f"{method} {setting}"], before if one.learned else 0.0
            found[method, setting] = steps_within(config.seconds, per_step=each, before=spent)
        words = ", ".join(f"{m} {s} {n:,} steps of {per_step[f'{m} {s}']:.3g} s" for (m, s), n in found.items())
        self.reporter.say(f"equal cost: {config.seconds:g} processor seconds are {words}")
        return found

    def _once(self, folder: Path, make: Callable[[], list[Point]]) -> None:
        if not (folder / POINTS).exists():
            place = str(folder.relative_to(self.folder))
            write_json(folder / POINTS, [asdict(p) | {"folder": place} for p in make()])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: until here they were still to be measured

    def _write(self, trainings: list[Training], *, finished: bool) -> Frontier:
        config = self.config
        start, found = _read(self.folder / "reference"), list[Point]()
        assert start[0].reward is not None
        for one in trainings:
            folder = self.folder / one.folder
            before = [config.reward_folder(one.seed)] if one.learned else []
            for point in _read(folder):
                if one.kind is not None:
                    given = {"start": start[0].reward, "share": config.plateau_share}
                    point = update_point(point, folder, **given, before=before)
                found.append(point)
        sweep = Frontier(
            config.model,
            config.reward,
            config.held_out,
            config.num,
            config.max_new_tokens,
            finished,
            self.data.made,
            (*start, *found),
            config.targets,
            config.tune or 0,
            tuple(self.tuning),
            config.judge,
            config.seconds,
        )
        sweep.write(self.folder)
        return sweep

    # -- one training ------------------------------------------------------------------------------------------

    def _start(self) -> list[Point]:
        """The model that every method starts from: no divergence."""
        found = self.measure(self.config.model, self.folder / "reference" / f"{SAMPLES}.jsonl")
        return [Point("reference", "", self.config.seed, 0, **asdict(found))]

    def _points(self, one: Training, folder: Path) -> list[Point]:
        point = Point(one.method, one.setting, one.seed, 0, factor=one.factor)
        if one.kind is None:
            assert isinstance(one.value, int)
            found = self.measure(self.config.model, folder / f"{SAMPLES}.jsonl", best_of=one.value)
            return [replace(point, **asdict(found) | {"kl": best_of_n_kl(one.value), "kl_is": "bound"})]
        try:
            return self._trained(one, folder, point)
        except Diverged as error:
            self.reporter.say(f"{one.method} {one.setting} diverged: {error.reason}")
            return [replace(point, counted=False, why_not=error.reason)]

    def _train(self, one: Training) -> MethodConfig:
        """Train a policy, unless that is done, and the reward model that it maximises."""
        if one.learned:
            train_once(self._reward_config(one))
        config = self._config_of(one)
        train_once(config, [_SaveAt(self.config.marks(config))])
        return config

    def _trained(self, one: Training, folder: Path, point: Point) -> list[Point]:
        config = self._train(one)
        marks = self.config.marks(config)
        # (An interrupted run has left other checkpoints too.)
        if not isinstance(config, PpoConfig):
            return [replace(point, step=step, **asdict(self._at(config, step))) for step in marks]
        for step in marks[:-1]:  # says whether the end is on a plateau
            point = replace(point, earlier=self._at(config, step).rewards, earlier_step=step)
        found = self.measure(file=folder / f"{SAMPLES}.jsonl", **model_of(config))
        return [replace(point, step=marks[-1], **asdict(found))]

    def _at(self, config: MethodConfig, step: int) -> Measurement:
        """The policy at a step of its training."""
        folder, reference = Path(config.output), self.reference
        config = with_base(config)
        policy = Policy(config, local_folder(config.model), reference.dtype, reference.device, None)
        policy.make_trainable()
        weights = checkpoint.at(folder / "checkpoints", step).weights
        network = "actor" if isinstance(config, PpoConfig) else "policy"
        policy.masters.load(checkpoint.part_of(network, weights))
        model, tokenizer = policy.scorer.model, reference.tokenizer
        policy.scorer.detach_hook()
        file = folder / f"{SAMPLES}-{step}.jsonl"
        try:
            return self.measure(config.model, file, model=model, tokenizer=tokenizer)
        finally:
            policy.release()


def chosen_rates(points: Sequence[Point], start: float, limit: float) -> list[Trial]:
    """Every rate that was tried, by method. The best has the largest area under its points' frontier, from the reward
    ``start`` of the reference to a KL of ``limit``; of equally good ones, and where all diverged, it is the first."""
    found: list[Trial] = []
    for method in dict.fromkeys(p.method for p in points):
        areas: dict[float, float | None] = {}
        for factor in dict.fromkeys(p.factor for p in points if p.method == method):
            known = [p for p in points if (p.method, p.factor) == (method, factor) and p.included]
            kls, rewards = [p.kl or 0.0 for p in known], [p.reward or 0.0 for p in known]
            areas[factor] = area_under(kls, rewards, start, limit) if known else None
        best = max(areas, key=lambda factor: -math.inf if (area := areas[factor]) is None else area)
        found += [Trial(method, factor, area, factor == best) for factor, area in areas.items()]
    return found


def _read(folder: Path) -> list[Point]:
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
