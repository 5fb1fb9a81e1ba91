"""PPO and RLOO, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.config.ppo import PpoConfig
from prefopt.config.rewards import WATCH_TIMES
from prefopt.core.phases import phase
from prefopt.core.terminal import size
from prefopt.data.group import Group
from prefopt.data.tokenizer import Tokenizer
from prefopt.generate.model_io import PromptSet, SampledModel
from prefopt.generate.sampler import SamplingParams
from prefopt.losses.rl import KlController
from prefopt.model.check import CheckReport
from prefopt.model.costs import peak_memory
from prefopt.model.scorer import Scorer
from prefopt.rl.models import PpoModels, build_models, bytes_of_others
from prefopt.rl.objective import PpoObjective
from prefopt.rl.ppo import PpoRounds
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
from prefopt.rl.rewards import Rewards, reward_in_words
from prefopt.rl.rollouts import Collector
from prefopt.rl.sample_log import SAMPLES, SampleLog
from prefopt.rl.samplers import LocalSampler, policy_sampler
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
from prefopt.rl.watch import Watch, with_true_reward
from prefopt.runs.folder import digest_of, fingerprint
from prefopt.runs.hacking import BEFORE
from prefopt.runs.history import averages_of, read_history
from prefopt.train.optim import Network
from prefopt.train.policy import Policy
from prefopt.train.rate import settle_rate
from prefopt.train.result import RunResult
from prefopt.train.routing import describe_routing, routed
from prefopt.train.run import Run, open_run, steps_of
from prefopt.train.trainer import TrainerState

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
        longest = longest_of(run, prompts, held_out)
        policy = run.loading(Policy(config, start.source, run.dtype, run.device, model, pictures=start.pictures))
        settle_rate(run, policy.scorer, updates=updates_of(config, len(prompts.ids)))
        config = run.config
        check = check_samples(policy, prompts, settings)
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
        memory, largest = memory_of(run, models), _largest(run, prompts, ptx)
        tokens = token_budget_of(run, memory, largest)
        if config.dry_run:
            _preview(run, start, settings, prompts, memory.whole_line(largest, tokens), tokens)
            return None
        same = must_stay(config, start, prompts) | _more_to_stay(held_out, ptx) | rewards.same()
        run.take_folder(same, algorithm=config.algorithm, memory=models.memory())
        say(memory.line(largest, tokens))
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
) -> PpoRounds:
    """The sampler, and the rounds that are learned from."""
    config, scorer = run.config, models.actor.apart
    longest = longest_of(run, prompts, held_out)
    sampler = policy_sampler(run, models.actor, start.tokenizer, longest=longest, stale=config.stale)
    order = order_of(config, len(prompts.ids))
    critic = models.critic.of_rollouts if models.critic is not None else None
    collector = Collector(
        prompts, sampler, settings, config.num, models.judge, scorer, critic, models.reference, run.world
    )
    other, steps = models.reference.scorer, steps_of(config, order.steps_per_epoch)
    return PpoRounds(
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


@phase("training")
def _train(
    run: Run, models: PpoModels, rounds: PpoRounds, token_budget: int, tokenizer: Tokenizer, ends: Sequence[int]
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
    state = train(run, trainer, policy, tokenizer, ends)
    rounds.watch.after(trainer, state.step)  # the last checkpoint is there: a run whose judge is lost goes on from it
    return state


def _more_to_stay(held_out: PromptSet | None, ptx: PtxTerm | None) -> dict[str, tuple[Any, str]]:
    """What a resumed run must not change either: names in ``run.json`` to (value, words)."""
    found: dict[str, tuple[Any, str]] = {}
    if held_out is not None:
        found["eval_prompts"] = (digest_of(held_out.ids), "the prompts of --eval-prompts")
    if ptx is not None:
        found["ptx_data"] = (fingerprint(ptx.groups), "the data of --ptx-data")
    return found


def _preview(
    run: Run, start: SampledModel, settings: SamplingParams, prompts: PromptSet, memory: str, tokens: int
) -> None:
    """The output of a dry run: a prompt, options, plan and memory."""
    show_prompt(run, start, prompts)
    run.say_options()
    _say_plan(run, start, settings, prompts, tokens)
    run.say(memory)
    run.say(f"memory: {size(peak_memory(run.device))} at most so far")
    run.say("dry run: nothing was trained, and no output written")


def _say_plan(run: Run, start: SampledModel, settings: SamplingParams, prompts: PromptSet, tokens: int) -> None:
    ends = [str(start.tokenizer.convert_ids_to_tokens(i)) for i in settings.stop]
    run.say(f"{plan_of(run.config, len(prompts.ids), tokens)}; {ends_of(run.config, ends)}")
    run.say(too_few(run.config, len(prompts.ids)))


def _largest(run: Run, prompts: PromptSet, ptx: PtxTerm | None) -> list[Group]:
    """What memory must hold."""
    return largest_update(run, prompts) + ([ptx.groups[int(ptx.groups.tokens_G.argmax())]] if ptx is not None else [])


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
            f"score {first['objective/scores']:.3f} in the first step and {last['objective/scores']:.3f} in {over}, by"
            f" the reward it was trained on, at {last['objective/kl']:.3g} nats from the reference; compare with"
            " prefopt"
            " compare, and look at samples"
        )
    else:
        closing = (
            f"score {first['objective/scores']:.3f} before the only step, whose effect was not measured; compare with"
            " prefopt compare, or give more --epochs"
        )
    files = ", ".join(f"`{Path(d).name}`" for d in config.prompts)
    run.finish(
        models.actor,
        results,
        seconds=seconds,
        title=_TITLES[config.algorithm],
        tag=config.algorithm,
        data=f"{len(prompts.ids)} prompts, from {files}. The reward is {reward_in_words(config)}.",
        licence="The licences of the base model, of the reward model and of the data apply.",
        closing=lambda: [closing],
    )
    return PpoResult(folder, steps, last)


_TITLES = {"ppo": "Proximal Policy Optimization", "rloo": "REINFORCE with a leave-one-out baseline"}
_CARD = ("objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy", "val/length", "val/eos_rate")
