"""Losses on fresh responses of the policy, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefopt.config.online import OnlineConfig
from prefopt.core.phases import phase
from prefopt.core.terminal import size
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, DataError
from prefopt.generate.language_judge import LanguageJudge
from prefopt.generate.model_io import PromptSet, SampledModel
from prefopt.generate.rewards import RewardScorer
from prefopt.generate.sampler import SamplingParams
from prefopt.model.check import CheckReport
from prefopt.model.costs import peak_memory
from prefopt.reference.in_memory import TrDpoUpdate
from prefopt.rl.comparers import Comparer, LanguageComparer, PeopleComparer, Unscored
from prefopt.rl.lessons import TemperedLikelihood, TemperedPreferences, lesson_maker
from prefopt.rl.models import PpoModels, cut_frozen, reference_of, weights_in_files
from prefopt.rl.online import FirstLook, OnlineRounds
from prefopt.rl.policy_gradient import PolicyGradient
from prefopt.rl.prompts import order_of, read_rollout_prompts, too_few, updates_of
from prefopt.rl.rewards import Rewards, reward_in_words
from prefopt.rl.rollouts import Collector
from prefopt.rl.round_file import ROUNDS, RoundFiles
from prefopt.rl.sampled import SampledCollector
from prefopt.rl.samplers import policy_sampler
from prefopt.rl.stages import (
    check_samples,
    largest_update,
    longest_of,
    memory_of,
    must_stay,
    show_prompt,
    token_budget_of,
    train,
)
from prefopt.runs.history import averages_of, read_history
from prefopt.studies.study import Study
from prefopt.train.loss_options import Losses, describe, losses_of
from prefopt.train.objective import Objective
from prefopt.train.optim import Network
from prefopt.train.policy import Policy
from prefopt.train.rate import settle_rate
from prefopt.train.result import RunResult
from prefopt.train.routing import describe_routing, routed
from prefopt.train.run import Run, open_run, steps_of
from prefopt.train.step import InMemoryColumns
from prefopt.train.trainer import TrainerState

Scores = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True, repr=False)
class OnlineResult(RunResult):
    """``metrics`` are averages over the responses of the last tenth of the rounds."""

    @property
    def rounds(self) -> Path:
        """The folder of the rounds' files."""
        return self.output / ROUNDS


def run(
    config: OnlineConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    reward: Scores | None = None,
    callbacks: Sequence[Any] = (),
) -> OnlineResult | None:
    """Sample, judge and learn, round after round. ``callbacks``: see :class:`prefopt.runs.callbacks.Callback`.

    ``model``, ``tokenizer``, ``rows`` and ``reward`` replace those of ``config`` (a model is trained in place). Returns
    None for a dry run. Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop,
    also of one that waits for people: the run can be resumed.
    """
    config, terms = _losses(config)
    rewards = Rewards.of(config, reward)
    with open_run(config, model=model, callbacks=callbacks) as run:
        config, say = run.config, run.say
        start = SampledModel.of(config, given=model, tokenizer=tokenizer)
        prompts, settings = read_rollout_prompts(config, start, rows, run.reporter)
        _check_prompts(terms, prompts)
        comparer = _comparer(run)
        policy = run.loading(Policy(config, start.source, run.dtype, run.device, model, pictures=start.pictures))
        settle_rate(run, policy.scorer, updates=updates_of(config, len(prompts.ids)))
        config = run.config
        check = check_samples(policy, prompts, settings)
        run.say_scoring(policy, check)
        say(policy.leftover())
        for line in describe_routing(policy.scorer, config):
            say(line)
        say(policy.make_trainable(run.world, draws=True, others=partial(_bytes_of_others, config, policy, rewards)))
        models = _models(run, policy, start.tokenizer, settings, prompts, rewards, comparer)
        for line in models.words()[:-1]:  # there is no critic
            say(line)
        say(f"loss: {_words(config, terms)}")
        memory, largest = memory_of(run, models), largest_update(run, prompts)
        tokens = token_budget_of(run, memory, largest)
        if config.dry_run:
            _preview(run, start, prompts, tokens)
            say(memory.whole_line(largest, tokens))
            say("dry run: nothing was trained, and no output written")
            return None
        run.take_folder(
            must_stay(config, start, prompts) | _judge_to_stay(rewards, comparer),
            loss=_words(config, terms),
            memory=models.memory(),
        )
        say(memory.line(largest, tokens))
        _say_plan(run, prompts, tokens)
        run.folder.remember(token_budget=tokens, checkpointed=memory.trainees[0].checkpointed)
        rounds = _rounds(run, models, prompts, settings, start.tokenizer, terms, comparer)
        state = _train(run, models, rounds, terms, tokens, check, start.tokenizer, settings.stop)
        rounds.collector.sampler.close()
        run.save(policy, start.tokenizer, settings.stop)
        return _finish(run, policy, models, prompts, state)


