"""The stages of a run that draws responses: the check of its scoring, its memory and its sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prefopt.data.group import Group, pictures_in
from prefopt.generate.model_io import PromptSet
from prefopt.generate.sampler import SamplingParams, group_of
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.scorer import Scorer
from prefopt.rl.samplers import LocalSampler
from prefopt.train.memory import Trainee, TrainingMemory
from prefopt.train.policy import Policy
from prefopt.train.run import Run

TRIED = 4
"""Prompts to draw two responses to before training, which scoring is checked on."""


def check_samples(policy: Policy, prompts: PromptSet, settings: SamplingParams) -> CheckReport:
    """Check that scoring is exact, on samples of the policy. Raises as :func:`check_scoring`."""
    few = [prompts.ids[i] for i in range(min(TRIED, len(prompts.ids)))]
    drawn = TransformersSampler(policy.scorer).sample(few, 2, settings)
    return check_scoring(policy.scorer, [group_of(ids, many) for ids, many in zip(few, drawn, strict=True)])


def largest_update(run: Run, prompts: PromptSet) -> list[Group]:
    """What memory must hold: the longest prompt with responses of the greatest length, often enough to fill a pass."""
    config = run.config
    prompt = max(prompts.ids, key=len)
    ids = np.concatenate([prompt, np.zeros(config.max_new_tokens, np.int32)])
    sequence = (ids, np.arange(len(ids)) >= len(prompt))
    pictures = [pictures_in(prompt)] * config.num if pictures_in(prompt) else ()
    largest = Group.from_sequences([sequence] * config.num, row=0, pairs=(), pictures=pictures)
    return [largest] * -(-config.batch_size // config.minibatches)


def memory_of(run: Run, trainees: Sequence[Trainee], held: Mapping[str, int]) -> TrainingMemory:
    """The memory of a run; ``held``: bytes by model (:meth:`prefopt.rl.models.PpoModels.memory`)."""
    others = {name: count for name, count in held.items() if name in ("reference", "reward")}
    return TrainingMemory(trainees, run.config, run.device, others, run.world.ranks.local_size)


def token_budget_of(run: Run, memory: TrainingMemory, groups: Sequence[Group]) -> int:
    """The budget of ``--token-budget``, of the run's first start, or one that fits; the smallest of all ranks."""
    before = run.folder.record
    tokens = run.config.token_budget or before.get("token_budget")
    planned = memory.plan(groups, tokens=tokens, checkpointed=before.get("checkpointed"), world=run.world)
    return run.world.smallest(int(planned))


def sampler_of(run: Run, scorer: Scorer, prompts: PromptSet) -> LocalSampler:
    """What draws the responses of a run. The number of rows at once is kept for a resume: logits depend on it by
    rounding."""
    known = run.folder.record
    longest = max(map(len, prompts.ids)) + run.config.max_new_tokens
    with scorer.gathered():
        sampler = LocalSampler(scorer)
        sampler.rows = known.get("sampled_at_once") or known.get("rows") or sampler.estimate_rows(longest)
    run.folder.remember(sampled_at_once=sampler.rows)
    return sampler
