"""The inputs of reinforcement learning: prompts, sampling settings, and the rows of the pre-training term (PPO-ptx)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefopt.config.ppo import PpoConfig
from prefopt.core.terminal import Reporter
from prefopt.data.chat.render_options import Rendering, parse_variables, read_template
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.group import Group
from prefopt.data.load import load_groups
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import GroupTable
from prefopt.data.tokenizer import Tokenizer
from prefopt.generate.model_io import PromptSet, SampledModel, read_prompt_set, renderer_for
from prefopt.generate.sampler import SamplingParams
from prefopt.model.architectures import causal_model, vocabulary_size
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.reference import check_vocabulary
from prefopt.train.run import steps_of


def read_prompts(
    config: PpoConfig, start: SampledModel, rows: Any, reporter: Reporter
) -> tuple[PromptSet, SamplingParams]:
    """Prompts that leave room for a whole response, and the settings of the sampler.

    ``rows`` stand in for what ``config`` names. A chat template that is named goes on the tokenizer: the finished model
    is used as it was trained. Raises :class:`prefopt.errors.DataError` where a row is no prompt, or one that is too
    long, unless such rows are to be skipped.
    """
    tokenizer = start.tokenizer
    template = read_template(config.chat_template) if config.chat_template else None
    renderer = renderer_for(tokenizer, template, parse_variables(config.template_variables or ()))
    prompts = read_prompt_set(
        config.prompts,
        renderer,
        rows=rows,
        context=start.context,
        room=config.max_new_tokens,  # a response that the context cuts short would be punished for it
        lines=config.lines,
        on_bad_row=config.on_bad_row,
        format=config.format,
        columns=config.column_words,
    )
    for line in prompts.summary():
        reporter.say(f"prompts: {line}")
    if repeated := len(prompts.ids) - len({ids.tobytes() for ids in prompts.ids}):
        reporter.say(f"prompts: {repeated} repeat others, whose responses count more for it")
    if template:
        tokenizer.chat_template = template
    stop = start.stop_ids(renderer)
    if not stop:
        reporter.say("responses end at no token, for the tokenizer names none: all are cut off")
    return prompts, SamplingParams(config.max_new_tokens, stop, temperature=config.temperature, seed=config.seed)


FEW = 10
"""Steps below which a person is told: runs that changed a model in a useful way took tens and hundreds."""


def order_of(config: PpoConfig, prompts: int) -> BatchSampler:
    """Which of so many prompts a step takes."""
    return BatchSampler(prompts, config.batch_size, seed=config.seed, shuffle=config.shuffle)


def plan_of(config: PpoConfig, prompts: int, tokens: int) -> str:
    """A line that says it; ``tokens`` at once."""
    size = min(config.batch_size, prompts)
    left = prompts % size
    steps = steps_of(config, order_of(config, prompts).steps_per_epoch)
    last = f" (the last of an epoch: {left})" if left and steps > prompts // size else ""
    return (
        f"{steps} step{'s' * (steps > 1)} of {size} prompts{last} with {config.num} response{'s' * (config.num > 1)}"
        f" each, {config.ppo_epochs} x {config.minibatches} updates a step, {tokens} tokens at once"
    )


def too_few(config: PpoConfig, prompts: int) -> str | None:
    """What to tell a person whose run will hardly learn, unless the steps were limited on purpose."""
    steps = steps_of(config, order_of(config, prompts).steps_per_epoch)
    if steps >= FEW or steps == config.max_steps:
        return None
    made = "1 step" if steps == 1 else f"{steps} steps"
    return (
        f"{made} of {config.algorithm.upper()}, from {prompts} prompts, will change little at --learning-rate"
        f" {config.learning_rate:g}: give more --epochs (runs take tens of steps and more), or a smaller --batch-size"
    )


@dataclass(frozen=True, slots=True)
class PtxTerm:
    """``coefficient`` times the negative log-likelihood of the rows of an update, added to the actor's loss.

    The second term of equation 2 of Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155): it keeps what the model could
    do before, which the reward does not ask for. The mean is over the trained tokens of all rows of an update, as the
    clipped loss of PPO is a mean over the tokens of a minibatch; log-probabilities are those at temperature 1. Which
    rows an update takes is a function of the seed and of the update's number.
    """

    groups: GroupTable
    order: BatchSampler
    coefficient: float
    objective: LikelihoodObjective

    @property
    def largest(self) -> Group:
        """The row that takes most memory."""
        return self.groups[int(self.groups.tokens_G.argmax())]

    def batch(self, update: int) -> Batch:
        """The rows of an update, which counts optimiser steps from 0."""
        return Batch([self.groups[i] for i in self.order.batch(update).tolist()])


def read_ptx(
    config: PpoConfig,
    tokenizer: Tokenizer,
    context: int | None,
    scorer: Scorer,
    reporter: Reporter,
) -> PtxTerm | None:
    """The term of ``config.ptx_data``, read as ``prefopt sft`` reads its data; none where there is no such option.

    Texts without a prompt are cut into windows of the model's context, or of 1024 tokens where that is longer; other
    rows are truncated to as much. Raises :class:`prefopt.errors.DataError` as :func:`load_groups`, and
    :class:`prefopt.errors.ModelError` where the tokenizer has tokens that the model has not.
    """
    if config.ptx_data is None:
        return None
    assert config.ptx_coefficient is not None and config.ptx_batch_size is not None
    variables = parse_variables(config.template_variables or ())
    ends = tokenizer.eos_token_id is not None
    rendering = Rendering(sequence_limit(None, context), ends, variables=variables, windows=True)
    source = load_groups(
        config.ptx_data,
        tokenizer,
        rendering,
        kind="demonstrations",
        on_bad_row=config.on_bad_row,
        workers=config.threads,
        reporter=reporter,
    )
    for line in source.summary():
        reporter.say(f"ptx data: {line}")
    groups, model = source.groups, scorer.model
    check_vocabulary(groups, vocabulary_size(causal_model(model)), config.model)
    order = BatchSampler(len(groups), config.ptx_batch_size, seed=config.seed, shuffle=config.shuffle)
    objective = LikelihoodObjective("tokens", device=next(model.parameters()).device)
    return PtxTerm(groups, order, config.ptx_coefficient, objective)
