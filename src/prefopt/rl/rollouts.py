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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.errors import RunError
from prefopt.generate.model_io import PromptSet
from prefopt.generate.rewards import RewardScorer
from prefopt.generate.sampler import ProgressCallback, ResponseSampler, SamplingParams, group_of, occurrences
from prefopt.model.scorer import Scorer
from prefopt.parallel.balance import balanced
from prefopt.parallel.world import ALONE, World
from prefopt.reference.in_memory import InMemoryReference
from prefopt.rewards import prompt_text
from prefopt.rl.models import Critic, look
from prefopt.train.batch import Batch, micro_batches


@dataclass(frozen=True, eq=False)
class Rollouts:
    """G prompts with N responses of M sampled tokens; tensors are on the CPU in float64.

    Log-probabilities are at the sampling temperature: ``logp_M`` by the scorer under the old policy, ``ref_logp_M``
    under the reference, ``sampled_logp_M`` by the sampler. ``value_M`` is the critic's value before each token.
    ``score_N`` is the reward, ``finished_N`` whether a response ended by itself.
    """

    groups: tuple[Group, ...]
    logp_M: torch.Tensor
    ref_logp_M: torch.Tensor
    sampled_logp_M: torch.Tensor
    value_M: torch.Tensor | None
    score_N: torch.Tensor
    finished_N: torch.Tensor

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
        }
        return found if self.value_M is None else {**found, "value": self.value_M}

    @classmethod
    def from_tensors(cls, saved: Mapping[str, torch.Tensor]) -> Rollouts:
        """The inverse of :meth:`tensors`."""
        prompts = saved["prefix"].split(saved["prefix_length"].tolist())
        ids = iter(saved["ids"].split(saved["length"].tolist()))
        groups = []
        for prompt, many in zip(prompts, saved["responses"].tolist(), strict=True):
            start = prompt.numpy()
            whole = [np.concatenate([start, next(ids).numpy()]) for _ in range(many)]
            trained = [np.arange(len(w)) >= len(start) for w in whole]
            groups.append(Group.from_sequences(list(zip(whole, trained, strict=True)), row=0, pairs=()))
        logps = (saved["logp"], saved["ref_logp"], saved["sampled_logp"])
        return cls(tuple(groups), *logps, saved.get("value"), saved["score"], saved["finished"])


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

    return Rollouts(
        groups=tuple(groups[g] for g in back),
        value_M=None if parts[0].value_M is None else joined("value_M"),
        **{name: joined(name) for name in ("logp_M", "ref_logp_M", "sampled_logp_M", "score_N", "finished_N")},
    )


SCORING_AHEAD = 4
"""Batches are this much larger than training's: no activations are kept for backward."""
LARGEST_SCORE = 1e18
"""Float32 can hold sums of squares of this."""


@dataclass(slots=True)
class Collector:
    """Makes the rollouts of a step: ``num`` responses to every prompt.

    A response ends at its first token of ``settings.stop``, which is scored. The reward sees the text before it.
    """

    prompts: PromptSet
    sampler: ResponseSampler
    settings: SamplingParams
    num: int
    judge: RewardScorer
    scorer: Scorer
    critic: Critic | None
    reference: InMemoryReference
    world: World = ALONE

    def collect_together(
        self, step: int, prompts: Sequence[int], token_budget: int, progress: ProgressCallback
    ) -> tuple[Rollouts, dict[str, float]]:
        """:meth:`collect`, the prompts dealt to the ranks by length; every rank gets the rollouts of all. What fails on
        one rank fails on all, so that they can repeat it."""
        if self.world.alone:
            return self.collect(step, prompts, token_budget, progress)
        length = np.array([len(self.prompts.ids[i]) for i in prompts])
        dealt = balanced(self.num * (length + self.settings.max_new_tokens), self.world.size)
        streams = occurrences([self.prompts.ids[i] for i in prompts])
        mine = dealt[self.world.rank].tolist()

        def collect() -> tuple[Rollouts, dict[str, float]] | None:
            if not mine:
                return None
            some = [prompts[n] for n in mine]
            return self.collect(step, some, token_budget, progress, streams=[streams[n] for n in mine])

        every = [found for found in self.world.gather(self.world.together(collect)) if found is not None]
        names = every[0][1]
        times = {name: max(times[name] for _, times in every) for name in names}
        return in_order([rollouts for rollouts, _ in every], np.concatenate(dealt)), times

    def collect(
        self,
        step: int,
        prompts: Sequence[int],
        token_budget: int,
        progress: ProgressCallback,
        *,
        streams: Sequence[int] | None = None,
    ) -> tuple[Rollouts, dict[str, float]]:
        """Rollouts of some prompts in ``step``, and the seconds of each phase.

        A sample depends on the seed, the step, its prompt and its number alone. Raises
        :class:`prefopt.errors.RunError` where the reward fails or is too large to compute with.
        """
        times, started = {}, time.monotonic()
        # Another seed in each step: a prompt that is repeated gets new responses.
        seed = int(np.random.SeedSequence([self.settings.seed, step]).generate_state(1)[0])
        settings = replace(self.settings, seed=seed)
        ids = [self.prompts.ids[i] for i in prompts]
        drawn = self.sampler.sample(ids, self.num, settings, streams=streams, progress=progress)
        groups = tuple(group_of(self.prompts.ids[i], many) for i, many in zip(prompts, drawn, strict=True))
        samples = [sample for many in drawn for sample in many]
        times["seconds/rollouts"] = time.monotonic() - started
        ahead, started = SCORING_AHEAD * token_budget, time.monotonic()
        scores = self.judge([self.prompts.rows[i] for i in prompts], groups, ahead)
        self._refuse_too_large(scores, prompts)
        times["seconds/reward"] = time.monotonic() - started
        started = time.monotonic()
        logp_M, value_M, ref_logp_M = self._look(groups, ahead)
        times["seconds/scoring"] = time.monotonic() - started
        rollouts = Rollouts(
            groups,
            logp_M,
            ref_logp_M,
            torch.from_numpy(np.concatenate([s.sampling_logps for s in samples])),
            value_M,
            torch.tensor(scores, dtype=torch.float64),
            torch.tensor([s.finished for s in samples]),
        )
        return rollouts, times

    def _refuse_too_large(self, scores: Sequence[float], prompts: Sequence[int]) -> None:
        largest, n = max((abs(score), n) for n, score in enumerate(scores))
        if largest > LARGEST_SCORE:
            text = prompt_text(self.prompts.rows[prompts[n // self.num]])
            raise RunError(
                f"the reward ({self.judge.words}) gave {scores[n]:g} for a response to {text[:60]!r}; beyond"
                f" {LARGEST_SCORE:g} the critic's squared errors overflow: scale or bound the reward"
            )

    @torch.no_grad()
    def _look(
        self, groups: Sequence[Group], token_budget: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Log-probabilities [M], values [M] and the reference's log-probabilities [M], all at the temperature."""
        found, temperature = [], self.settings.temperature
        for micro in micro_batches(self.scorer, Batch(groups), token_budget):
            logp_M, value_M = look(self.scorer, self.critic, temperature, micro.packed)
            with self.reference.scorer.at_temperature(temperature):
                ref_logp_M = self.reference.logprobs(micro.packed)
            found.append([x if x is None else x.double().cpu() for x in (logp_M, value_M, ref_logp_M)])
        logp, value, ref = zip(*found, strict=True)
        return torch.cat(logp), None if value[0] is None else torch.cat(value), torch.cat(ref)
