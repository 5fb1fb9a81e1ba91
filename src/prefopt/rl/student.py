"""Batches of which some are responses that the model itself draws, for distillation on its own distribution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prefopt.data.group import Group
from prefopt.data.sampler import BatchSampler
from prefopt.errors import DataError
from prefopt.generate.sampler import SamplingParams, group_of, occurrences
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.scorer import Scorer
from prefopt.parallel.balance import balanced
from prefopt.parallel.world import World
from prefopt.rl.rollouts import seed_of_step
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.data import DataBatches, TrainingData
from prefopt.train.trainer import Trainer


def check_prompts(groups: Iterable[Group]) -> None:
    """Raises :class:`DataError` for a row without a prompt."""
    for group in groups:
        if not len(group.prefix):
            raise DataError("has no prompt that the model could respond to, for --on-policy", row=group.row)


class StudentBatches(DataBatches):
    """Batches of ``data``; in a ``fraction`` of the steps every response is replaced by one that ``scorer``'s model
    draws to the same prompt (GKD, algorithm 1).

    Which steps these are, and the samples, depend on the seed, the step and the prompt alone: a resumed step draws the
    same again. Prompts are dealt to the ranks of ``world``, which all get every sample.
    """

    def __init__(
        self,
        data: TrainingData,
        sampler: BatchSampler,
        scorer: Scorer,
        settings: SamplingParams,
        fraction: float,
        world: World,
    ) -> None:
        super().__init__(data, sampler)
        self.settings, self.fraction, self.world, self._scorer = settings, fraction, world, scorer
        self._drawn: Batch | None = None
        self._sampler: TransformersSampler | None = None

    def is_drawn(self, step: int) -> bool:
        """Whether a step learns from samples."""
        return bool(np.random.default_rng([self.settings.seed, step]).random() < self.fraction)

    def begin(self, trainer: Trainer) -> bool:
        step = trainer.state.step
        self._drawn = None
        if self.is_drawn(step):
            trainer.train_mode(False)
            groups = super().batch(step).groups
            self._drawn = Batch(self._draw(step, groups, trainer))
        return False  # a checkpoint needs no samples: they are drawn again

    def batch(self, step: int, update: int = 0) -> Batch:
        return super().batch(step, update) if self._drawn is None else self._drawn

    def end(self, trainer: Trainer, record: Record) -> Record:
        return record | {"on_policy": float(self._drawn is not None)}

    def _draw(self, step: int, groups: Sequence[Group], trainer: Trainer) -> list[Group]:
        prompts, world = [g.prefix for g in groups], self.world
        dealt, streams = [np.arange(len(prompts))], occurrences(prompts)
        if not world.alone:
            dealt = balanced(np.array([len(p) for p in prompts]) + self.settings.max_new_tokens, world.size)
        mine = dealt[world.rank].tolist()
        settings = replace(self.settings, seed=seed_of_step(self.settings.seed, step))

        def draw() -> list[Any]:
            if not mine:
                return []
            sampler = self._sampler = self._sampler or TransformersSampler(self._scorer)
            pause = lambda ended, drawn: trainer.pause()  # noqa: E731
            ours = [streams[n] for n in mine]
            return list(sampler.sample([prompts[n] for n in mine], 1, settings, streams=ours, progress=pause))

        with self._scorer.gathered():
            samples = world.together(draw)
        every = [sample for part in world.gather(samples) for sample in part]
        back = np.argsort(np.concatenate(dealt))
        return [group_of(g.prefix, every[n], g.row) for g, n in zip(groups, back.tolist(), strict=True)]
