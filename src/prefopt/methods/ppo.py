"""PPO and RLOO, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.ppo import PpoConfig
from prefopt.config.rewards import WATCH_TIMES
from prefopt.core.terminal import size
from prefopt.data.group import Group, pictures_in, shortened
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import Diverged
from prefopt.generate.model_io import PromptSet, SampledModel
from prefopt.generate.sampler import SamplingParams, group_of
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.losses.rl import KlController
from prefopt.model.card import portable
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.costs import peak_memory
from prefopt.model.scorer import Scorer
from prefopt.reference.identity import identity_of_name
from prefopt.rl.models import PpoModels, build_models, bytes_of_others
from prefopt.rl.objective import PpoObjective
from prefopt.rl.prompts import (
    PtxTerm,
    ends_of,
    order_of,
    plan_of,
    read_held_out,
    read_ptx,
    read_rollout_prompts,
    too_few,
    updates_of,
)
from prefopt.rl.rewards import Rewards
from prefopt.rl.rollouts import Collector
from prefopt.rl.rounds import Rounds, keep_last_good
from prefopt.rl.sample_log import SAMPLES, SampleLog
from prefopt.rl.samplers import LocalSampler, policy_sampler
from prefopt.rl.watch import Watch, with_true_reward
from prefopt.runs.folder import digest_of, fingerprint
from prefopt.runs.hacking import BEFORE
from prefopt.runs.history import averages_of, read_history
from prefopt.train.memory import Trainee, TrainingMemory
from prefopt.train.optim import Network
from prefopt.train.policy import Policy
from prefopt.train.rate import settle_rate
from prefopt.train.result import RunResult
from prefopt.train.routing import describe_routing, routed
from prefopt.train.run import EXAMPLE_TEXT, Run, open_run, steps_of
from prefopt.train.trainer import TrainerState

TRIED = 4
"""Prompts to draw two responses to before training, which scoring is checked on."""

Scores = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True, repr=False)
class PpoResult(RunResult):
    """``metrics`` are averages over the episodes of the last tenth of the steps."""


def run(
    config: PpoConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    reward: Scores | None = None,
    callbacks: Sequence[Any] = (),
) -> PpoResult | None:
    """Run PPO, or RLOO. ``callbacks``: see :class:`prefopt.runs.callbacks.Callback`.

    ``model``, ``tokenizer``, ``rows`` and ``reward`` replace those of ``config`` (a model is trained in place). Returns
    None for a dry run. Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop:
    the run can be resumed.
    """
    rewards = Rewards.of(config, reward)
    with open_run(config, model=model, callbacks=callbacks) as run:
        config, say = run.config, run.say
        start = SampledModel.of(config, given=model, tokenizer=tokenizer)
        prompts, settings = read_rollout_prompts(config, start, rows, run.reporter)
        held_out = read_held_out(config, start, prompts, run.reporter)
        longest = max(map(len, [*prompts.ids, *(held_out.ids if held_out else ())])) + config.max_new_tokens
        policy = run.loading(Policy(config, start.source, run.dtype, run.device, model, pictures=start.pictures))
        settle_rate(run, policy.scorer, updates=updates_of(config, len(prompts.ids)))
        config = run.config
        check = _check(policy, prompts, settings)
        run.say_scoring(policy, check)
        ptx = read_ptx(config, start.tokenizer, start.context, policy.scorer, run.reporter)
        say(policy.leftover())
        for line in describe_routing(policy.scorer, config):
            say(line)
        others = partial(bytes_of_others, config, policy, start.source, rewards)
        say(policy.make_trainable(run.world, draws=True, others=others))
        models = build_models(config, policy, start.source, start.tokenizer, settings.stop, longest, rewards, run.world)
        for line in models.words():
            say(line)
        memory = _memory(run, models)
        tokens = run.world.smallest(_token_budget(run, memory, prompts, ptx))
        if config.dry_run:
            _preview(run, start, settings, prompts, ptx, memory, tokens)
            return None
        same = _same(config, start, prompts, held_out, ptx, rewards)
        run.take_folder(same, algorithm=config.algorithm, memory=models.memory())
        say(memory.line(_largest(run, prompts, ptx), tokens))
        _say_plan(run, start, settings, prompts, tokens)
        run.folder.remember(token_budget=tokens, checkpointed=memory.trainees[0].checkpointed)
        rounds = _rounds(run, models, start, prompts, held_out, settings, check, ptx)
        state = _train(run, models, rounds, tokens, start.tokenizer, settings.stop)
        rounds.collector.sampler.close()
        run.save(policy, start.tokenizer, settings.stop)
        return _finish(run, models, prompts, state.step, state.seconds)


def _rounds(
    run: Run,
    models: PpoModels,
    start: SampledModel,
    prompts: PromptSet,
    held_out: PromptSet | None,
    settings: SamplingParams,
    check: CheckReport,
    ptx: PtxTerm | None,
) -> Rounds:
    """The sampler, and the rounds that are learned from."""
    config, scorer = run.config, models.actor.apart
    longest = max(map(len, [*prompts.ids, *(held_out.ids if held_out else ())])) + config.max_new_tokens
    sampler = policy_sampler(run, models.actor, start.tokenizer, longest=longest, stale=config.stale)
    order = order_of(config, len(prompts.ids))
    critic = models.critic.of_rollouts if models.critic is not None else None
    collector = Collector(
        prompts, sampler, settings, config.num, models.judge, scorer, critic, models.reference, run.world
    )
    other, steps = models.reference.scorer, steps_of(config, order.steps_per_epoch)
    return Rounds(
        config,
        collector,
        order,
        KlController(config.beta, config.kl_target, config.kl_horizon),
        steps=steps,
        ratio_tolerance=check.tolerance(1) / min(1.0, config.temperature),
        watch=_watch(run, models, collector, held_out, steps),
        samples=SampleLog(run.folder.path / SAMPLES, prompts, start.tokenizer, settings.stop, config.keep_samples),
        reference=None if models.is_start else replace(collector, sampler=_sampler_of(other), scorer=other),
        ptx=ptx,
    )


def _watch(run: Run, models: PpoModels, collector: Collector, held_out: PromptSet | None, steps: int) -> Watch:
    """What is measured beside training; ``collector`` answers the prompts of training."""
    often, watched = max(1, round(steps / WATCH_TIMES)), None
    if held_out is not None:
        judge = with_true_reward(models.judge, models.true_judge)
        watched = replace(collector, prompts=held_out, num=1, judge=judge, critic=None)
    return Watch(
        watched,
        every=run.config.eval_every or often,
        look_every=often,
        steps=steps,
        remember=run.folder.remember,
        known=BEFORE in run.folder.record,
    )


def _sampler_of(scorer: Scorer) -> LocalSampler:
    with scorer.gathered():
        return LocalSampler(scorer)


def _train(
    run: Run, models: PpoModels, rounds: Rounds, token_budget: int, tokenizer: Tokenizer, ends: Sequence[int]
) -> TrainerState:
    """Train to the end. If the run diverges, its last good weights are kept as a model."""
    config, policy, critic = run.config, models.actor, models.critic
    networks = {"actor": Network.of(policy.masters, config, rounds.steps, config.learning_rate)}
    if critic is not None:
        peak = config.critic_learning_rate or config.learning_rate
        networks["critic"] = Network.of(critic.weights, config, rounds.steps, peak, critic.train)
    trainer = run.trainer(
        networks,
        policy,
        routed(PpoObjective(config, critic, device=run.device), policy.scorer, config),
        rounds,
        steps=rounds.steps,
        token_budget=token_budget,
        inspect=partial(rounds.inspect, run.reporter),
    )
    try:
        return trainer.fit()
    except Diverged as error:
        kept = keep_last_good(config, run.folder, policy, tokenizer, ends, run.world, named=run.given is None)
        raise Diverged(error.reason, f"{error.remedy}; {kept}" if error.remedy else kept) from error


def _check(policy: Policy, prompts: PromptSet, settings: SamplingParams) -> CheckReport:
    """Check that scoring is exact, on samples of the policy."""
    few = [prompts.ids[i] for i in range(min(TRIED, len(prompts.ids)))]
    drawn = TransformersSampler(policy.scorer).sample(few, 2, settings)
    return check_scoring(policy.scorer, [group_of(ids, many) for ids, many in zip(few, drawn, strict=True)])


def _same(
    config: PpoConfig,
    start: SampledModel,
    prompts: PromptSet,
    held_out: PromptSet | None,
    ptx: PtxTerm | None,
    rewards: Rewards,
) -> dict[str, tuple[Any, str]]:
    """What a resumed run must not change: names in ``run.json`` to (value, words)."""
    found: dict[str, tuple[Any, str]] = {
        "data": (digest_of(prompts.ids), "the prompts"),
        "model": (start.identity().digest, "the model"),
    }
    if held_out is not None:
        found["eval_prompts"] = (digest_of(held_out.ids), "the prompts of --eval-prompts")
    if ptx is not None:
        found["ptx_data"] = (fingerprint(ptx.groups), "the data of --ptx-data")
    if config.reference is not None:
        reference = identity_of_name(config.reference, quantise=config.quantise)
        found["reference"] = (reference.digest, "the reference model")
    return found | rewards.same()


def _preview(
    run: Run,
    start: SampledModel,
    settings: SamplingParams,
    prompts: PromptSet,
    ptx: PtxTerm | None,
    memory: TrainingMemory,
    tokens: int,
) -> None:
    """The output of a dry run: prompts, options, plan and memory."""
    for row, ids in list(zip(prompts.rows, prompts.ids, strict=True))[:1]:
        run.say_example(f"row {row.row}:", shortened(start.tokenizer.decode(list(ids)), EXAMPLE_TEXT, flat=True))
    run.say_options()
    _say_plan(run, start, settings, prompts, tokens)
    run.say(memory.whole_line(_largest(run, prompts, ptx), tokens))
    run.say(f"memory: {size(peak_memory(run.device))} at most so far")
    run.say("dry run: nothing was trained, and no output written")


def _say_plan(run: Run, start: SampledModel, settings: SamplingParams, prompts: PromptSet, tokens: int) -> None:
    ends = [str(start.tokenizer.convert_ids_to_tokens(i)) for i in settings.stop]
    run.say(f"{plan_of(run.config, len(prompts.ids), tokens)}; {ends_of(run.config, ends)}")
    run.say(too_few(run.config, len(prompts.ids)))


def _largest(run: Run, prompts: PromptSet, ptx: PtxTerm | None) -> list[Group]:
    """What memory must hold: the longest prompt with responses of the greatest length, often enough to fill a pass."""
    config = run.config
    prompt = max(prompts.ids, key=len)
    ids = np.concatenate([prompt, np.zeros(config.max_new_tokens, np.int32)])
    sequence = (ids, np.arange(len(ids)) >= len(prompt))
    pictures = [pictures_in(prompt)] * config.num if pictures_in(prompt) else ()
    largest = Group.from_sequences([sequence] * config.num, row=0, pairs=(), pictures=pictures)
    per_update = -(-config.batch_size // config.minibatches)
    return [largest] * per_update + ([ptx.groups[int(ptx.groups.tokens_G.argmax())]] if ptx is not None else [])


def _memory(run: Run, models: PpoModels) -> TrainingMemory:
    trainees = [Trainee(models.actor.scorer, models.actor.masters, models.actor.blueprint)]
    critic = models.critic
    if critic is not None and critic.scorer is not None:
        trainees.append(Trainee(critic.scorer, critic.weights, critic.blueprint))
    others = models.beside_training()
    return TrainingMemory(trainees, run.config, run.device, others, run.world.ranks.local_size)


def _token_budget(run: Run, memory: TrainingMemory, prompts: PromptSet, ptx: PtxTerm | None) -> int:
    """The budget of ``--token-budget``, of the run's first start, or one that fits."""
    before = run.folder.record
    tokens = run.config.token_budget or before.get("token_budget")
    groups = _largest(run, prompts, ptx)
    return int(memory.plan(groups, tokens=tokens, checkpointed=before.get("checkpointed"), world=run.world))


