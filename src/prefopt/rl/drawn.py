"""Rounds of responses that the policy draws: what all methods that learn from them share."""

from __future__ import annotations

import numpy as np

from prefopt.core.phases import phase
from prefopt.data.sampler import BatchSampler
from prefopt.model.costs import MEMORY_ERRORS, peak_memory
from prefopt.rl.rollouts import Collector, Rollouts
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.source import BatchSource
from prefopt.train.trainer import Trainer

CHECKPOINTS = 10
"""Number of checkpoints without --save-every: a run that diverges leaves good weights."""


class DrawnRounds(BatchSource):
    """Minibatches of what was drawn. ``order``: which prompts a step takes; ``passes`` over its responses, each in
    ``minibatches`` updates."""

    draws = True

    def __init__(
        self, collector: Collector, order: BatchSampler, *, steps: int, seed: int, passes: int, minibatches: int
    ) -> None:
        self.collector, self.order, self.steps = collector, order, steps
        self.steps_per_epoch = order.steps_per_epoch
        self.episodes = 0
        self._seed, self._passes, self._minibatches = seed, passes, minibatches
        self._batch: Batch | None = None

    @phase("rollouts")
    def draw(self, trainer: Trainer) -> Rollouts:
        """The rollouts of the step at hand. Where memory is short they are drawn again with a smaller token budget."""
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

    def costs(self, trainer: Trainer, drawn: int) -> Record:
        """Times and memory of a step of ``drawn`` responses, which is over."""
        times = trainer.state.times
        seconds = sum(times.values())
        self.episodes += drawn
        self._batch = None
        found = {"episode": self.episodes, "eps": drawn / seconds, "step_seconds": seconds, **times}
        return found | {"peak_memory_bytes": float(peak_memory(trainer.device))}

    def saves(self, step: int) -> bool:
        """Every tenth of the run, and after 1, 2, 4, 8, ... steps: a policy may diverge early."""
        return step % max(1, self.steps // CHECKPOINTS) == 0 or step.bit_count() == 1
