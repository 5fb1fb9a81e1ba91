"""Prompts and sampling settings of reinforcement learning, and the data of the pre-training term (PPO-ptx)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.rates import AUTO
from prefopt.config.sample import SampleConfig
from prefopt.core.terminal import Reporter
from prefopt.data.chat.template import Rendering, parse_variables, read_template
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.group import pictures_in
from prefopt.data.load import load_groups
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import GroupTable
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import DataError
from prefopt.generate.model_io import PromptSet, SampledModel, read_prompt_set, renderer_for
from prefopt.generate.sampler import SamplingParams
from prefopt.model.architectures import causal_model, vocabulary_size
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.reference import check_vocabulary
from prefopt.train.run import steps_of


def read_prompts(
    config: PpoConfig | OnlineConfig | SampleConfig,
    start: SampledModel,
    rows: Any,
    reporter: Reporter,
    *,
    room: int = 1,
    names: Sequence[str] | None = None,
) -> tuple[PromptSet, tuple[int, ...]]:
    """The prompts of ``config``, or ``rows``, and the tokens that end a response.

    ``room``: tokens that must be left for a response; ``names``: other sources, of held-out prompts. Raises
    :class:`prefopt.errors.DataError` for a row without a prompt, or whose prompt is too long, unless such rows are
    skipped.
    """
    template = read_template(config.chat_template) if config.chat_template else None
    renderer = renderer_for(start.tokenizer, template, parse_variables(config.template_variables or ()))
    prompts = read_prompt_set(
        names or config.prompts,
        renderer,
        rows=rows,
        context=start.context,
        room=room,
        lines=config.lines,
        on_bad_row=config.on_bad_row,
        format=config.format,
        columns=config.column_words,
    )
    for line in prompts.summary():
        reporter.say(f"{'held-out ' * bool(names)}prompts: {line}")
    start.pictures = start.pictures or any(map(pictures_in, prompts.ids))
    return prompts, start.stop_ids(renderer)


def read_rollout_prompts(
    config: PpoConfig | OnlineConfig, start: SampledModel, rows: Any, reporter: Reporter
) -> tuple[PromptSet, SamplingParams]:
    """Prompts that leave room for a whole response, and the sampling settings.

    A chat template named in ``config`` is put on the tokenizer, so that the finished model has it. Raises as
    :func:`read_prompts`.
    """
    # A response that the context cuts off would be penalised through no fault of the policy.
    prompts, stop = read_prompts(config, start, rows, reporter, room=config.max_new_tokens)
    if start.pictures:
        _refuse_blind(config)
    if repeated := len(prompts.ids) - len({ids.tobytes() for ids in prompts.ids}):
        reporter.say(f"prompts: {repeated} duplicate{'s' * (repeated > 1)}, whose responses have more weight")
    if config.chat_template:
        start.tokenizer.chat_template = read_template(config.chat_template)
    if not stop:
        reporter.say("the tokenizer names no end token: all responses are cut off at --max-new-tokens")
    drawn: dict[str, Any] = {"temperature": config.temperature, "seed": config.seed, "never": start.never_drawn}
    return prompts, SamplingParams(config.max_new_tokens, stop, **drawn)


def _refuse_blind(config: PpoConfig | OnlineConfig) -> None:
    """Refuse what reads words alone where prompts have pictures."""
    if config.rollout_server:
        raise DataError("--prompts has pictures, which --rollout-server is not given; leave that out, or those rows")
    if config.judge_url or (isinstance(config, OnlineConfig) and config.judge):
        raise DataError("--prompts has pictures, which judges are not shown; give --reward a model, rule or function")


def read_held_out(config: PpoConfig, start: SampledModel, prompts: PromptSet, reporter: Reporter) -> PromptSet | None:
    """The prompts of ``--eval-prompts``; None without them. Raises :class:`prefopt.errors.DataError` as
    :func:`read_prompts`, and where all of them are trained on."""
    if config.eval_prompts is None:
        return None
    pictured = start.pictures
    found, _ = read_prompts(config, start, None, reporter, room=config.max_new_tokens, names=config.eval_prompts)
    if start.pictures and not pictured:
        raise DataError("--eval-prompts has pictures, and --prompts has none; leave those rows out")
    trained = {ids.tobytes() for ids in prompts.ids}
    known = sum(ids.tobytes() in trained for ids in found.ids)
    if known == len(found.ids):
        raise DataError("all of --eval-prompts are among --prompts; hold some out with prefopt data split")
    if known:
        reporter.say(f"held-out prompts: {known} of {len(found.ids)} are also trained on")
    return found


FEW = 10
"""Runs of fewer steps get a warning: useful ones take tens to hundreds."""


def order_of(config: PpoConfig | OnlineConfig, prompts: int) -> BatchSampler:
    """The prompts of each step."""
    return BatchSampler(prompts, config.batch_size, seed=config.seed, shuffle=config.shuffle)


def updates_of(config: PpoConfig | OnlineConfig, prompts: int) -> int:
    """Optimiser updates of a run, if none is skipped."""
    steps = steps_of(config, order_of(config, prompts).steps_per_epoch)
    passes = config.ppo_epochs if isinstance(config, PpoConfig) else config.passes
    return steps * passes * config.minibatches


def plan_of(config: PpoConfig, prompts: int, tokens: int) -> str:
    """A line on the steps of a run. ``tokens``: the token budget."""
    size = min(config.batch_size, prompts)
    left = prompts % size
    steps = steps_of(config, order_of(config, prompts).steps_per_epoch)
    last = f" (the last of an epoch: {left})" if left and steps > prompts // size else ""
    return (
        f"{steps} step{'s' * (steps > 1)} of {size} prompts{last} with {config.num} response{'s' * (config.num > 1)}"
        f" each, {config.ppo_epochs} x {config.minibatches} updates a step, {tokens} tokens at once"
    )


def ends_of(config: PpoConfig, ends: Sequence[str]) -> str:
    """What ends a response, and what is done with one that does not end. ``ends``: the tokens."""
    if config.missing_eos_score is not None:
        then = f"get {config.missing_eos_score:g} as their score (--missing-eos-score)"
    elif config.missing_eos_penalty is not None:
        then = f"lose {config.missing_eos_penalty:g} of their score (--missing-eos-penalty)"
    else:
        then = "keep their score"
    at = f"responses end at {' or '.join(ends)}" if ends else "no token ends a response"
    return f"{at}; those cut off after {config.max_new_tokens} tokens {then}"


def too_few(config: PpoConfig | OnlineConfig, prompts: int) -> str | None:
    """A warning for a run of few steps, unless ``--max-steps`` limits them."""
    steps = steps_of(config, order_of(config, prompts).steps_per_epoch)
    if steps >= FEW or steps == config.max_steps:
        return None
    rate = config.published_rate if config.learning_rate == AUTO else float(config.learning_rate)
    made = "1 step" if steps == 1 else f"{steps} steps"
    what = config.loss if isinstance(config, OnlineConfig) else config.algorithm.upper()
    return (
        f"{made} of {what}, from {prompts} prompts, will change little at --learning-rate {rate:g}: give more --epochs"
        " (runs take tens of steps and more), or a smaller --batch-size"
    )


@dataclass(frozen=True, slots=True)
class PtxTerm:
    """``coefficient`` times the negative log-likelihood of the rows of an update, added to the actor's loss.

    The second term of equation 2 of Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155): it preserves abilities that the
    reward does not measure. The mean is over the trained tokens of an update, as that of the clipped loss;
    log-probabilities are at temperature 1. The rows of an update depend on the seed and its number alone.
    """

    groups: GroupTable
    order: BatchSampler
    coefficient: float
    objective: LikelihoodObjective

    def batch(self, update: int) -> Batch:
        """The rows of an update, counted from 0 over the run."""
        return Batch([self.groups[i] for i in self.order.batch(update).tolist()])


def read_ptx(
    config: PpoConfig, tokenizer: Tokenizer, context: int | None, scorer: Scorer, reporter: Reporter
) -> PtxTerm | None:
    """The term of ``--ptx-data``, read as by ``prefopt sft``; None without it.

    Texts without a prompt are cut into windows of the model's context, at most 1024 tokens; other rows are truncated to
    that. Raises :class:`prefopt.errors.DataError` as :func:`load_groups`, and :class:`prefopt.errors.ModelError` where
    the tokenizer has tokens that the model lacks.
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
        columns=config.picture_words,
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
