"""Batches of which some are responses that the model itself draws, for distillation on its own distribution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prefopt.data.group import Group
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import GroupTable
from prefopt.errors import DataError
from prefopt.generate.sampler import SamplingParams, group_of, occurrences
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.scorer import Scorer
from prefopt.parallel.balance import balanced
from prefopt.parallel.world import World
from prefopt.rl.rollouts import seed_of_step
from prefopt.runs.folder import RunFolder
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
    draws to the same prompt (GKD, algorithm 1), cut where the sequence is ``longest`` tokens long.

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
        *,
        longest: int,
    ) -> None:
        super().__init__(data, sampler)
        self.settings, self.fraction, self.world, self.longest = settings, fraction, world, longest
        self._scorer = scorer
        prompts = [g.prefix for g in data.groups]
        ids = np.zeros(min(longest, max(map(len, prompts)) + settings.max_new_tokens), np.int32)
        trained = np.arange(len(ids)) >= min(len(ids) - 1, max(map(len, prompts)))
        self._drawn_at_most = GroupTable.of([Group.from_sequences([(ids, trained)], row=0, pairs=())])
        self._drawn: Batch | None = None
        self._sampler: TransformersSampler | None = None

    def prepare(self, folder: RunFolder) -> None:
        """Find out how many samples fit into memory at once, unless ``folder`` knows: a resumed run draws as many at a
        time, since logits depend on that number by rounding."""
        with self._scorer.gathered():
            self._sampler = TransformersSampler(self._scorer)
            known = folder.record.get("sampled_at_once")
            self._sampler.rows = known or self._sampler.estimate_rows(self.longest)
        folder.remember(sampled_at_once=self._sampler.rows)

    @property
    def groups(self) -> GroupTable:
        """Those of the data, and one as long as samples may be."""
        return self.data.groups + self._drawn_at_most

    def of(self, indices: Sequence[int]) -> Batch:
        known = len(self.data.groups)
        if all(i < known for i in indices):
            return super().of(indices)
        return Batch([self.groups[i] for i in indices])

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
        return [self._cut(group_of(g.prefix, every[n], g.row)) for g, n in zip(groups, back.tolist(), strict=True)]

    def _cut(self, group: Group) -> Group:
        if group.longest <= self.longest:
            return group
        ids, trained = group.sequence(0)
        return Group.from_sequences([(ids[: self.longest], trained[: self.longest])], row=group.row, pairs=())
