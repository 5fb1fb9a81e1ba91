"""The stages that all runs have whose policy draws: the check of its scoring, memory, what must stay the same, and
training that leaves good weights behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.data.group import Group, pictures_in, shortened
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import Diverged
from prefopt.generate.model_io import PromptSet, SampledModel
from prefopt.generate.sampler import SamplingParams, group_of
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.check import CheckReport, check_scoring
from prefopt.reference.identity import identity_of_name
from prefopt.rl.last_good import keep_last_good
from prefopt.rl.models import PpoModels
from prefopt.runs.folder import digest_of
from prefopt.train.memory import Trainee, TrainingMemory
from prefopt.train.policy import Policy
from prefopt.train.run import EXAMPLE_TEXT, Run
from prefopt.train.trainer import Trainer, TrainerState

TRIED = 4
"""Prompts to draw two responses to before training, which scoring is checked on."""


def check_samples(policy: Policy, prompts: PromptSet, settings: SamplingParams) -> CheckReport:
    """Check that scoring is exact, on samples of the policy. Raises as :func:`check_scoring`."""
    few = [prompts.ids[i] for i in range(min(TRIED, len(prompts.ids)))]
    drawn = TransformersSampler(policy.scorer).sample(few, 2, settings)
    return check_scoring(policy.scorer, [group_of(ids, many) for ids, many in zip(few, drawn, strict=True)])


def longest_of(run: Run, *prompts: PromptSet | None) -> int:
    """Tokens of a prompt and its response, at most."""
    longest = max(len(ids) for some in prompts if some is not None for ids in some.ids)
    return longest + int(run.config.max_new_tokens)


def largest_update(run: Run, prompts: PromptSet) -> list[Group]:
    """What memory must hold: the longest prompt with responses of the greatest length, often enough to fill a pass."""
    config = run.config
    prompt = max(prompts.ids, key=len)
    ids = np.concatenate([prompt, np.zeros(config.max_new_tokens, np.int32)])
    sequence = (ids, np.arange(len(ids)) >= len(prompt))
    pictures = [pictures_in(prompt)] * config.num if pictures_in(prompt) else ()
    largest = Group.from_sequences([sequence] * config.num, row=0, pairs=(), pictures=pictures)
    return [largest] * -(-config.batch_size // config.minibatches)


def memory_of(run: Run, models: PpoModels) -> TrainingMemory:
    """The memory of training actor and critic beside the other models."""
    trainees = [Trainee(models.actor.scorer, models.actor.masters, models.actor.blueprint)]
    critic = models.critic
    if critic is not None and critic.scorer is not None:
        trainees.append(Trainee(critic.scorer, critic.weights, critic.blueprint))
    return TrainingMemory(trainees, run.config, run.device, models.beside_training(), run.world.ranks.local_size)


def token_budget_of(run: Run, memory: TrainingMemory, groups: Sequence[Group]) -> int:
    """The budget of ``--token-budget``, of the run's first start, or one that fits; the smallest of all ranks."""
    before = run.folder.record
    tokens = run.config.token_budget or before.get("token_budget")
    planned = memory.plan(groups, tokens=tokens, checkpointed=before.get("checkpointed"), world=run.world)
    return run.world.smallest(int(planned))


def must_stay(config: PpoConfig | OnlineConfig, start: SampledModel, prompts: PromptSet) -> dict[str, tuple[Any, str]]:
    """What a resumed run must not change, beside its reward: names in ``run.json`` to (value, words)."""
    found: dict[str, tuple[Any, str]] = {
        "data": (digest_of(prompts.ids), "the prompts"),
        "model": (start.identity().digest, "the model"),
    }
    if config.reference is not None:
        reference = identity_of_name(config.reference, quantise=config.quantise)
        found["reference"] = (reference.digest, "the reference model")
    return found


def show_prompt(run: Run, start: SampledModel, prompts: PromptSet) -> None:
    """The first prompt, for a dry run."""
    text = shortened(start.tokenizer.decode(list(prompts.ids[0])), EXAMPLE_TEXT, flat=True)
    run.say_example(f"row {prompts.rows[0].row}:", text)


def train(run: Run, trainer: Trainer, policy: Policy, tokenizer: Tokenizer, ends: Sequence[int]) -> TrainerState:
    """Train to the end. If the run diverges, its last good weights are kept as a model."""
    try:
        return trainer.fit()
    except Diverged as error:
        kept = keep_last_good(run.config, run.folder, policy, tokenizer, ends, run.world, named=run.given is None)
        raise Diverged(error.reason, f"{error.remedy}; {kept}" if error.remedy else kept) from error