def _losses(config: OnlineConfig) -> tuple[OnlineConfig, Losses | None]:
    """The options with the defaults of a loss on preferences, and this loss; None for other losses."""
    if not config.prefers:
        return config, None
    config, terms = losses_of(config)
    names = [term.loss.name for term in terms]
    kind = terms[0].loss.kind
    for option, kinds in (("labels", "pairs"), ("desirable_above", "labels")):
        if getattr(config, option) is not None and kind != kinds:
            raise ConfigError(
                f"--{option.replace('_', '-')} applies to losses on {kinds}, and {names[0]} is a loss on {kind}:"
                " leave it out"
            )
    if config.temperature != 1 and _is_live(terms):
        raise ConfigError(
            f"--temperature {config.temperature:g}: {' and '.join(names)} compares more than sampled responses, which"
            " is done at temperature 1; leave it out"
        )
    sorting = [term.loss.name for term in terms if not term.loss.per_row]
    if sorting and (config.labels == "soft" or (config.num > 2 and config.pairs == "all")):
        raise ConfigError(
            f"--loss {sorting[0]} sorts the pairs of a round, so all need equal weight: give --pairs best-worst"
            " or --num 2, and leave --labels soft out"
        )
    if config.judge is not None and any(term.loss.needs_scores for term in terms):
        raise ConfigError(
            f"--loss {config.loss} is on how far scores lie apart, and --reward {config.judge} only compares"
        )
    return config, terms


def _is_live(terms: Losses) -> bool:
    """Whether the reference is scored with every micro-batch: for whole distributions, and mismatched responses."""
    return any(term.loss.needs_distributions or term.loss.needs_mismatched for term in terms)


def _check_prompts(terms: Losses | None, prompts: PromptSet) -> None:
    if terms is None or not any(term.loss.needs_mismatched for term in terms):
        return
    if len({ids.tobytes() for ids in prompts.ids}) < 2:
        raise DataError(f"every row has the same prompt, and {terms[0].loss.name} compares with responses to others")


def _comparer(run: Run) -> Comparer | None:
    config, world = run.config, run.world
    if config.judge == "llm":
        judge = LanguageJudge(config.judge_url, config.judge_model, key_variable=config.judge_key)
        return LanguageComparer(judge, world, config.judge_parallel, run.stop)
    if config.judge == "people":
        path, title = Path(config.study), f"Responses of {Path(config.output).name}"
        if path.exists():  # another file of that name is refused here
            Study(path, read_only=True).close()
        return PeopleComparer(path, world, run.say, overlap=config.overlap, title=title, model=config.model)
    return None


