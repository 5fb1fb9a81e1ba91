"""Batches of which some are responses that the model itself draws, for distillation on its own distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prefopt.core.dispatch import ServersLost
from prefopt.data.group import Group
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import GroupTable
from prefopt.errors import DataError, Interrupted
from prefopt.generate.sampler import SamplingParams, group_of, occurrences
from prefopt.model.scorer import Scorer
from prefopt.parallel.world import World
from prefopt.rl.rollouts import deal, seed_of_step
from prefopt.rl.samplers import PolicySampler
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch, Column
from prefopt.train.data import DataBatches, TrainingData
from prefopt.train.remote_teacher import RemoteTeacher
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
    same again, but what a ``remote`` sampler drew is kept in checkpoints. Prompts are dealt to the ranks of ``world``,
    which all get every sample.
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
        columns: Callable[[Sequence[Group]], dict[str, Column]] = lambda groups: {},
        teacher: RemoteTeacher | None = None,
    ) -> None:
        super().__init__(data, sampler, columns)
        self.teacher = teacher
        self.settings, self.fraction, self.world, self.longest = settings, fraction, world, longest
        self._scorer = scorer
        prompts = [g.prefix for g in data.groups]
        ids = np.zeros(min(longest, max(map(len, prompts)) + settings.max_new_tokens), np.int32)
        trained = np.arange(len(ids)) >= min(len(ids) - 1, max(map(len, prompts)))
        self._drawn_at_most = GroupTable.of([Group.from_sequences([(ids, trained)], row=0, pairs=())])
        self._drawn: Batch | None = None
        self._restored: list[Group] | None = None
        self._sampler: PolicySampler | None = None

    def prepare(self, sampler: PolicySampler) -> None:
        """Draw with ``sampler``, which is made when the policy is trainable."""
        self._sampler, self.draws = sampler, sampler.remote

    def close(self) -> None:
        """After the last step."""
        if self._sampler is not None:
            self._sampler.close()

    @property
    def groups(self) -> GroupTable:
        """Those of the data, and one as long as samples may be."""
        return self.data.groups + self._drawn_at_most

    def of(self, indices: Sequence[int]) -> Batch:
        known = len(self.data.groups)
        if all(i < known for i in indices):
            return super().of(indices)
        groups = [self.groups[i] for i in indices]  # among them one that stands for samples, of any tokens
        return Batch(groups, self.teacher.placeholder(groups) if self.teacher is not None else {})

    def is_drawn(self, step: int) -> bool:
        """Whether a step learns from samples."""
        return bool(np.random.default_rng([self.settings.seed, step]).random() < self.fraction)

    def begin(self, trainer: Trainer) -> bool:
        assert self._sampler is not None
        step = trainer.state.step
        self._drawn, restored, self._restored = None, self._restored, None
        try:
            if restored is not None:
                self._drawn = self._taught(restored)
                return False
            if self.is_drawn(step):
                trainer.train_mode(False)
                groups = super().batch(step).groups
                self._sampler.refresh(step)
                self._drawn = self._taught(self._draw(step, groups, trainer))
        except (ServersLost, Interrupted):  # the run goes on from here; servers may be started again
            trainer.keep()
            raise
        return self._sampler.remote  # of one in this process a checkpoint needs no samples: they are drawn again

    def _taught(self, groups: Sequence[Group]) -> Batch:
        """Samples with what a teacher behind a URL says of them."""
        if self.teacher is None:
            return Batch(groups)
        self._drawn = Batch(groups)  # a stop while the teacher is asked keeps the samples
        self.teacher.ask_again(groups)
        return Batch(groups, self.columns(groups))

    def batch(self, step: int, update: int = 0) -> Batch:
        return super().batch(step, update) if self._drawn is None else self._drawn

    def end(self, trainer: Trainer, record: Record) -> Record:
        assert self._sampler is not None
        record = record | {"on_policy": float(self._drawn is not None)} | self._sampler.metrics()
        self._drawn = None
        return record

    @property
    def holds(self) -> str:
        """Whether there are samples that a server drew, for the step at hand."""
        remote = self._sampler is not None and self._sampler.remote
        return "drawn" if self._restored is not None or (remote and self._drawn is not None) else ""

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The samples of the step at hand, if a server drew them."""
        if self._drawn is None or self._sampler is None or not self._sampler.remote:
            return None
        sequences = [group.sequence(0) for group in self._drawn.groups]
        return {
            "ids": torch.from_numpy(np.concatenate([ids for ids, _ in sequences]).astype(np.int64)),
            "trained": torch.from_numpy(np.concatenate([trained for _, trained in sequences])),
            "length": torch.tensor([len(ids) for ids, _ in sequences]),
            "row": torch.tensor([group.row for group in self._drawn.groups]),
        }

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        if tensors is None:
            return
        cuts = np.cumsum(tensors["length"].numpy())[:-1]
        ids, trained = (np.split(tensors[name].numpy(), cuts) for name in ("ids", "trained"))
        self._restored = [
            Group.from_sequences([(i.astype(np.int32), t)], row=row, pairs=())
            for i, t, row in zip(ids, trained, tensors["row"].tolist(), strict=True)
        ]

    def _draw(self, step: int, groups: Sequence[Group], trainer: Trainer) -> list[Group]:
        prompts, world = [g.prompt for g in groups], self.world
        dealt, streams = deal(prompts, self.settings.max_new_tokens, world), occurrences(prompts)
        mine = dealt[world.rank].tolist()
        settings = replace(self.settings, seed=seed_of_step(self.settings.seed, step))

        def draw() -> list[Any]:
            if not mine:
                return []
            assert self._sampler is not None
            pause = lambda ended, drawn: trainer.pause()  # noqa: E731
            ours = [streams[n] for n in mine]
            return list(self._sampler.sample([prompts[n] for n in mine], 1, settings, streams=ours, progress=pause))

        with self._scorer.gathered():
            samples = world.together(draw)
        every = [sample for part in world.gather(samples) for sample in part]
        back = np.argsort(np.concatenate(dealt))
        return [self._cut(group_of(g.prompt, every[n], g.row)) for g, n in zip(groups, back.tolist(), strict=True)]

    def _cut(self, group: Group) -> Group:
        if group.longest <= self.longest:
            return group
        ids, trained = group.sequence(0)
        pictures = [group.pictures] if group.pictures else ()  # prompts with pictures fit, or were refused
        cut = [(ids[: self.longest], trained[: self.longest])]
        return Group.from_sequences(cut, row=group.row, pairs=(), pictures=pictures)
