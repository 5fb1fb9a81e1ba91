"""Rollouts: prompts with sampled responses, their log-probabilities, values and scores.

>>> import numpy as np
>>> from prefopt.generate.sampler import Sample, group_of
>>> def sample(*ids): return Sample(np.array(ids, np.int32), np.zeros(len(ids)), np.zeros(len(ids)), True)
>>> groups = (group_of([5, 6], [sample(1, 2), sample(3)]), group_of([5], [sample(4, 2)]))
>>> M, N = torch.zeros(5), torch.zeros(3)
>>> rollouts = Rollouts(groups, M, M, M, None, N, torch.ones(3, dtype=torch.bool))
>>> rollouts.length_N.tolist(), rollouts.group_N.tolist()
([2, 1, 2], [0, 0, 1])
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.errors import RunError
from prefopt.generate.model_io import PromptSet
from prefopt.generate.rewards import RewardScorer, WeightedRewards
from prefopt.generate.sampler import (
    Ids,
    ProgressCallback,
    Sample,
    SamplingParams,
    group_of,
    occurrences,
)
from prefopt.model.scorer import Scorer
from prefopt.parallel.arrays import gather_tensors
from prefopt.parallel.balance import balanced
from prefopt.parallel.world import ALONE, World
from prefopt.reference.in_memory import InMemoryReference
from prefopt.rewards import prompt_text
from prefopt.rl.critic import Critic, look
from prefopt.rl.pictures import pictures_saved, saved_pictures
from prefopt.rl.samplers import PolicySampler
from prefopt.train.batch import Batch, MicroBatch, micro_batches

T = TypeVar("T")
PART = "score/"
"""Begins the names of components of the reward among tensors."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """G prompts with N responses of M sampled tokens; tensors are on the CPU in float64.

    Log-probabilities are at the sampling temperature: ``logp_M`` by the scorer under the old policy, ``ref_logp_M``
    under the reference, ``sampled_logp_M`` by the sampler. ``value_M`` is the critic's value before each token.
    ``score_N`` is the reward, ``part_N`` what its components gave, by name, where there are several; ``finished_N``
    whether a response ended by itself. ``unscored``: responses that a language model gave no score, if one was asked.
    """

    groups: tuple[Group, ...]
    logp_M: torch.Tensor
    ref_logp_M: torch.Tensor
    sampled_logp_M: torch.Tensor
    value_M: torch.Tensor | None
    score_N: torch.Tensor
    finished_N: torch.Tensor
    part_N: Mapping[str, torch.Tensor] = field(default_factory=dict)
    unscored: int | None = None

    @cached_property
    def length_N(self) -> torch.Tensor:
        """Tokens of each response."""
        return torch.tensor([len(c.ids) for g in self.groups for c in g.continuations])

    @cached_property
    def group_N(self) -> torch.Tensor:
        """The prompt of each response, from 0."""
        many = torch.tensor([len(g.continuations) for g in self.groups])
        return torch.repeat_interleave(torch.arange(len(self.groups)), many)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All contents as tensors, for a checkpoint."""
        continuations = [c for g in self.groups for c in g.continuations]
        found = {
            "prefix": _joined([g.prefix for g in self.groups]),
            "prefix_length": torch.tensor([len(g.prefix) for g in self.groups]),
            "responses": torch.tensor([len(g.continuations) for g in self.groups]),
            "ids": _joined([c.ids for c in continuations]),
            "length": self.length_N,
            "logp": self.logp_M,
            "ref_logp": self.ref_logp_M,
            "sampled_logp": self.sampled_logp_M,
            "score": self.score_N,
            "finished": self.finished_N,
            **{PART + name: part_N for name, part_N in self.part_N.items()},
        }
        found |= {} if self.value_M is None else {"value": self.value_M}
        found |= saved_pictures(self.groups)
        return found | ({} if self.unscored is None else {"unscored": torch.tensor(self.unscored)})

    @classmethod
    def from_tensors(cls, saved: Mapping[str, torch.Tensor]) -> Rollouts:
        """The inverse of :meth:`tensors`."""
        prompts = saved["prefix"].split(saved["prefix_length"].tolist())
        ids = iter(saved["ids"].split(saved["length"].tolist()))
        groups: list[Group] = []
        pictures = pictures_saved(saved)
        for prompt, many in zip(prompts, saved["responses"].tolist(), strict=True):
            start = prompt.numpy()
            whole = [np.concatenate([start, next(ids).numpy()]) for _ in range(many)]
            trained = [np.arange(len(w)) >= len(start) for w in whole]
            shown = [pictures[len(groups)]] * many if pictures else ()
            groups.append(Group.from_sequences(list(zip(whole, trained, strict=True)), row=0, pairs=(), pictures=shown))
        logps = (saved["logp"], saved["ref_logp"], saved["sampled_logp"])
        parts = {name.removeprefix(PART): part_N for name, part_N in saved.items() if name.startswith(PART)}
        unscored = int(saved["unscored"]) if "unscored" in saved else None
        return cls(tuple(groups), *logps, saved.get("value"), saved["score"], saved["finished"], parts, unscored)


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def in_order(parts: Sequence[Rollouts], order: np.ndarray) -> Rollouts:
    """The rollouts of several ranks as one; group g of them all, end to end, becomes group ``order[g]``."""
    groups = [group for part in parts for group in part.groups]
    back = np.argsort(order)
    batch = Batch(groups)
    at_N, at_M = (torch.from_numpy(batch.places(axis, back)) for axis in "NM")

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])[at_N if name.endswith("_N") else at_M]

    components = {name: torch.cat([part.part_N[name] for part in parts])[at_N] for name in parts[0].part_N}
    return Rollouts(
        tuple(groups[g] for g in back),
        joined("logp_M"),
        joined("ref_logp_M"),
        joined("sampled_logp_M"),
        value_M=None if parts[0].value_M is None else joined("value_M"),
        score_N=joined("score_N"),
        finished_N=joined("finished_N"),
        part_N=components,
    )