def _models(
    run: Run,
    policy: Policy,
    tokenizer: Tokenizer,
    settings: SamplingParams,
    prompts: PromptSet,
    rewards: Rewards,
    comparer: Comparer | None,
) -> PpoModels:
    """The policy with its reference and the rewards; a judge that compares is no model of this run."""
    config, longest = run.config, longest_of(run, prompts)
    judge: RewardScorer
    if comparer is not None:
        judge = Unscored(comparer, tokenizer, settings.stop)
    else:
        how: dict[str, Any] = {"dtype": run.dtype, "device": run.device, "attention": config.attention}
        how |= {"longest": longest, "pictures": policy.pictures}
        judge, _ = rewards.scorers(tokenizer, settings.stop, **how)
    for model in {id(m): m for m in judge.models}.values():
        cut_frozen(model, policy, run.world)
    moves = config.ref_model_sync_steps is not None
    reference = reference_of(config, policy, longest, run.world, moves=moves)
    return PpoModels(policy, reference, judge, None, config.reference is None)


def _rounds(
    run: Run,
    models: PpoModels,
    prompts: PromptSet,
    settings: SamplingParams,
    tokenizer: Tokenizer,
    terms: Losses | None,
    comparer: Comparer | None,
) -> OnlineRounds:
    config, scorer = run.config, models.actor.apart
    order = order_of(config, len(prompts.ids))
    sampler = policy_sampler(run, models.actor, tokenizer, longest=longest_of(run, prompts), stale=config.stale)
    # A server's log-probabilities are within rounding of the scorer's, and of stale responses another model's.
    kind = Collector if config.gradient or sampler.remote else SampledCollector
    return OnlineRounds(
        config,
        kind(prompts, sampler, settings, config.num, models.judge, scorer, None, models.reference, run.world),
        order,
        lesson_maker(config, terms),
        RoundFiles(run.folder.path),
        tokenizer,
        steps=steps_of(config, order.steps_per_epoch),
        comparer=comparer,
    )


def _objective(config: OnlineConfig, terms: Losses | None, device: torch.device) -> Objective:
    if terms is not None:
        return TemperedPreferences(terms, config.temperature, device=device)
    return PolicyGradient(config, device=device) if config.gradient else TemperedLikelihood(config, device=device)


@phase("training")
def _train(
    run: Run,
    models: PpoModels,
    rounds: OnlineRounds,
    terms: Losses | None,
    token_budget: int,
    check: CheckReport,
    tokenizer: Tokenizer,
    ends: Sequence[int],
) -> TrainerState:
    """Train to the end. If the run diverges, its last good weights are kept as a model."""
    config, policy = run.config, models.actor
    live = movement = None
    if terms is not None and _is_live(terms):
        tokens = any(term.loss.needs_head_values for term in terms)
        compares = any(term.loss.needs_distributions for term in terms)
        live = InMemoryColumns(models.reference, compares=compares, tokens=tokens)
    if config.ref_model_sync_steps is not None:
        assert models.reference.weights is not None
        movement = TrDpoUpdate(models.reference.weights, config.ref_model_sync_steps, config.ref_model_mixup_alpha)
    trainer = run.trainer(
        {"actor": Network.of(policy.masters, config, rounds.steps, config.learning_rate)},
        policy,
        routed(_objective(config, terms, run.device), policy.scorer, config),
        rounds,
        steps=rounds.steps,
        token_budget=token_budget,
        reference=live,
        movement=movement,
        inspect=FirstLook(config, check, run.dtype, run.reporter),
    )
    return train(run, trainer, policy, tokenizer, ends)


def _words(config: OnlineConfig, terms: Losses | None) -> str:
    """The loss in a line."""
    if terms is not None:
        soft = ", soft labels" if config.labels == "soft" else ""
        return describe(terms) + soft
    if config.gradient is None:
        return f"SFT on the best of {config.num}, mean over {config.average}"
    std = "divided by their deviation" if config.advantage_std else "not divided by their deviation"
    mean = "ratios of whole responses" if config.average is None else f"mean over {config.average}"
    return (
        f"{config.loss} (clip {config.clip:g} and {config.clip_high:g}, {mean}, advantages {std}, beta {config.beta:g}"
        f" in the {config.kl})"
    )


