"""``prefopt frontier``: every road at every setting, each trained into a folder of its own and measured alike.

What a training came to stands in ``points.json`` of its folder, so that a sweep that was stopped goes on where it was,
and one that is given more roads, settings or seeds makes what is new. Any other change of options is refused, since
points would not compare.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.sft import SftConfig
from prefopt.config.sweeps import AnyConfig, FrontierConfig, Training
from prefopt.core.files import read_json, write_json
from prefopt.core.terminal import Reporter
from prefopt.errors import Diverged
from prefopt.generate.model_io import SampledModel
from prefopt.generate.rewards import best_of_n_kl
from prefopt.methods.rlhf import started_again
from prefopt.model.load import local_folder
from prefopt.runs.callbacks import Callback, Metrics, RunInfo
from prefopt.sweeps.points import Frontier, Point
from prefopt.sweeps.shared import Measure, Measured, lay
from prefopt.sweeps.train import SAMPLES, model_of, retold, take_folder, train_once
from prefopt.train import checkpoint
from prefopt.train.loss_options import losses_of
from prefopt.train.policy import Policy, with_base

POINTS = "points.json"
MAY_GROW = {"roads", "seeds", "plateau_share", "progress", "output", "threads"}
"""Options that may differ when a sweep is started again: they add points, or change none but what is told of them."""


def run(config: FrontierConfig) -> Frontier:
    """Make every point, or those that are still to be made; ``frontier.json`` is there from the first one on.

    Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop: started again, the
    sweep goes on. A training that diverges is a point that does not count.
    """
    with started_again():
        return _Sweep(config).run()


class _SaveAt(Callback):
    """Checkpoints after some steps."""

    def __init__(self, marks: Sequence[int]) -> None:
        self._marks = marks

    def on_step(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        if step in self._marks:
            run.save()


class _Sweep:
    def __init__(self, config: FrontierConfig) -> None:
        self.config, self.reporter = config, Reporter(config.progress)
        self.folder = Path(config.output)

    def run(self) -> Frontier:
        config = self.config
        trainings = list(config.trainings())
        self._check(trainings)
        take_folder(config, MAY_GROW)
        self.reference = SampledModel(config.model, device=config.device, dtype=config.dtype)
        self.ground = lay(config, self.reference, self.reporter)
        self.measure = Measure(config, self.ground, self.reference)
        self._once(self.folder / "reference", self._start)
        for n, one in enumerate(trainings, 1):
            folder = self.folder / one.folder
            done = f", done already{self._other_steps(one, folder)}" if (folder / POINTS).exists() else ""
            self.reporter.say(f"{n} of {len(trainings)}: {one.road} {one.setting}, seed {one.seed}{done}")
            self._once(folder, partial(self._points, one, folder))
            self._gather(trainings, finished=False)
        self.reference.release()
        return self._gather(trainings, finished=True)

    def _check(self, trainings: list[Training]) -> None:
        """What only losses know of their options is told before anything runs."""
        for one in trainings:
            if one.kind == "dpo":
                config = self.config.config_of(one, data=["data"], prompts="prompts", each=2.0)
                assert isinstance(config, DpoConfig)
                losses_of(config)

    def _other_steps(self, one: Training, folder: Path) -> str:
        """In words, where an earlier version, which cut the steps to even parts, trained for fewer of them."""
        done = max(p.step for p in _read(folder))
        if one.kind in (None, "ppo") or not done:
            return ""
        steps = self.config.marks(self._config_of(one))[-1]
        return "" if done == steps else f" (by another version: {done} steps, not {steps}; remove {folder} to redo it)"

    def _config_of(self, one: Training) -> AnyConfig:
        ground = self.ground
        return self.config.config_of(one, data=[str(ground.data)], prompts=str(ground.train), each=ground.each)

    def _once(self, folder: Path, make: Callable[[], list[Point]]) -> None:
        if not (folder / POINTS).exists():
            points = make()
            place = str(folder.relative_to(self.folder))
            write_json(folder / POINTS, [asdict(replace(p, folder=place)) for p in points])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: until here they were still to be measured

    def _gather(self, trainings: list[Training], *, finished: bool) -> Frontier:
        config = self.config
        start, found = _read(self.folder / "reference"), list[Point]()
        for one in trainings:
            found += [self._retold(one, p, start[0]) for p in _read(self.folder / one.folder)]
        sizes = (config.held_out, config.num, config.max_new_tokens)
        sweep = Frontier(config.model, config.reward, *sizes, finished, self.ground.made, (*start, *found))
        sweep.write(self.folder)
        return sweep

    def _retold(self, one: Training, point: Point, start: Point) -> Point:
        if one.kind is None:
            return replace(point, seconds=0.0)
        before = [self.config.reward_folder(one.seed)] if one.road == "ppo-learned" else []
        assert start.reward is not None
        folder, share = self.folder / one.folder, self.config.plateau_share
        return retold(point, folder, start=start.reward, share=share, before=before)

    # -- one training ------------------------------------------------------------------------------------------

    def _start(self) -> list[Point]:
        """The model that every road begins at: no divergence."""
        found = self.measure(self.config.model, self.folder / "reference" / f"{SAMPLES}.jsonl")
        return [_point(found, Point("reference", "", self.config.seed, 0, kl_se=0.0))]

    def _points(self, one: Training, folder: Path) -> list[Point]:
        point = Point(one.road, one.setting, one.seed, 0)
        if one.kind is None:
            assert isinstance(one.value, int)
            found = self.measure(self.config.model, folder / f"{SAMPLES}.jsonl", best_of=one.value)
            return [replace(_point(found, point), kl=best_of_n_kl(one.value), kl_is="bound")]
        try:
            return self._trained(one, folder, point)
        except Diverged as error:
            self.reporter.say(f"{one.road} {one.setting} diverged: {error.reason}")
            return [replace(point, counted=False, why_not=error.reason)]

    def _trained(self, one: Training, folder: Path, point: Point) -> list[Point]:
        if one.road == "ppo-learned":
            data = [str(self.ground.data)]
            train_once(self.config.reward_config(one.seed, data=data, each=self.ground.each))
        config = self._config_of(one)
        marks = self.config.marks(config)
        train_once(config, [_SaveAt(marks)])
        assert isinstance(config, (DpoConfig, SftConfig, PpoConfig))
        # (An interrupted run has left other checkpoints too.)
        if not isinstance(config, PpoConfig):
            return [_point(self._at(config, step), replace(point, step=step)) for step in marks]
        for step in marks[:-1]:  # their samples tell, with every start, whether the end counts
            self._at(config, step)
        found = self.measure(file=folder / f"{SAMPLES}.jsonl", **model_of(config))
        return [replace(_point(found, point), step=marks[-1])]

    def _at(self, config: DpoConfig | SftConfig | PpoConfig, step: int) -> Measured:
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


def _read(folder: Path) -> list[Point]:
    """The points of a training, none where they are still to come; whether they count is told anew.

    Raises :class:`RunError` for a damaged file.
    """
    file = folder / POINTS
    if not file.exists():
        return []
    return read_json(file, _kept, f"remove {folder} to redo it")


def _kept(found: list[dict[str, Any]]) -> list[Point]:
    # An earlier version kept the line of a training's rewards here, by another rule.
    points = [Point.from_dict({**p, "plateau": None}) for p in found]
    if not points:
        raise ValueError("it holds no point")
    return points


def _point(found: Measured, point: Point) -> Point:
    reward = found.reward
    bounds, kl_se = (reward.low, reward.high), found.kl_error
    return replace(point, reward=reward.mean, interval=bounds, kl=found.kl, kl_se=kl_se, length=found.length)