def completed(rollouts: Rollouts, judge: RewardScorer) -> Rollouts:
    """With the mean over all other responses of the step in the place of every score (NaN) that a language model did
    not give, which moves nothing. Raises :class:`RunError` where most have none."""
    if judge.asked is None:
        return rollouts
    lacking = int(rollouts.score_N.isnan().sum())
    judge.asked.refuse_unscored(lacking, len(rollouts.score_N))
    score_N, part_N = rollouts.score_N, rollouts.part_N
    if lacking and isinstance(judge, WeightedRewards):
        part_N = {name: _with_mean(values_N) for name, values_N in part_N.items()}
        total = judge.total({name: values_N.tolist() for name, values_N in part_N.items()})
        score_N = torch.tensor(total, dtype=torch.float64)
    elif lacking:
        score_N = _with_mean(score_N)
    return replace(rollouts, score_N=score_N, part_N=part_N, unscored=lacking)


def _with_mean(values_N: torch.Tensor) -> torch.Tensor:
    return torch.where(values_N.isnan(), values_N.nanmean(), values_N)


def seed_of_step(seed: int, step: int) -> int:
    """The seed of samples in a step: another one in each, so that a prompt that is repeated gets new responses."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def deal(ids: Sequence[Ids], max_new_tokens: int, world: World) -> list[np.ndarray]:
    """Which prompts each rank draws responses to, so that all have about as many tokens; of one rank all of them."""
    if world.alone:
        return [np.arange(len(ids))]
    return balanced(np.array([len(prompt) for prompt in ids]) + max_new_tokens, world.size)


SCORING_AHEAD = 4
"""Batches are this much larger than training's: no activations are kept for backward."""
LARGEST_SCORE = 1e18
"""Float32 can hold sums of squares of this."""