def _judge_to_stay(rewards: Rewards, comparer: Comparer | None) -> dict[str, tuple[Any, str]]:
    """What a resumed run must not change of its judge: names in ``run.json`` to (value, words)."""
    if comparer is None:
        return dict(rewards.same())
    return {"judge": (comparer.model, "the model of the judge")} if isinstance(comparer, LanguageComparer) else {}


def _bytes_of_others(config: OnlineConfig, policy: Policy, rewards: Rewards) -> int:
    """About the bytes that reference and reward models take if none is in shards. ``policy`` trains already."""
    trained = sum(p.numel() for p in policy.masters.masters.values())
    found = trained if config.reference is None else weights_in_files(config.reference)
    found += sum(map(weights_in_files, rewards.models()))
    return found * policy.dtype.itemsize


def _preview(run: Run, start: SampledModel, prompts: PromptSet, tokens: int) -> None:
    """The output of a dry run: a prompt, options, plan and memory."""
    show_prompt(run, start, prompts)
    run.say_options()
    _say_plan(run, prompts, tokens)
    run.say(f"memory: {size(peak_memory(run.device))} at most so far")


def _say_plan(run: Run, prompts: PromptSet, tokens: int) -> None:
    config = run.config
    size_of, steps = (
        min(config.batch_size, len(prompts.ids)),
        steps_of(config, order_of(config, len(prompts.ids)).steps_per_epoch),
    )
    run.say(
        f"{steps} round{'s' * (steps > 1)} of {size_of} prompts with {config.num} responses each, {config.passes} x"
        f" {config.minibatches} updates a round, {tokens} tokens at once; rounds are kept in {run.folder.path / ROUNDS}"
    )
    run.say(too_few(config, len(prompts.ids)))


def _finish(run: Run, policy: Policy, models: PpoModels, prompts: PromptSet, state: TrainerState) -> OnlineResult:
    """Write the card and the last lines of the log."""
    config, folder, steps = run.config, run.folder.path, state.step
    history = run.world.on_first(lambda: read_history(folder))
    first, ending = history.training[0], history.ending()
    last = averages_of(ending)
    episodes, since = sum(rows for _, rows in ending), ending[0][0]["step"]
    results: dict[str, Any] = {
        "steps": steps,
        "training metrics": f"averages over the {episodes:.0f} responses of rounds {since} to {steps}",
    }
    for name in _CARD:
        results |= {f"first round: {name}": first.get(name), f"training: {name}": last.get(name)}
    results |= {f"memory of the {name}": size(of) for name, of in models.memory().items() if of}
    found = []
    if config.judge is None:
        ends = [f"{line['objective/scores']:.3f}" for line in (first, last)]
        found.append(f"score {ends[0]} in the first round and {ends[1]} in the last, by the reward it was trained on")
    if config.ref_model_sync_steps is None:  # of a reference that moves it says nothing
        found.append(f"{last['objective/kl']:.3g} nats from the reference")
    closing = f"{', at '.join(found) or 'trained'}; compare with prefopt compare, and look at samples"
    if idle := sum(line["round/skipped"] == line["round/prompts"] for line in history.training):
        closing = (
            f"{idle} of {steps} rounds had nothing to learn from: the judge preferred no response in them; {closing}"
        )
    judge = f"The judge: {models.judge.words}." if config.judge else f"The reward is {reward_in_words(config)}."
    files = ", ".join(f"`{Path(d).name}`" for d in config.prompts)
    run.finish(
        policy,
        results,
        seconds=state.seconds,
        title=f"Online learning ({config.loss})",
        tag="online",
        data=f"{len(prompts.ids)} prompts, from {files}. {judge}",
        licence="The licences of the base model, of the reward model and of the data apply.",
        closing=lambda: [closing],
    )
    return OnlineResult(folder, steps, last)


_CARD = ("objective/scores", "objective/best_scores", "objective/kl", "objective/entropy", "val/length", "val/eos_rate")
