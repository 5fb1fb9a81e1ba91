"""Rounds of reinforcement learning: draw responses, learn from them in several updates, draw again.

A step of the run is one such round. A checkpoint holds the update within the step, and the step's rollouts, so that a
run that was stopped between two minibatches resumes to the same bits.

Of a run that diverged the last weights whose divergence was measured and small enough are written as a model: resuming
from a checkpoint would diverge again, since every number of it is determined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.core.dispatch import ServersLost
from prefopt.core.phases import phase
from prefopt.core.terminal import Reporter
from prefopt.data.sampler import BatchSampler
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import Diverged, RunError
from prefopt.losses.rl import KlController, k1
from prefopt.model.costs import peak_memory
from prefopt.parallel.world import World
from prefopt.rl.last_good import going_on, otherwise, write_last_good
from prefopt.rl.objective import Targets, corrected, final_scores, importance_metrics, rollout_metrics, targets_of
from prefopt.rl.prompts import PtxTerm
from prefopt.rl.rollouts import Collector, Rollouts
from prefopt.rl.sample_log import SampleLog
from prefopt.rl.scores import ScoreScale
from prefopt.rl.watch import Watch, collect, reference_scale
from prefopt.runs.folder import RunFolder
from prefopt.runs.metrics import Record
from prefopt.train import checkpoint
from prefopt.train.batch import Batch
from prefopt.train.checkpoint import Checkpoint
from prefopt.train.columns import Values
from prefopt.train.policy import Policy
from prefopt.train.source import AuxiliaryLoss, BatchSource
from prefopt.train.trainer import Trainer

CHECKPOINTS = 10
"""Number of checkpoints without --save-every: a run that diverges leaves good weights."""


class Rounds(BatchSource):
    """Minibatches of rollouts. ``order``: which prompts a step takes. ``ratio_tolerance``: the root mean square of
    log-ratios per token that rounding explains before any weight moves. ``reference`` draws from the reference, where
    that is not the model before training. ``scale``: of the scores, where they are normalised."""

    draws = True

    def __init__(
        self,
        config: PpoConfig,
        collector: Collector,
        order: BatchSampler,
        kl: KlController,
        *,
        steps: int,
        ratio_tolerance: float,
        watch: Watch,
        samples: SampleLog,
        reference: Collector | None = None,
        ptx: PtxTerm | None = None,
    ) -> None:
        self.config, self.collector, self.order, self.kl, self.ptx = config, collector, order, kl, ptx
        self.watch, self.samples, self.reference = watch, samples, reference or collector
        self.steps, self.ratio_tolerance = steps, ratio_tolerance
        self.scale = ScoreScale() if config.normalise_scores != "none" else None
        self.steps_per_epoch = order.steps_per_epoch
        self.episodes = 0
        self.rollouts: Rollouts | None = None
        self._batch: Batch | None = None
        self._measured: Record = {}

    def begin(self, trainer: Trainer) -> bool:
        """Draw responses, unless a checkpoint held those of the step.

        Raises :class:`Diverged` where the policy is too far from its reference, or advantages are not finite.
        """
        step = trainer.state.step
        fresh = self.rollouts is None
        if fresh and step == 0:
            self.watch.before(trainer)
            if self.scale is not None and self.config.normalise_scores == "reference":
                self._scale_by_reference(trainer)
        self.rollouts = self.rollouts or self._collect(trainer)
        rollouts = self._scaled(self.rollouts, fresh)
        targets = corrected(self.config, targets_of(self.config, rollouts, self.kl.coefficient), rollouts)
        score_N = final_scores(self.config, rollouts)
        self._measured = rollout_metrics(self.rollouts, score_N, targets, self.kl.coefficient)
        if self.scale is not None:
            self._measured |= {"objective/scale_mean": self.scale.mean, "objective/scale_std": self.scale.deviation}
        if self.config.importance_cap is not None:
            self._measured |= importance_metrics(self.config, rollouts)
        if fresh:
            kl = self._measured["objective/kl"]
            if not (math.isfinite(kl) and kl <= self.config.max_kl):
                raise Diverged(
                    f"step {step + 1}: the divergence from the reference is {kl:.4g} nats per response, more than"
                    f" --max-kl {self.config.max_kl:g}: the policy has diverged from its reference"
                )
            _refuse_not_finite(step, rollouts, targets)
        self._batch = targets.batch(rollouts)
        # The last batch of an epoch may have fewer prompts.
        self._parts = min(self.config.minibatches, len(rollouts.groups))
        self.updates, self._skipped = self.config.ppo_epochs * self._parts, 0
        return fresh

    @phase("rollouts")
    def _collect(self, trainer: Trainer) -> Rollouts:
        step = trainer.state.step
        try:
            rollouts, trainer.state.times = collect(trainer, self.collector, step, self.order.batch(step).tolist())
        except ServersLost:
            trainer.keep()  # servers may be started again, and the run goes on from here
            raise
        return rollouts

    def _scaled(self, rollouts: Rollouts, fresh: bool) -> Rollouts:
        """With scores on the scale, which counts each step's scores once."""
        if self.scale is None:
            return rollouts
        if fresh and self.config.normalise_scores == "running":
            self.scale = self.scale.with_scores(rollouts.score_N)
        return replace(rollouts, score_N=self.scale.of(rollouts.score_N))

    def _scale_by_reference(self, trainer: Trainer) -> None:
        self.scale = scale = reference_scale(trainer, self.reference)
        trainer.reporter.say(
            f"scores of the reference: mean {scale.mean:.4g}, deviation {scale.deviation:.4g}, over {scale.count}"
            " responses; scores are scaled by these"
        )

    def applies(self, update: int, record: Record) -> bool:
        """Whether the policy is still near the one that drew the responses. If not, the step ends with this update."""
        limit = self.config.max_update_kl
        if limit is None or record["policy/approxkl_avg"] <= limit:
            return True
        self._skipped = self.updates - update
        self.updates = update + 1
        return False

    def batch(self, step: int, update: int) -> Batch:
        """A minibatch. Its prompts depend on the seed, the step and the pass over the rollouts alone."""
        assert self._batch is not None
        epoch, number = divmod(update, self._parts)
        generator = np.random.Generator(np.random.PCG64([self.config.seed, step, epoch]))
        order = generator.permutation(len(self._batch))
        return self._batch.select(np.array_split(order, self._parts)[number].tolist())

    def auxiliary(self, step: int, update: int) -> AuxiliaryLoss | None:
        """The pre-training term, if there is one."""
        if self.ptx is None:
            return None
        number = step * self.config.ppo_epochs * self.config.minibatches + update
        return AuxiliaryLoss(self.ptx.objective, self.ptx.batch(number), self.ptx.coefficient, "loss/ptx_avg")

    def end(self, trainer: Trainer, record: Record) -> Record:
        """Add metrics of the rollouts, and times; the KL controller takes its step."""
        assert self.rollouts is not None
        times, drawn = trainer.state.times, len(self.rollouts.score_N)
        seconds = sum(times.values())
        self.episodes += drawn
        record = record | self._measured | {"policy/updates_skipped": float(self._skipped)}
        record |= {"episode": self.episodes, "eps": drawn / seconds, "step_seconds": seconds, **times}
        record |= self.collector.sampler.metrics()
        record["peak_memory_bytes"] = float(peak_memory(trainer.device))
        self.kl = self.kl.after(self._measured["objective/kl"], drawn)
        step = trainer.state.step
        if trainer.world.first:
            self.samples.write(step + 1, self.order.batch(step).tolist(), self.rollouts)
        self.rollouts = self._batch = None
        self.watch.after(trainer, step + 1)
        return record

    def saves(self, step: int) -> bool:
        """Every tenth of the run, and after 1, 2, 4, 8, ... steps: a policy may diverge early."""
        return step % max(1, self.steps // CHECKPOINTS) == 0 or step.bit_count() == 1

    def state(self) -> dict[str, Any]:
        scale = self.scale.state() if self.scale is not None else None
        return {"episodes": self.episodes, "beta": self.kl.coefficient, "scale": scale, "said": [*self.watch.said]}

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The rollouts of the step at hand."""
        return self.rollouts.tensors() if self.rollouts is not None else None

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.episodes, self.kl = state["episodes"], self.kl.at(state["beta"])
        self.rollouts = Rollouts.from_tensors(tensors) if tensors is not None else None
        self.watch.said = list(state.get("said", ()))
        if self.scale is not None and state.get("scale"):
            self.scale = ScoreScale.from_state(state["scale"])

    def inspect(self, reporter: Reporter, step: int, update: int, record: Record, batch: Batch, values: Values) -> None:
        """Raises :class:`RunError` where ratios of new to old probabilities are not 1 before any weight moves."""
        if update:
            return
        gap, allowed = record["val/log_ratio_square"] ** 0.5, self.ratio_tolerance
        if not gap <= allowed:
            raise RunError(
                f"step {step + 1}: before any weight has moved, log-probabilities differ from those of the"
                f" same weights by {gap:.2g} nats per token (rounding explains {allowed:.1g}); try --attention loop or"
                " --dtype float32, and please report this architecture"
            )
        if step == 0:
            reporter.say(f"step 1: ratios are 1 within {gap:.1g}, as they must be before any weight moves")


def _refuse_not_finite(step: int, rollouts: Rollouts, targets: Targets) -> None:
    if all(bool(x.isfinite().all()) for x in (targets.advantage, targets.return_M) if x is not None):
        return
    given = {"scores": rollouts.score_N, "the critic's values": rollouts.value_M}
    ranges = [f"{name} from {x.min():.4g} to {x.max():.4g}" for name, x in given.items() if x is not None]
    raise Diverged(f"step {step + 1}: the advantages are not finite, with {' and '.join(ranges)}")


def keep_last_good(
    config: PpoConfig | OnlineConfig,
    folder: RunFolder,
    policy: Policy,
    tokenizer: Tokenizer,
    ends: Sequence[int],
    world: World,
    *,
    named: bool,
) -> str:
    """Write ``last-good`` into the folder of a run that diverged. Returns how to continue from it, in words.

    ``policy`` gets those weights too; ``ends`` are the tokens that ended its responses. ``named``: the model was not
    given in Python. All ranks of ``world`` call this.
    """
    newest = checkpoint.newest(folder.checkpoints, world, lambda kept: _is_good(kept, config.max_kl))
    found = newest[1] if newest is not None else None
    step = found.state["step"] if found is not None else 0
    if found is None or not step:
        return (
            f"no good weights later than the first ones were kept: start a new run elsewhere with {otherwise(config)}"
        )
    path = folder.last_good
    failed = None
    try:
        policy.masters.load(checkpoint.part_of("actor", found.weights))
        write_last_good(policy, path, tokenizer, ends, world)
    except RunError as error:
        failed = str(error)
    if (failed := world.from_first(failed)) is not None:
        return f"the weights after step {step} were good, but {failed}"
    how = going_on(config, path, named=named)
    return f"the last good weights that were kept, after step {step}, are a model: {how}"


def _is_good(kept: Checkpoint, max_kl: float | None) -> bool:
    """Whether the weights of a checkpoint themselves drew responses of small enough divergence: within a step they have
    moved since."""
    if kept.rollouts is None or kept.state["progress"]["done"]:
        return False
    rollouts = Rollouts.from_tensors(kept.rollouts)
    divergence = float(k1(rollouts.logp_M - rollouts.ref_logp_M).sum()) / len(rollouts.score_N)
    return divergence <= max_kl if max_kl is not None else math.isfinite(divergence)