@dataclass(slots=True)
class Collector:
    """Makes the rollouts of a step: ``num`` responses to every prompt.

    A response ends at its first token of ``settings.stop``, which is scored. The reward sees the text before it.
    Models in shards are gathered one at a time (:meth:`prefopt.model.scorer.PackedModel.gathered`).
    """

    prompts: PromptSet
    sampler: PolicySampler
    settings: SamplingParams
    num: int
    judge: RewardScorer
    scorer: Scorer
    critic: Critic | None
    reference: InMemoryReference
    world: World = ALONE

    def collect(
        self, step: int, prompts: Sequence[int], token_budget: int, progress: ProgressCallback
    ) -> tuple[Rollouts, dict[str, float]]:
        """Rollouts of some prompts in ``step``, and the seconds of each phase.

        A sample depends on the seed, the step, its prompt and its number alone. Prompts are dealt to the ranks by
        length, and every rank gets the rollouts of all; what fails on one rank fails on all, so that they can repeat
        it. Raises :class:`prefopt.errors.RunError` where the reward fails or is too large to compute with, and
        :class:`prefopt.core.dispatch.ServersLost` where no rollout server is left.
        """
        self.sampler.refresh(step)
        ids = [self.prompts.ids[i] for i in prompts]
        dealt, streams = deal(ids, self.settings.max_new_tokens, self.world), occurrences(ids)
        mine = dealt[self.world.rank].tolist()

        def collect() -> tuple[Rollouts | None, dict[str, float]]:
            return self._of_mine(step, [prompts[n] for n in mine], [streams[n] for n in mine], token_budget, progress)

        rollouts, times = collect() if self._in_shards else self.world.together(collect)
        if self.world.alone:
            assert rollouts is not None
            return completed(rollouts, self.judge), times
        found = gather_tensors(self.world, rollouts.tensors() if rollouts is not None else {})
        every = self.world.gather(times)
        times = {name: max(other[name] for other in every) for name in times}
        every_one = in_order([Rollouts.from_tensors(some) for some in found if some], np.concatenate(dealt))
        return completed(every_one, self.judge), times

    @property
    def _in_shards(self) -> bool:
        return self.scorer.shards is not None

    def _do(self, work: Callable[[], T]) -> T:
        """The result of one model's work. In shards models are gathered one after the other: then all ranks must have
        done it before any goes on."""
        return self.world.together(work) if self._in_shards else work()

    def _of_mine(
        self, step: int, prompts: Sequence[int], streams: Sequence[int], token_budget: int, progress: ProgressCallback
    ) -> tuple[Rollouts | None, dict[str, float]]:
        """The rollouts of this rank's prompts, if it has any, and the seconds of each phase."""
        ahead, clock = SCORING_AHEAD * token_budget, _Clock()
        with self.scorer.gathered():
            groups, samples = self._do(lambda: self._draw(step, prompts, streams, progress))
            clock.stop("seconds/rollouts")
            micro = self._do(lambda: list(micro_batches(self.scorer, Batch(groups), ahead)) if groups else [])
            logp_M, value_M = self._do(lambda: self._look(micro))
            clock.stop("seconds/scoring")
        with self.judge.gathered():
            scores, parts = self._do(lambda: self._judged(prompts, groups, ahead, lambda: progress(0, 0)))
            clock.stop("seconds/reward")
        with self.reference.scorer.gathered():
            ref_logp_M = self._do(lambda: self._reference_logps(micro))
        if self.critic is not None and self.critic.scorer is not None:
            with self.critic.scorer.gathered():
                value_M = self._do(lambda: self._own_values(micro))
        clock.stop("seconds/scoring")
        if not groups:
            return None, clock.seconds
        sampled_M = torch.from_numpy(np.concatenate([s.sampling_logps for s in samples]))
        score_N, finished_N = torch.tensor(scores, dtype=torch.float64), torch.tensor([s.finished for s in samples])
        part_N = {name: torch.tensor(part, dtype=torch.float64) for name, part in parts.items()}
        return Rollouts(groups, logp_M, ref_logp_M, sampled_M, value_M, score_N, finished_N, part_N), clock.seconds

    def _draw(
        self, step: int, prompts: Sequence[int], streams: Sequence[int], progress: ProgressCallback
    ) -> tuple[tuple[Group, ...], list[Sample]]:
        """Prompts with their responses, and these."""
        settings = replace(self.settings, seed=seed_of_step(self.settings.seed, step))
        ids = [self.prompts.ids[i] for i in prompts]
        drawn = self.sampler.sample(ids, self.num, settings, streams=streams, progress=progress)
        groups = tuple(group_of(prompt, many) for prompt, many in zip(ids, drawn, strict=True))
        return groups, [sample for many in drawn for sample in many]

    def _judged(
        self, prompts: Sequence[int], groups: Sequence[Group], token_budget: int, pause: Callable[[], None]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The scores of responses, and those of the components of the reward where there are several."""
        if not groups:
            return [], {}
        rows, parts = [self.prompts.rows[i] for i in prompts], {}
        if isinstance(self.judge, WeightedRewards):
            parts = self.judge.components(rows, groups, token_budget, pause)
            scores = self.judge.total(parts)
        else:
            scores = self.judge(rows, groups, token_budget, pause)
        self._refuse_too_large(scores, prompts)
        return scores, parts

    def _refuse_too_large(self, scores: Sequence[float], prompts: Sequence[int]) -> None:
        largest, n = max(((abs(score), n) for n, score in enumerate(scores) if score == score), default=(0.0, 0))
        if largest > LARGEST_SCORE:
            text = prompt_text(self.prompts.rows[prompts[n // self.num]])
            raise RunError(
                f"the reward ({self.judge.words}) gave {scores[n]:g} for a response to {text[:60]!r}; beyond"
                f" {LARGEST_SCORE:g} squares of scores overflow float32: scale or bound the reward"
            )

    @torch.no_grad()
    def _look(self, micro: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities [M] at the temperature, and values [M] where the critic is a head on the actor."""
        head = self.critic if self.critic is not None and self.critic.is_head else None
        found = [look(self.scorer, head, self.settings.temperature, part.packed) for part in micro]
        logp_M = _all([logp_M for logp_M, _ in found])
        return logp_M, None if head is None else _all([value_M for _, value_M in found if value_M is not None])

    @torch.no_grad()
    def _reference_logps(self, micro: Sequence[MicroBatch]) -> torch.Tensor:
        """The reference's log-probabilities [M] at the temperature."""
        with self.reference.scorer.at_temperature(self.settings.temperature):
            return _all([self.reference.logprobs(part.packed) for part in micro])

    @torch.no_grad()
    def _own_values(self, micro: Sequence[MicroBatch]) -> torch.Tensor:
        """Values [M] of a critic that is a network of its own."""
        assert self.critic is not None
        return _all([self.critic.values(part.packed, self.scorer.layout, None) for part in micro])


def _all(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Values of micro-batches end to end, on the CPU in float64."""
    return torch.cat([part.double().cpu() for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("seconds/rollouts", "seconds/reward", "seconds/scoring"), 0.0)
        self._since = time.monotonic()

    def stop(self, phase: str) -> None:
        """Count the time since the last stop for ``phase``."""
        now = time.monotonic()
        self.seconds[phase] += now - self._since
        self._since = now
