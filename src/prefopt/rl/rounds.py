"""Rounds of a run that learns from its own responses: draw them, have them judged, learn from them, draw again.

A step of the run is one round. A checkpoint holds the update within the step and the round itself, so that a run that
was stopped or killed between two minibatches resumes to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from prefopt.core.dispatch import ServersLost
from prefopt.core.phases import phase
from prefopt.data.sampler import BatchSampler
from prefopt.errors import Diverged
from prefopt.losses.rl import k1, per_response
from prefopt.model.costs import peak_memory
from prefopt.rl.collect import collect
from prefopt.rl.judgement import Round
from prefopt.rl.rollouts import Collector, Rollouts
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.source import BatchSource
from prefopt.train.trainer import Trainer

CHECKPOINTS = 10
"""Number of checkpoints without --save-every: a run that diverges leaves good weights."""


class Rounds(BatchSource):
    """Minibatches of what was drawn. ``order``: which prompts a round takes; ``passes`` over its responses, each in
    ``minibatches`` updates. ``max_kl``: nats per response from the reference at which the run stops; None: never.

    Subclasses say what a round teaches (:meth:`learn`), and who judges it where that is not the collector's reward
    (:meth:`judge`).
    """

    draws = True

    def __init__(
        self,
        collector: Collector,
        order: BatchSampler,
        *,
        steps: int,
        seed: int,
        passes: int,
        minibatches: int,
        max_kl: float | None,
    ) -> None:
        self.collector, self.order, self.steps, self.max_kl = collector, order, steps, max_kl
        self.steps_per_epoch = order.steps_per_epoch
        self.episodes = 0
        self.round: Round | None = None
        self._seed, self._passes, self._minibatches = seed, passes, minibatches
        self._batch: Batch | None = None
        self._measured: Record = {}

    def before(self, trainer: Trainer) -> None:
        """Called before the responses of a step are drawn."""

    def judge(self, trainer: Trainer, drawn: Round) -> Round:
        """The round with the judge's word; called unless a checkpoint had it."""
        return drawn

    def learn(self, trainer: Trainer, judged: Round, *, fresh: bool) -> tuple[Batch, Record]:
        """What a round teaches, and metrics of its responses. ``fresh``: it was not in a checkpoint. Raises
        :class:`Diverged` where numbers are not finite."""
        raise NotImplementedError

    def begin(self, trainer: Trainer) -> bool:
        """Draw responses and have them judged, unless a checkpoint held those of the step.

        Raises :class:`Diverged` where the policy is too far from its reference, and :class:`ServersLost`, after a
        checkpoint, where no server is left that draws or judges: the run can go on from there.
        """
        kept = self.round is not None and self.round.judged
        try:
            if not kept:
                self.round = self.judge(trainer, self._drawn(trainer))
        except ServersLost:
            trainer.keep()
            raise
        assert self.round is not None
        batch, self._measured = self.learn(trainer, self.round, fresh=not kept)
        self.learn_from(batch)
        return not kept

    def _drawn(self, trainer: Trainer) -> Round:
        """The responses of a checkpoint, that a judge has not seen yet, or new ones."""
        step = trainer.state.step
        if self.round is None:
            self.before(trainer)
            self.round = self.draw(trainer)
            self._refuse_far(step, self.round.rollouts)
        return self.round

    @phase("rollouts")
    def draw(self, trainer: Trainer) -> Round:
        """The round of the step at hand, as the collector's reward scored it."""
        step = trainer.state.step
        rollouts, trainer.state.times = collect(trainer, self.collector, step, self.order.batch(step).tolist())
        return Round(rollouts)

    def _refuse_far(self, step: int, rollouts: Rollouts) -> None:
        kl = float(per_response(k1(rollouts.logp_M - rollouts.ref_logp_M), rollouts.length_N).mean())
        most = self.max_kl
        if not (math.isfinite(kl) and kl <= (math.inf if most is None else most)):
            limit = "" if most is None else f", more than --max-kl {most:g}"
            raise Diverged(
                f"step {step + 1}: the divergence from the reference is {kl:.4g} nats per response{limit}: the policy"
                " has diverged from its reference"
            )

    def learn_from(self, batch: Batch) -> None:
        """Cut ``batch`` into the updates of this step; none where it is empty."""
        self._batch = batch
        # The last batch of an epoch may have fewer prompts.
        self._parts = min(self._minibatches, len(batch))
        self.updates = self._passes * self._parts

    def batch(self, step: int, update: int) -> Batch:
        """A minibatch. Its prompts depend on the seed, the step and the pass over the rollouts alone."""
        assert self._batch is not None
        epoch, number = divmod(update, self._parts)
        generator = np.random.Generator(np.random.PCG64([self._seed, step, epoch]))
        order = generator.permutation(len(self._batch))
        return self._batch.select(np.array_split(order, self._parts)[number].tolist())

    def end(self, trainer: Trainer, record: Record) -> Record:
        """Add metrics of the round and of the sampler, times and memory."""
        assert self.round is not None
        times, drawn = trainer.state.times, len(self.round.rollouts.score_N)
        seconds = sum(times.values())
        self.episodes += drawn
        self.round = self._batch = None
        record = record | self._measured | self.collector.sampler.metrics()
        record |= {"episode": self.episodes, "eps": drawn / seconds, "step_seconds": seconds, **times}
        return record | {"peak_memory_bytes": float(peak_memory(trainer.device))}

    def saves(self, step: int) -> bool:
        """Every tenth of the run, and after 1, 2, 4, 8, ... steps: a policy may diverge early."""
        return step % max(1, self.steps // CHECKPOINTS) == 0 or step.bit_count() == 1

    def state(self) -> dict[str, Any]:
        return {"episodes": self.episodes}

    @property
    def holds(self) -> str:
        """Whether the round of the step at hand is drawn or also judged."""
        if self.round is None:
            return ""
        return "judged" if self.round.judged else "drawn"

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The round of the step at hand, judged or not."""
        return self.round.tensors() if self.round is not None else None

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.episodes = state["episodes"]
        self.round = Round.from_tensors(tensors) if tensors is not None else None
