"""``prefopt frontier``: every road at every setting, each trained into a folder of its own and measured alike.

What a training came to stands in ``points.json`` of its folder, so that a sweep that was stopped goes on where it was,
and one that is given more roads, settings or seeds makes what is new. Any other change of options is refused, since
points would not compare.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from prefopt.config.dpo import DpoConfig
from prefopt.config.frontier import FrontierConfig, Training
from prefopt.config.ppo import PpoConfig
from prefopt.config.sft import SftConfig
from prefopt.disk.write import write_json
from prefopt.errors import Diverged
from prefopt.evaluate.frontier import Frontier, Point
from prefopt.evaluate.plateau import FEWEST, plateau
from prefopt.generate.loaded import SampledModel
from prefopt.model.load import local_folder
from prefopt.pipeline.contents import started_again
from prefopt.pipeline.ground import Measure, Measured, lay
from prefopt.pipeline.train import model_of, take_folder, train_once
from prefopt.progress import Reporter
from prefopt.train import checkpoint
from prefopt.train.best_of import kl_bound
from prefopt.train.history import read_history
from prefopt.train.policy import Policy
from prefopt.train.terms import terms_of

POINTS = "points.json"
MAY_GROW = {"roads", "seeds", "progress", "output", "threads"}
"""Options that may differ when a sweep is started again: they add points, or change none."""


def run(config: FrontierConfig) -> Frontier:
    """Make every point, or those that are still to be made; ``frontier.json`` is there from the first one on.

    Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop: started again, the
    sweep goes on. A training that diverges is a point that does not count.
    """
    with started_again():
        return _Sweep(config).run()


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
            done = ", done already" if (folder / POINTS).exists() else ""
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
                terms_of(config)

    def _once(self, folder: Path, make: Callable[[], list[Point]]) -> None:
        if not (folder / POINTS).exists():
            points = make()
            place = str(folder.relative_to(self.folder))
            write_json(folder / POINTS, [asdict(replace(p, folder=place)) for p in points])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: until here they were still to be measured

    def _gather(self, trainings: list[Training], *, finished: bool) -> Frontier:
        config = self.config
        folders = [self.folder / "reference", *(self.folder / one.folder for one in trainings)]
        files = [folder / POINTS for folder in folders if (folder / POINTS).exists()]
        found = [Point.from_dict(p) for file in files for p in json.loads(file.read_text())]
        sizes = (config.held_out, config.num, config.max_new_tokens)
        sweep = Frontier(config.model, config.reward, *sizes, finished, self.ground.made, tuple(found))
        sweep.write(self.folder)
        return sweep

    # -- one training ------------------------------------------------------------------------------------------

    def _start(self) -> list[Point]:
        """The model that every road begins at: no divergence."""
        found = self.measure(self.config.model, self.folder / "reference" / "samples.jsonl")
        return [_point(found, Point("reference", "", self.config.seed, 0, kl_se=0.0))]

    def _points(self, one: Training, folder: Path) -> list[Point]:
        started = time.monotonic()
        point = Point(one.road, one.setting, one.seed, 0)
        if one.kind is None:
            assert isinstance(one.value, int)
            found = self.measure(self.config.model, folder / "samples.jsonl", best_of=one.value)
            bound = replace(_point(found, point), kl=kl_bound(one.value), kl_is="bound")
            return [replace(bound, seconds=time.monotonic() - started)]
        try:
            return self._trained(one, folder, point, started)
        except Diverged as error:
            self.reporter.say(f"{one.road} {one.setting} diverged: {error}")
            return [replace(point, counted=False, why_not=str(error), seconds=time.monotonic() - started)]

    def _trained(self, one: Training, folder: Path, point: Point, started: float) -> list[Point]:
        data = [str(self.ground.data)]
        if one.road == "ppo-learned":
            train_once(self.config.reward_config(one.seed, data=data, each=self.ground.each))
        config = self.config.config_of(one, data=data, prompts=str(self.ground.train), each=self.ground.each)
        train_once(config)
        if isinstance(config, PpoConfig):
            return [self._of_ppo(config, folder, point, started)]
        assert isinstance(config, (DpoConfig, SftConfig))
        assert config.save_every and config.max_steps  # (an interrupted run has left others)
        steps = range(config.save_every, config.max_steps + 1, config.save_every)
        points = [self._at(config, folder / "checkpoints", replace(point, step=step)) for step in steps]
        return [replace(p, seconds=time.monotonic() - started) for p in points]

    def _of_ppo(self, config: PpoConfig, folder: Path, point: Point, started: float) -> Point:
        """The policy at the end of a run of PPO; it counts where the training reward had stopped rising."""
        found = self.measure(file=folder / "samples.jsonl", **model_of(config))
        rewards = [line["objective/scores"] for line in read_history(folder).training]
        flat = plateau(rewards)
        point = replace(_point(found, point), step=len(rewards), plateau=flat, seconds=time.monotonic() - started)
        if flat is None:
            why = f"{len(rewards)} steps are too few to see a plateau: its last third has fewer than {FEWEST}"
            return replace(point, counted=False, why_not=why)
        if not flat.reached:
            word = "rose" if flat.rise > 0 else "fell"
            why = f"no plateau: the training reward still {word} by {abs(flat.rise):.3g} in its last {flat.steps} steps"
            return replace(point, counted=False, why_not=f"{why} (95 % interval {flat.low:+.3g} to {flat.high:+.3g})")
        return point

    def _at(self, config: DpoConfig | SftConfig, checkpoints: Path, point: Point) -> Point:
        """The policy at the point's step."""
        source, reference = local_folder(config.model), self.reference
        policy = Policy(config, source, reference.dtype, reference.device, None)
        policy.make_trainable()
        policy.masters.load(checkpoint.at(checkpoints, point.step).weights)
        model, tokenizer = policy.scorer.model, reference.tokenizer
        policy.scorer.detach_hook()
        file = checkpoints.with_name(f"samples-{point.step}.jsonl")
        try:
            return _point(self.measure(config.model, file, model=model, tokenizer=tokenizer), point)
        finally:
            policy.release()


def _point(found: Measured, point: Point) -> Point:
    reward = found.reward
    bounds, kl_se = (reward.low, reward.high), found.kl_error
    return replace(point, reward=reward.mean, interval=bounds, kl=found.kl, kl_se=kl_se, length=found.length)
