"""The loop of reinforcement learning: responses are collected, learned from in several passes, and collected anew.

A step is one such round. A checkpoint holds where in a step the run is, and the step's rollouts, so that a run that is
stopped between two minibatches goes on to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter
from prefopt.data.sampler import Sampler
from prefopt.errors import Diverged, RunError
from prefopt.losses.rl import KlController
from prefopt.model.memory import out_of_memory
from prefopt.rl.collector import Collector
from prefopt.rl.critic import Trainee
from prefopt.rl.learner import Learner, Targets, rollout_metrics
from prefopt.rl.ptx import PtxTerm
from prefopt.rl.rollouts import Rollouts
from prefopt.runs.callbacks import Callbacks, RunInfo
from prefopt.runs.metrics import Metrics, Record, note
from prefopt.train import checkpoint
from prefopt.train.results import Sums

CHECKPOINTS = 10
"""Without --save-every a run keeps a checkpoint this often, until it is finished: what a divergence cannot spoil."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseOptions:
    """How long and how often. ``save_every`` counts steps; none leaves it to :meth:`saves`. ``ratio_tolerance``: root
    mean square log-ratio per token that rounding explains before any weight moves."""

    steps: int
    epochs: int
    minibatches: int
    seed: int
    max_grad_norm: float
    max_kl: float
    ratio_tolerance: float
    save_every: int | None
    keep_last: int

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after so many steps.

        Where nobody says: every tenth of the run, and after 1, 2, 4, 8, ..., so that a policy that runs away early
        leaves more than what it began with.
        """
        if self.save_every is not None:
            return step % self.save_every == 0
        return step % max(1, self.steps // CHECKPOINTS) == 0 or step.bit_count() == 1


@dataclass(slots=True)
class Place:
    """Where a run stands; goes into every checkpoint. ``done`` minibatches of the step at hand, whose ``records`` and
    ``times`` are kept until it is complete."""

    step: int = 0
    done: int = 0
    episodes: int = 0
    beta: float = 0.0
    token_budget: int = 0
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Phases:
    """One run. ``trained``: the actor, and the critic where it is no head on the actor. ``after_save`` is called
    once a checkpoint is written."""

    learner: Learner
    collector: Collector
    trained: dict[str, Trainee]
    order: Sampler
    kl: KlController
    options: PhaseOptions
    metrics: Metrics
    reporter: Reporter
    checkpoints: Path
    stop: StopRequest
    measure: Callable[[], Record]
    callbacks: Callbacks = field(default_factory=Callbacks)
    ptx: PtxTerm | None = None
    after_save: Callable[[], None] = lambda: None
    place: Place = field(default_factory=Place)
    rollouts: Rollouts | None = None
    _kept: tuple[int, int] | None = None

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self) -> Place:
        """Train to the end, or to a stop: then :class:`prefopt.errors.Interrupted` follows on a checkpoint.

        Raises :class:`Diverged` where the divergence runs away, or numbers are not finite.
        """
        place, steps = self.place, self.options.steps
        about = RunInfo(
            output=self.metrics.path.parent,
            options=self.callbacks.options,
            model=self.learner.scorer.model,
            steps=steps,
            step=place.step,
        )
        with self.callbacks.around(about, self.keep), self.reporter.bar("train", steps, "steps") as bar:
            while place.step < steps and not about.stopping:
                record, saved = self._step()
                self.metrics.write({"step": place.step, **record})
                bar.update(place.step, note(record), first=place.step == 1)
                self.callbacks.done(place.step, record, None, saved)
                self._pause()
            self.keep()
        return place

    def keep(self) -> None:
        """A checkpoint of where the run stands, unless there is one."""
        if self._kept != (self.place.step, self.place.done):
            self._save()

    def _pause(self) -> None:
        """Leave, with a checkpoint, where that was asked for."""
        if self.stop.signal is not None:
            path = self._save()
            self.reporter.say(f"checkpoint: {path}")
        place = self.place
        within = f", {place.done} of the updates of the next one made" if place.done else ""
        self.stop.check(f" after step {place.step} of {self.options.steps}{within}")

    def _step(self) -> tuple[Record, Path | None]:
        place, saved, started = self.place, None, time.monotonic()
        rollouts, fresh = self._collected()
        targets = self.learner.targets(rollouts, self.kl.coefficient)
        told = rollout_metrics(rollouts, self.learner.scores(rollouts), targets, self.kl.coefficient)
        if fresh:
            self._refuse_runaway(told["objective/kl"])
            self._refuse_not_finite(rollouts, targets)
            if self.options.saves(place.step):
                saved = self._save()
        self._learn(rollouts, targets)
        times, place.times = place.times, {}
        seconds = sum(times.values())
        record = _means(place.records) | told
        record |= {
            "learning_rate": self.trained["actor"].schedule(place.step),
            "episode": place.episodes + len(rollouts.score_N),
            "epoch": (place.step + 1) / self.order.steps_per_epoch,
            "eps": len(rollouts.score_N) / seconds,
            "step_seconds": seconds,
            **times,
            **self.measure(),
        }
        self.kl = self.kl.after(told["objective/kl"], len(rollouts.score_N))
        place.step, place.done, place.beta = place.step + 1, 0, self.kl.coefficient
        place.episodes += len(rollouts.score_N)
        place.seconds += time.monotonic() - started
        place.records, self.rollouts = [], None
        return record, saved

    def _collected(self) -> tuple[Rollouts, bool]:
        """The step's rollouts, and whether they are fresh: those of a resumed step are in its checkpoint."""
        if self.rollouts is not None:
            return self.rollouts, False
        prompts = self.order.batch(self.place.step).tolist()
        while True:
            try:
                budget = self.place.token_budget
                self.rollouts, self.place.times = self.collector.collect(
                    self.place.step, prompts, budget, lambda ended, drawn: self._pause()
                )
                return self.rollouts, True
            except RuntimeError as error:
                self._halve(error, "scoring the responses")

    def _refuse_runaway(self, kl: float) -> None:
        if math.isfinite(kl) and kl <= self.options.max_kl:
            return
        raise Diverged(
            f"step {self.place.step + 1}: the divergence from the reference is {kl:.4g} nats per response, more than"
            f" --max-kl {self.options.max_kl:g}: the policy has run away from its reference"
        )

    def _refuse_not_finite(self, rollouts: Rollouts, targets: Targets) -> None:
        if all(bool(x.isfinite().all()) for x in (targets.advantage, targets.return_M) if x is not None):
            return
        given = {"scores": rollouts.score_N, "the critic's values": rollouts.value_M}
        ranges = [f"{name} from {x.min():.4g} to {x.max():.4g}" for name, x in given.items() if x is not None]
        raise Diverged(f"step {self.place.step + 1}: the advantages are not finite, with {' and '.join(ranges)}")

    # -- learning ----------------------------------------------------------------------------------------------

    def _learn(self, rollouts: Rollouts, targets: Targets) -> None:
        place, o = self.place, self.options
        place.times.setdefault("seconds/training", 0.0)
        parts = min(o.minibatches, len(rollouts.groups))  # the last batch of an epoch may have fewer prompts
        while place.done < o.epochs * parts:
            started = time.monotonic()
            epoch, number = divmod(place.done, parts)
            order = shuffled(len(rollouts.groups), (o.seed, place.step, epoch))
            record = self._minibatch(rollouts, targets, np.array_split(order, parts)[number].tolist())
            place.records.append(record)
            place.done += 1
            place.times["seconds/training"] += time.monotonic() - started
            if place.done < o.epochs * parts:
                self._pause()

    def _minibatch(self, rollouts: Rollouts, targets: Targets, groups: Sequence[int]) -> Record:
        tokens, responses = len(rollouts.tokens_of(groups)), len(rollouts.responses_of(groups))
        while True:
            sums = Sums()
            try:
                self.learner.train()
                for part, batch in self.collector.batches(rollouts.groups, groups, self.place.token_budget):
                    outcome = self.learner.loss(rollouts, targets, part, batch, tokens, responses)
                    outcome.total.backward()
                    sums.add(outcome)
                beside = self._ptx()
                break
            except RuntimeError as error:
                for one in self.trained.values():
                    one.zero_grad()
                self._halve(error, "a minibatch")
        record = sums.means() | beside
        if self.ptx is not None:
            record["loss"] += self.ptx.coefficient * beside["loss/ptx_avg"]
        record["val/ratio_var"] = max(0.0, record.pop("val/ratio_square") - record["val/ratio"] ** 2)
        gap = record.pop("val/log_ratio_square") ** 0.5
        if self.place.done == 0:
            self._refuse_ratio(gap)
        for name, one in self.trained.items():
            norm = one.update(self.place.step, self.options.max_grad_norm)
            record["grad_norm" if name == "actor" else f"grad_norm/{name}"] = norm
        if not math.isfinite(record["loss"]):
            raise Diverged(f"step {self.place.step + 1}: the loss is {record['loss']}")
        return record

    def _ptx(self) -> Record:
        """The gradient of the pre-training term, where there is one, on top of what is there."""
        if self.ptx is None:
            return {}
        update = self.place.step * self.options.epochs * self.options.minibatches + self.place.done
        return self.ptx.backward(self.learner.scorer, update, self.place.token_budget)

    def _refuse_ratio(self, gap: float) -> None:
        """Before any weight has moved the ratio of new to old probabilities is 1."""
        allowed = self.options.ratio_tolerance
        if not gap <= allowed:
            raise RunError(
                f"step {self.place.step + 1}: before any weight has moved, log-probabilities differ from those of the"
                f" same weights by {gap:.2g} nats per token (rounding explains {allowed:.1g}); try --attention loop or"
                " --dtype float32, and please report this architecture"
            )
        if self.place.step == 0:
            self.reporter.say(f"step 1: ratios are 1 within {gap:.1g}, as they must be before any weight moves")

    def _halve(self, error: RuntimeError, what: str) -> None:
        if not out_of_memory(error):
            raise error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.place.token_budget <= 1:
            raise RunError(
                f"{what} does not fit into the device's memory; give --lora, --critic head, --gradient-checkpointing or"
                " a smaller --max-new-tokens"
            ) from error
        self.place.token_budget //= 2
        self.reporter.say(f"out of memory: {what} is done again with {self.place.token_budget} tokens at once")

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        place = self.place
        place.beta = self.kl.coefficient
        state = {"step": place.step, "progress": asdict(place), "random": checkpoint.random_states()}
        weights = {f"{n}.{key}": p.detach() for n, one in self.trained.items() for key, p in one.masters.items()}
        optimizer = {
            f"{n}.{key}": value
            for n, one in self.trained.items()
            for key, value in checkpoint.optimizer_tensors(one.optimizer).items()
        }
        rollouts = self.rollouts.tensors() if self.rollouts is not None else None
        path = checkpoint.save(
            self.checkpoints,
            weights,
            optimizer,
            state,
            keep_last=self.options.keep_last,
            done=place.done,
            rollouts=rollouts,
        )
        self._kept = (place.step, place.done)
        self.after_save()
        return path

    def resume(self) -> Path | None:
        """Go back to the newest whole checkpoint; returns it, or none where there is none (then lines are dropped)."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            self.metrics.forget_after(-1)
            return None
        path, saved = found
        for name, one in self.trained.items():
            one.load(weights_of(name, saved.weights))
            checkpoint.restore_optimizer(one.optimizer, weights_of(name, saved.optimizer))
        checkpoint.restore_random(saved.state["random"])
        self.place = Place(**saved.state["progress"])
        self.kl = self.kl.at(self.place.beta)
        self.rollouts = Rollouts.from_tensors(saved.rollouts) if saved.rollouts is not None else None
        self._kept = (self.place.step, self.place.done)
        self.metrics.forget_after(self.place.step)
        return path


def shuffled(n: int, seed: tuple[int, ...]) -> np.ndarray:
    """An order of n groups that depends on the seed alone."""
    return np.random.Generator(np.random.PCG64(list(seed))).permutation(n)


def weights_of(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the ``actor`` or the ``critic``."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _means(records: Sequence[Record]) -> Record:
    """Averages over the minibatches of a step."""
    return {name: float(np.mean([r[name] for r in records])) for name in records[0]}
