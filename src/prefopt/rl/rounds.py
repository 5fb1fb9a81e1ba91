"""Rounds of reinforcement learning: draw responses, learn from them in several updates, draw again.

A step of the run is one such round. A checkpoint holds the update within the step, and the step's rollouts, so that a
run that was stopped between two minibatches resumes to the same bits.

Of a run that diverged the last weights whose divergence was measured and small enough are written as a model: resuming
from a checkpoint would diverge again, since every number of it is determined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.ppo import PpoConfig
from prefopt.core.dispatch import ServersLost
from prefopt.core.files import remove_folder
from prefopt.core.terminal import Reporter
from prefopt.data.sampler import BatchSampler
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import Diverged, ModelError, RunError
from prefopt.losses.rl import KlController, k1
from prefopt.model.architectures import causal_model
from prefopt.model.costs import MEMORY_ERRORS, peak_memory
from prefopt.model.load import base_and_adapter, local_folder
from prefopt.model.save import add_end_tokens, repair_generation
from prefopt.parallel.world import World
from prefopt.rl.objective import Targets, corrected, final_scores, importance_metrics, rollout_metrics, targets_of
from prefopt.rl.prompts import PtxTerm
from prefopt.rl.rollouts import Collector, Rollouts
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
OTHERWISE = "a lower --learning-rate or a higher --beta"


class Rounds(BatchSource):
    """Minibatches of rollouts. ``order``: which prompts a step takes. ``ratio_tolerance``: the root mean square of
    log-ratios per token that rounding explains before any weight moves."""

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
        ptx: PtxTerm | None = None,
    ) -> None:
        self.config, self.collector, self.order, self.kl, self.ptx = config, collector, order, kl, ptx
        self.steps, self.ratio_tolerance = steps, ratio_tolerance
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
        rollouts = self.rollouts = self.rollouts or self._collect(trainer)
        targets = corrected(self.config, targets_of(self.config, rollouts, self.kl.coefficient), rollouts)
        score_N = final_scores(self.config, rollouts)
        self._measured = rollout_metrics(rollouts, score_N, targets, self.kl.coefficient)
        if self.config.importance_cap is not None:
            self._measured |= importance_metrics(self.config, rollouts)
        if fresh:
            kl = self._measured["objective/kl"]
            if not (math.isfinite(kl) and kl <= self.config.max_kl):
                raise Diverged(
                    f"step {step + 1}: the divergence from the reference is {kl:.4g} nats per response, more than"
                    f" --max-kl {self.config.max_kl:g}: the policy has run away from its reference"
                )
            _refuse_not_finite(step, rollouts, targets)
        self._batch = targets.batch(rollouts)
        # The last batch of an epoch may have fewer prompts.
        self._parts = min(self.config.minibatches, len(rollouts.groups))
        self.updates = self.config.ppo_epochs * self._parts
        return fresh

    def _collect(self, trainer: Trainer) -> Rollouts:
        step = trainer.state.step
        prompts = self.order.batch(step).tolist()
        while True:
            try:
                trainer.train_mode(False)
                rollouts, trainer.state.times = self.collector.collect(
                    step, prompts, trainer.token_budget, lambda ended, drawn: trainer.pause()
                )
                return rollouts
            except MEMORY_ERRORS as error:
                trainer.halve(error, "scoring the responses")
            except ServersLost:
                trainer.keep()  # servers may be started again, and the run goes on from here
                raise

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
        record = record | self._measured
        record |= {"episode": self.episodes, "eps": drawn / seconds, "step_seconds": seconds, **times}
        record |= self.collector.sampler.metrics()
        record["peak_memory_bytes"] = float(peak_memory(trainer.device))
        self.kl = self.kl.after(self._measured["objective/kl"], drawn)
        self.rollouts = self._batch = None
        return record

    def saves(self, step: int) -> bool:
        """Every tenth of the run, and after 1, 2, 4, 8, ... steps: a policy may diverge early."""
        return step % max(1, self.steps // CHECKPOINTS) == 0 or step.bit_count() == 1

    def state(self) -> dict[str, Any]:
        return {"episodes": self.episodes, "beta": self.kl.coefficient}

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The rollouts of the step at hand."""
        return self.rollouts.tensors() if self.rollouts is not None else None

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.episodes, self.kl = state["episodes"], self.kl.at(state["beta"])
        self.rollouts = Rollouts.from_tensors(tensors) if tensors is not None else None

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
    config: PpoConfig,
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
        return f"no good weights later than the first ones were kept: start a new run elsewhere with {OTHERWISE}"
    path = folder.last_good
    failed = None
    try:
        policy.masters.load(checkpoint.part_of("actor", found.weights))
        repair_generation(causal_model(policy.scorer.model))
        world.on_first(lambda: remove_folder(path))
        policy.save(path, tokenizer, writes=world.first)
        if world.first:
            add_end_tokens(path, ends, tokenizer, policy.scorer.model)
    except RunError as error:
        failed = str(error)
    if (failed := world.from_first(failed)) is not None:
        return f"the weights after step {step} were good, but {failed}"
    return (
        f"the last good weights that were kept, after step {step}, are a model: go on from them, into another --output,"
        f" with {_named(config, path, named=named)} and {OTHERWISE}"
    )


def _is_good(kept: Checkpoint, max_kl: float) -> bool:
    """Whether the weights of a checkpoint themselves drew responses of small enough divergence: within a step they have
    moved since."""
    if kept.rollouts is None or kept.state["progress"]["done"]:
        return False
    rollouts = Rollouts.from_tensors(kept.rollouts)
    divergence = float(k1(rollouts.logp_M - rollouts.ref_logp_M).sum()) / len(rollouts.score_N)
    return divergence <= max_kl


def _named(config: PpoConfig, path: Path, *, named: bool) -> str:
    """Options of a run from the model in ``path``, with the reference of this run."""
    start = f"--model {path}"
    if config.lora and named:
        start = f"--model {config.model} --adapter {path}"
    reference = config.reference or (_start(config) if named else None)
    return f"{start} --reference {reference}" if reference else start


def _start(config: PpoConfig) -> str | None:
    """What ``--reference`` calls the model before training; None for an adapter that was put on a model of another name
    than its own, which no name stands for."""
    if config.adapter is None:
        return config.model
    with suppress(ModelError):  # its own model cannot be found
        if base_and_adapter(config.adapter)[0] == local_folder(config.model):
            return config.adapter
    return None
