"""Rounds of reinforcement learning: responses are drawn, learned from in several updates, and drawn anew.

A step of the run is one such round. A checkpoint holds where in a step the run is, and the step's rollouts, so that a
run that is stopped between two minibatches goes on to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from prefopt.config.ppo import PpoConfig
from prefopt.core.terminal import Reporter
from prefopt.data.sampler import BatchSampler
from prefopt.errors import Diverged, RunError
from prefopt.losses.rl import KlController
from prefopt.model.costs import peak_memory
from prefopt.rl.objective import Targets, final_scores, rollout_metrics, targets_of
from prefopt.rl.prompts import PtxTerm
from prefopt.rl.rollouts import Collector, Rollouts
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.columns import Values
from prefopt.train.objective import Objective
from prefopt.train.trainer import BatchSource, Trainer

CHECKPOINTS = 10
"""Without --save-every a run keeps a checkpoint this often, until it is finished: what a divergence cannot spoil."""


class Rounds(BatchSource):
    """Minibatches of rollouts. ``order`` says which prompts a step takes; ``kl`` is where the controller starts."""

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
        """``ratio_tolerance``: root mean square log-ratio per token that rounding explains before any weight moves."""
        self.config, self.collector, self.order, self.kl, self.ptx = config, collector, order, kl, ptx
        self.steps, self.ratio_tolerance = steps, ratio_tolerance
        self.steps_per_epoch = order.steps_per_epoch
        self.episodes = 0
        self.rollouts: Rollouts | None = None
        self._batch: Batch | None = None
        self._measured: Record = {}

    # -- a step ------------------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer) -> bool:
        """Draw responses, unless those of a resumed step came with its checkpoint.

        Raises :class:`Diverged` where the policy has run away from its reference, or advantages are not finite.
        """
        step = trainer.state.step
        fresh = self.rollouts is None
        rollouts = self.rollouts = self.rollouts or self._collect(trainer)
        targets = targets_of(self.config, rollouts, self.kl.coefficient)
        score_N = final_scores(self.config, rollouts)
        self._measured = rollout_metrics(rollouts, score_N, targets, self.kl.coefficient)
        if fresh:
            self._refuse_runaway(step, self._measured["objective/kl"])
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
            except RuntimeError as error:
                trainer.halve(error, "scoring the responses")

    def batch(self, step: int, update: int) -> Batch:
        """A minibatch; which prompts are in it depends on seed, step and pass over the rollouts alone."""
        assert self._batch is not None
        epoch, number = divmod(update, self._parts)
        order = shuffled(len(self._batch), (self.config.seed, step, epoch))
        return self._batch.select(np.array_split(order, self._parts)[number].tolist())

    def beside(self, step: int, update: int) -> tuple[Objective, Batch, float, str] | None:
        """The pre-training term, where there is one."""
        if self.ptx is None:
            return None
        number = step * self.config.ppo_epochs * self.config.minibatches + update
        return self.ptx.objective, self.ptx.batch(number), self.ptx.coefficient, "loss/ptx_avg"

    def end(self, trainer: Trainer, record: Record) -> Record:
        """See :class:`BatchSource`: with what the rollouts told, and times; the controller takes its step."""
        assert self.rollouts is not None
        times, drawn = trainer.state.times, len(self.rollouts.score_N)
        seconds = sum(times.values())
        self.episodes += drawn
        record = record | self._measured
        record |= {"episode": self.episodes, "eps": drawn / seconds, "step_seconds": seconds, **times}
        record["peak_memory_bytes"] = float(peak_memory(trainer.device))
        self.kl = self.kl.after(self._measured["objective/kl"], drawn)
        self.rollouts = self._batch = None
        return record

    def saves(self, step: int) -> bool:
        """Every tenth of the run, and after 1, 2, 4, 8, ..., so that a policy that runs away early leaves more than
        what it began with."""
        return step % max(1, self.steps // CHECKPOINTS) == 0 or step.bit_count() == 1

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"episodes": self.episodes, "beta": self.kl.coefficient}

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The rollouts of a step that has begun."""
        return self.rollouts.tensors() if self.rollouts is not None else None

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.episodes, self.kl = state["episodes"], self.kl.at(state["beta"])
        self.rollouts = Rollouts.from_tensors(tensors) if tensors is not None else None

    # -- refusals ----------------------------------------------------------------------------------------------

    def _refuse_runaway(self, step: int, kl: float) -> None:
        if math.isfinite(kl) and kl <= self.config.max_kl:
            return
        raise Diverged(
            f"step {step + 1}: the divergence from the reference is {kl:.4g} nats per response, more than"
            f" --max-kl {self.config.max_kl:g}: the policy has run away from its reference"
        )

    def inspect(self, reporter: Reporter, step: int, update: int, record: Record, batch: Batch, values: Values) -> None:
        """Before any weight has moved the ratio of new to old probabilities is 1. Raises :class:`RunError`."""
        gap, allowed = record["val/log_ratio_square"] ** 0.5, self.ratio_tolerance
        if update:
            return
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


def shuffled(n: int, seed: tuple[int, ...]) -> np.ndarray:
    """An order of n groups that depends on the seed alone."""
    return np.random.Generator(np.random.PCG64(list(seed))).permutation(n)
