"""Rollouts: responses drawn from the policy, judged, and scored by policy, reference and critic."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.errors import RunError
from prefopt.generate.model_io import PromptSet
from prefopt.generate.rewards import RewardScorer
from prefopt.generate.sampler import ProgressCallback, Sampler, SamplingParams, group_of
from prefopt.model.scorer import Scorer
from prefopt.reference.in_memory import LiveReference
from prefopt.rewards import prompt_text
from prefopt.rl.critic import Critic
from prefopt.rl.objective import look
from prefopt.rl.rollouts import Rollouts
from prefopt.train.batch import Batch, micro_batches

SCORING_AHEAD = 4
"""Where nothing is kept for backward, so many times more tokens are encoded at once."""
LARGEST_SCORE = 1e18
"""Float32 holds the square of this, and the sums of many of them."""


@dataclass(slots=True)
class Collector:
    """Makes the rollouts of a step. ``num`` responses to every prompt, drawn as ``settings`` say.

    A response is cut at its first token of ``settings.stop``, which it keeps and which is scored; what a reward sees
    is the text before it.
    """

    prompts: PromptSet
    sampler: Sampler
    settings: SamplingParams
    num: int
    judge: RewardScorer
    scorer: Scorer
    critic: Critic | None
    reference: LiveReference

    def collect(
        self, step: int, prompts: Sequence[int], token_budget: int, progress: ProgressCallback
    ) -> tuple[Rollouts, dict[str, float]]:
        """Rollouts of some prompts in step ``step``, and the seconds of each phase.

        Samples depend on seed, step, prompt and number alone. Raises :class:`prefopt.errors.RunError` where the reward
        fails, or gives numbers that cannot be computed with.
        """
        times, started = {}, time.monotonic()
        settings = replace(self.settings, seed=seed_of(self.settings.seed, step))
        drawn = self.sampler.sample([self.prompts.ids[i] for i in prompts], self.num, settings, progress=progress)
        groups = tuple(group_of(self.prompts.ids[i], many) for i, many in zip(prompts, drawn, strict=True))
        samples = [sample for many in drawn for sample in many]
        times["seconds/rollouts"] = time.monotonic() - started
        ahead, started = SCORING_AHEAD * token_budget, time.monotonic()
        scores = self.judge([self.prompts.rows[i] for i in prompts], groups, ahead)
        self._refuse_absurd(scores, prompts)
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

    def _refuse_absurd(self, scores: Sequence[float], prompts: Sequence[int]) -> None:
        largest, n = max((abs(score), n) for n, score in enumerate(scores))
        if largest > LARGEST_SCORE:
            text = prompt_text(self.prompts.rows[prompts[n // self.num]])
            raise RunError(
                f"the reward ({self.judge.words}) gave {scores[n]:g} for a response to {text[:60]!r}; beyond"
                f" {LARGEST_SCORE:g} the critic's squared errors are no numbers any more: scale the reward, or bound it"
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


def seed_of(seed: int, step: int) -> int:
    """The sampler's seed in a step: another one for each, so that a prompt that comes again is answered anew."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