def _finish(run: Run, models: PpoModels, prompts: PromptSet, steps: int, seconds: float) -> PpoResult:
    """Write the card and the last lines of the log."""
    config, folder = run.config, run.folder.path
    history = run.world.on_first(lambda: read_history(folder))
    first, ending = history.training[0], history.ending()
    last = averages_of(ending)
    episodes, since = sum(rows for _, rows in ending), ending[0][0]["step"]
    averaged = f"averages over the {episodes:.0f} episodes of steps {since} to {steps}"
    results: dict[str, Any] = {"steps": steps, "training metrics": averaged}
    for name in _CARD:
        results |= {f"first step: {name}": first.get(name), f"training: {name}": last.get(name)}
    results |= {f"memory of the {name}": size(of) for name, of in models.memory().items() if of}
    if steps > 1:
        over = "the last" if since == steps else f"the last {steps - since + 1}"
        closing = (
            f"score {first['objective/scores']:.3f} in the first step, {last['objective/scores']:.3f} in {over},"
            f" at {last['objective/kl']:.3g} nats from the reference; by the reward that was trained on: look at"
            " samples"
        )
    else:
        closing = (
            f"score {first['objective/scores']:.3f} before the only step; what came of it was not measured:"
            " prefopt compare does, and --epochs makes more steps"
        )
    files = ", ".join(f"`{Path(d).name}`" for d in config.prompts)
    run.finish(
        models.actor,
        results,
        seconds=seconds,
        title=_TITLES[config.algorithm],
        tag=config.algorithm,
        data=f"{len(prompts.ids)} prompts, from {files}. The reward is {_reward_words(config)}.",
        licence="The licences of the base model, of the reward model and of the data apply.",
        closing=lambda: [closing],
    )
    return PpoResult(folder, steps, last)


def _reward_words(config: PpoConfig) -> str:
    """The components of the reward, without folders of this machine."""
    terms = config.reward_terms
    if len(terms) == 1:
        return f"`{portable(terms[0].source)}`"
    return " + ".join(f"{term.weight:g} times `{portable(term.source)}` ({term.name})" for term in terms)


_TITLES = {"ppo": "Proximal Policy Optimization", "rloo": "REINFORCE with a leave-one-out baseline"}
_CARD = ("objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy", "val/length", "val/eos_rate")
