"""``prefopt frontier``: every method at every setting, each trained into its own folder and measured alike.

The results of a training are kept in ``points.json`` of its folder: a stopped sweep continues where it was, and new
methods, settings or seeds are added. Any other change of options is refused: points would not be comparable.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.config.frontier import FrontierConfig, Training
from prefopt.config.methods import MethodConfig
from prefopt.config.ppo import PpoConfig
from prefopt.core.files import write_json
from prefopt.core.model_folder import is_adapter
from prefopt.core.terminal import Reporter
from prefopt.errors import ConfigError, Diverged
from prefopt.evaluate.choices import ChoiceTask
from prefopt.generate.model_io import SampledModel
from prefopt.generate.rewards import best_of_n_kl
from prefopt.methods.rlhf import started_again
from prefopt.model.load import local_folder
from prefopt.model.precision import scoring_dtype
from prefopt.runs.callbacks import Callback, Metrics, RunInfo
from prefopt.runs.history import POINTS
from prefopt.sweeps.data import Measure, Measurement, prepare_data, true_reward
from prefopt.sweeps.finished import SAMPLES, TUNE, finished_points, planned, read_points, tried_rates
from prefopt.sweeps.points import Frontier, Point
from prefopt.sweeps.timing import TIMED, steps_within, timed
from prefopt.sweeps.train import model_of, take_folder, train_once
from prefopt.train import checkpoint
from prefopt.train.loss_options import losses_of
from prefopt.train.named_adapter import with_base
from prefopt.train.policy import Policy

MAY_GROW = {"methods", "seeds", "plateau_share", "kl_at", "rate_factors", "task", "report_only"}
MAY_GROW |= {"progress", "output", "threads"}
"""Options that may change when a sweep is continued: they add points, or change only how points are reported."""


def run(config: FrontierConfig) -> Frontier:
    """Make all points that are not done yet, or with ``report_only`` none; ``frontier.json`` is written after each
    training. Raises
    :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop; the same command continues.
    A diverged training is an excluded point."""
    if config.report_only:
        take_folder(config, MAY_GROW, judge=config.judge, task=config.task, begun=True)
        found = finished_points(config)
        found.write(Path(config.output))
        return found
    with started_again():
        return _FrontierSweep(config).run()


def holds_model(folder: Path) -> bool:
    """Whether the policy of a training is still in its folder."""
    return (folder / "config.json").is_file() or is_adapter(folder)


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
        take_folder(config, MAY_GROW, judge=config.judge, task=config.task)
        self.reference = SampledModel(config.model, device=config.device, dtype=scoring_dtype(config.dtype))
        self.data = prepare_data(config, self.reference, self.reporter, tune=config.tune or 0)
        self.reward = true_reward(config)
        judge = true_reward(config, config.judge) if config.judge is not None else None
        task = self._task()
        self.measure = Measure(config, self.data.held_out, self.reference, self.reward, config.perplexity, judge, task)
        self.steps = self._equal_cost()

    def run(self) -> Frontier:
        config = self.config
        self.prepare()
        self._once(self.folder / "reference", self._start)
        self._choose()
        trainings = planned(config, tried_rates(config, list(config.trials())))
        for n, one in enumerate(trainings, 1):
            folder = self.folder / one.folder
            done = f", done already{self._other_steps(one, folder)}" if (folder / POINTS).exists() else ""
            self.reporter.say(f"{n} of {len(trainings)}: {one.method} {one.setting}, seed {one.seed}{done}")
            self._keep_trial(one)
            self._once(folder, partial(self._points, one, folder), one)
            self._write()
        self.reference.release()
        return self._write()

    def _write(self) -> Frontier:
        found = finished_points(self.config)
        found.write(self.folder)
        return found

    def _task(self) -> ChoiceTask | None:
        if self.config.task is None:
            return None
        task = ChoiceTask(self.config.task, self.reference.tokenizer, self.reference.context)
        self.reporter.say(f"task: {task.words}")
        return task

    # -- learning rates ----------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Try every rate of every method with the first seed, equally often, on prompts that no result is reported of.
        The best one has the largest area under its settings' frontier there."""
        trials, config = list(self.config.trials()), self.config
        if self.data.tune is None:
            return
        self._tuned("reference", partial(self._on_tune, {"name": config.model}), Point("reference", "", 0, 0))
        for n, one in enumerate(trials, 1):
            self.reporter.say(f"rate {n} of {len(trials)}: {one.method} {one.setting}, {one.factor:g} times its rate")
            self._trial(one)
            self._write()
        chosen = {trial.method: trial.factor for trial in tried_rates(config, trials) if trial.chosen}
        for one in trials:
            if one.factor != chosen[one.method]:
                shutil.rmtree(self.folder / one.folder / "checkpoints", ignore_errors=True)

    def _keep_trial(self, one: Training) -> None:
        """With a single rate: measure a training of the first seed on the prompts for choosing rates too, while its
        policy is there, so that the sweep may go on with several and train none of these again."""
        folder = self.folder / one.folder
        there = not (folder / POINTS).exists() or holds_model(folder)
        if self.data.tune is not None and one.kind is not None and one.seed == self.config.seed and there:
            self._trial(one)

    def _trial(self, one: Training) -> None:
        """The end of a training on the prompts for choosing rates. Its checkpoints stay, since it may be chosen."""
        point = Point(one.method, one.setting, one.seed, 0, factor=one.factor)
        self._tuned(one.folder, lambda file: self._on_tune(model_of(self._train(one)), file), point)

    def _on_tune(self, policy: dict[str, Any], file: Path) -> Measurement:
        assert self.data.tune is not None
        return Measure(self.config, self.data.tune, self.reference, self.reward)(file=file, **policy)

    def _tuned(self, name: str, make: Callable[[Path], Measurement], point: Point) -> None:
        folder = self.folder / TUNE / name
        file = folder / POINTS
        if not file.exists():
            try:
                point = replace(point, **asdict(make(folder / f"{SAMPLES}.jsonl")))
            except Diverged as error:
                point = replace(point, counted=False, why_not=error.reason)
            write_json(file, [asdict(point)])

    def _other_steps(self, one: Training, folder: Path) -> str:
        """A note where another version, which divided the steps otherwise, trained for another number of them."""
        done = max(point.step for point in read_points(folder))
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

    def _once(self, folder: Path, make: Callable[[], list[Point]], one: Training | None = None) -> None:
        """The points of training ``one``, or of the reference, unless they are there."""
        place = str(folder.relative_to(self.folder))
        if not (folder / POINTS).exists():
            write_json(folder / POINTS, [asdict(p) | {"folder": place} for p in make()])
        elif (points := self._with_task(folder, one)) is not None:
            write_json(folder / POINTS, [asdict(p) | {"folder": place} for p in points])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: until here they were still to be measured

    def _with_task(self, folder: Path, one: Training | None) -> list[Point] | None:
        """The points of a training that was measured before ``--task`` was given, where its last policy is still
        there."""
        points = read_points(folder)
        if self.measure.task is None or points[-1].task or not points[-1].kls:
            return None
        if one is not None and not holds_model(folder):
            return None
        self.reporter.say(f"task: {folder.relative_to(self.folder)} is measured now")
        policy = {"name": self.config.model, "adapter": None} if one is None else model_of(self._config_of(one))
        return [*points[:-1], replace(points[-1], task=self.measure.answers(**policy))]

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
