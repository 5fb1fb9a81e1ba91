"""PPO and RLOO, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.ppo import PpoConfig
from prefopt.config.tools import is_model_reward
from prefopt.core.files import output_errors
from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter, duration, size
from prefopt.core.yaml_file import write_document
from prefopt.data.group import Group
from prefopt.errors import ConfigError, Diverged
from prefopt.generate.prompts import PromptSet
from prefopt.generate.rewards import Judge, TextJudge
from prefopt.generate.sampled_model import SampledModel
from prefopt.generate.sampler import group_of
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.losses.rl import AdaptiveKl, FixedKl, KlController
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.load import resolve_dtype
from prefopt.model.memory import peak_memory
from prefopt.model.packed_model import causal_model
from prefopt.model.save import add_end_tokens, repair_generation
from prefopt.reference.identity import identity_of_name
from prefopt.rewards import Reward, load_reward
from prefopt.rl.collector import Collector
from prefopt.rl.critic import trainees
from prefopt.rl.last_good import keep_last_good
from prefopt.rl.learner import Learner, LearnOptions
from prefopt.rl.loop import PhaseOptions, Phases
from prefopt.rl.models import PpoModels, build_models
from prefopt.rl.prompts import order_of, plan_of, read_prompts, steps_of, too_few
from prefopt.rl.ptx import read_ptx
from prefopt.runs.callbacks import Callbacks
from prefopt.runs.card import save_model, write_card
from prefopt.runs.folder import FREE, RunFolder, Spending, digest_of, fingerprint, spending
from prefopt.runs.history import averages_of, read_history
from prefopt.runs.metrics import Metrics
from prefopt.runs.trackers import watchers
from prefopt.train import budget
from prefopt.train.budget import prepare_machine
from prefopt.train.policy import Policy, with_base

TRIED = 4
"""Prompts that are answered twice before training, to check scoring on real samples."""

Scores = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class PpoResult:
    """What a run gives back: ``metrics`` are averages over the episodes of the last tenth of the steps."""

    output: Path
    steps: int
    metrics: dict[str, float]


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

    ``model``, ``tokenizer``, ``rows`` and ``reward`` stand in for what ``config`` names (a model is trained in place).
    Returns none for a dry run. Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after
    a stop, with everything kept.
    """
    with StopRequest() as stop:
        run = _Run(config, Reporter(config.progress), stop, model, tokenizer, rows, reward)
        run.callbacks = Callbacks([*watchers(run.config, run.folder), *callbacks], run.config.to_dict())
        with spending(run.folder, run.device) as run.spending:
            return run.run()


class _Run:
    """One run, stage by stage."""

    callbacks: Callbacks
    spending: Spending

    def __init__(
        self,
        config: PpoConfig,
        reporter: Reporter,
        stop: StopRequest,
        model: Any,
        tokenizer: Any,
        rows: Any,
        reward: Scores | None,
    ) -> None:
        self.reward = _given_reward(config.reward, reward)
        config = with_base(config, reporter.say) if model is None else config
        self.config, self.reporter, self.stop = config, reporter, stop
        self.given, self.rows = model, rows
        self.folder = RunFolder(Path(config.output), config.to_dict(), resume=config.resume, dry=config.dry_run)
        self.start = SampledModel(
            config.model,
            adapter=config.adapter,
            device=config.device,
            dtype=config.dtype,
            given=model,
            tokenizer=tokenizer,
        )
        self.device, self.tokenizer = self.start.device, self.start.tokenizer
        self.dtype = resolve_dtype(config.dtype, self.device)

    def run(self) -> PpoResult | None:
        prepare_machine(self.config, self.dtype, self.device, self.reporter)
        prompts, self.settings = read_prompts(self.config, self.start, self.rows, self.reporter)
        policy = Policy(self.config, self.start.source, self.dtype, self.device, self.given)
        try:
            if self.config.attention != "auto" and policy.scorer.path == "separate":
                raise ConfigError(f"--attention does nothing here: {policy.scorer.reason}; leave it out")
            check = self._check(policy, prompts)
            self.ptx = read_ptx(self.config, self.tokenizer, self.start.context, policy.scorer, self.reporter)
            if left := policy.leftover():
                self.reporter.say(left)
            self.reporter.say(policy.make_trainable())
            models = build_models(
                self.config,
                policy,
                self.start.source,
                self.tokenizer,
                self.settings.stop,
                self._longest(prompts),
                self._given_judge(),
            )
            for line in models.words():
                self.reporter.say(line)
            if self.config.dry_run:
                self._preview(policy, models, prompts)
                return None
            self._take_folder(prompts, models)
            phases = self._phases(policy, models, prompts, check)
            try:
                place = phases.run()
            except Diverged as error:
                kept = keep_last_good(
                    self.config, self.folder, policy, self.tokenizer, self.settings.stop, named=self.given is None
                )
                raise Diverged(error.reason, f"{error.remedy}; {kept}" if error.remedy else kept) from error
            return self._finish(policy, models, prompts, place.step, place.seconds)
        finally:
            policy.release()

    # -- what is needed before training ------------------------------------------------------------------------

    def _longest(self, prompts: PromptSet) -> int:
        return max(map(len, prompts.ids)) + self.config.max_new_tokens

    def _check(self, policy: Policy, prompts: PromptSet) -> CheckReport:
        """Sample a little, and show that the scorer is exact on it."""
        few = [prompts.ids[i] for i in range(min(TRIED, len(prompts.ids)))]
        drawn = TransformersSampler(policy.scorer).sample(few, 2, self.settings)
        groups = [group_of(ids, many) for ids, many in zip(few, drawn, strict=True)]
        check = check_scoring(policy.scorer, groups)
        scorer = policy.scorer
        if scorer.reason and scorer.path == "separate":
            self.reporter.say(f"scoring: each response separately, since {scorer.reason}")
        self.reporter.say(
            f"scoring: {scorer.path} ({scorer.kernel}, {str(self.dtype).removeprefix('torch.')}, {self.device});"
            f" rounding {check.noise:.1g} nats per token"
        )
        return check

    def _given_judge(self) -> Judge | None:
        if self.reward is None:
            return None
        return TextJudge(self.reward, self.tokenizer, self.settings.stop)

    def _take_folder(self, prompts: PromptSet, models: PpoModels) -> None:
        """From here on the output folder is this run's."""
        self.folder.take()
        self.folder.same("data", digest_of(prompts.ids), "the prompts")
        self.folder.same("model", self.start.identity().digest, "the model")
        if self.ptx is not None:
            self.folder.same("ptx_data", fingerprint(self.ptx.groups), "the data of --ptx-data")
        if self.config.reference is not None:
            found = identity_of_name(self.config.reference).digest
            self.folder.same("reference", found, "the reference model")
        if self.reward is None:
            found = identity_of_name(self.config.reward).digest
            self.folder.same("reward", found, "the reward model")
        elif (code := self.reward.digest()) is not None:
            self.folder.same("reward", code, f"the code of --reward {self.reward.name}")
        self.folder.remember(algorithm=self.config.algorithm, memory=models.memory())
        path = self.folder.path / "config.yaml"
        with output_errors(path):
            path.write_text(self._options(), encoding="utf-8")

    def _options(self) -> str:
        """The options as a file for ``--config``, less what a second run should not repeat."""
        return write_document(PpoConfig, {**self.config.to_dict(), "dry_run": False, "resume": False})

    def _preview(self, policy: Policy, models: PpoModels, prompts: PromptSet) -> None:
        say = self.reporter.say
        for row, ids in list(zip(prompts.rows, prompts.ids, strict=True))[:2]:
            self.reporter.show(f"\nrow {row.row}: {self.tokenizer.decode(ids.tolist())}")
        self.reporter.show("\n" + self._options())
        self._say_plan(prompts, self._token_budget(policy, models, prompts))
        state = 3 * sum(size for name, size in models.memory().items() if name in ("actor", "critic"))
        say(f"memory: {size(sum(models.memory().values()))} for the models, up to {size(state)} for training them")
        say("dry run: nothing was trained, and no output written")

    # -- training ----------------------------------------------------------------------------------------------

    def _phases(self, policy: Policy, models: PpoModels, prompts: PromptSet, check: CheckReport) -> Phases:
        config = self.config
        order, steps = order_of(config, len(prompts.ids)), steps_of(config, len(prompts.ids))
        tokens = self._token_budget(policy, models, prompts)
        self._say_plan(prompts, tokens)
        learner = Learner(_learn_options(config), policy.scorer, models.critic, config.temperature)
        sampler = TransformersSampler(policy.scorer)
        known = self.folder.record
        sampler.rows = (
            known.get("sampled_at_once") or known.get("rows") or sampler.estimate_rows(self._longest(prompts))
        )
        self.folder.remember(sampled_at_once=sampler.rows, token_budget=tokens)
        phases = Phases(
            learner=learner,
            collector=Collector(prompts, sampler, self.settings, config.num, models.judge, learner, models.reference),
            trained=trainees(config, policy, models.critic, steps),
            order=order,
            kl=_controller(config),
            options=PhaseOptions(
                steps=steps,
                epochs=config.ppo_epochs,
                minibatches=config.minibatches,
                seed=config.seed,
                max_grad_norm=config.max_grad_norm,
                max_kl=config.max_kl,
                ratio_tolerance=check.tolerance(1) / min(1.0, config.temperature),
                save_every=config.save_every,
                keep_last=config.keep_last,
            ),
            metrics=Metrics(self.folder.path / "metrics.jsonl"),
            reporter=self.reporter,
            checkpoints=self.folder.checkpoints,
            stop=self.stop,
            measure=lambda: {"peak_memory_bytes": float(peak_memory(self.device))},
            callbacks=self.callbacks,
            ptx=self.ptx,
            after_save=self.spending.note,
        )
        phases.place.token_budget = tokens
        torch.manual_seed(config.seed + 1)
        if config.resume:
            path = phases.resume()
            none = "no checkpoint that is whole" if phases.checkpoints.exists() else "no checkpoint yet"
            self.reporter.say(f"resumed: {path}" if path else f"{none}: starting at the first step")
        return phases

    def _say_plan(self, prompts: PromptSet, tokens: int) -> None:
        self.reporter.say(plan_of(self.config, len(prompts.ids), tokens))
        if few := too_few(self.config, len(prompts.ids)):
            self.reporter.say(few)

    def _token_budget(self, policy: Policy, models: PpoModels, prompts: PromptSet) -> int:
        """The budget of ``--token-budget``, of the run's first start, or an estimate, halved where a critic has layers
        of its own."""
        given = self.config.token_budget or self.folder.record.get("token_budget")
        if given:
            return int(given)
        own = models.critic is not None and not models.critic.is_head
        tokens = budget.estimate(
            policy.scorer,
            [_largest(prompts, self.config), *([self.ptx.largest] if self.ptx else [])],
            checkpointing=self.config.gradient_checkpointing,
            still_to_come=budget.state_bytes(policy.masters) * (2 if own else 1),
        )
        return tokens // 2 if own else tokens

    # -- after training ----------------------------------------------------------------------------------------

    def _finish(self, policy: Policy, models: PpoModels, prompts: PromptSet, steps: int, seconds: float) -> PpoResult:
        config, folder = self.config, self.folder.path
        history = read_history(folder)
        first, ending = history.training[0], history.ending()
        last = averages_of(ending)
        if said := repair_generation(causal_model(policy.scorer.model)):
            self.reporter.say(said)
        save_model(folder, policy.scorer, policy.masters, self.tokenizer)
        if said := add_end_tokens(folder, self.settings.stop, self.tokenizer, policy.scorer.model):
            self.reporter.say(said)
        episodes, since = sum(rows for _, rows in ending), ending[0][0]["step"]
        told = f"averages over the {episodes:.0f} episodes of steps {since} to {steps}"
        results: dict[str, Any] = {"steps": steps, "training metrics": told}
        for name in _CARD:
            results |= {f"first step: {name}": first.get(name), f"training: {name}": last.get(name)}
        results |= {f"memory of the {name}": size(of) for name, of in models.memory().items() if of}
        results |= {"training time": duration(seconds), "peak memory": size(peak_memory(self.device))}
        results |= policy.adapters
        files = ", ".join(f"`{Path(d).name}`" for d in config.prompts)
        write_card(
            folder,
            model=config.model,
            title=_TITLES[config.algorithm],
            tag=config.algorithm,
            data=f"{len(prompts.ids)} prompts, from {files}. The reward is `{config.reward}`.",
            settings={n: v for n, v in config.to_dict().items() if n not in FREE},
            results=results,
            license="The licences of the base model, of the reward model and of the data apply.",
        )
        self.folder.finish(results, keep_checkpoints=bool(config.save_every))
        if steps > 1:
            over = "the last" if since == steps else f"the last {steps - since + 1}"
            self.reporter.say(
                f"score {first['objective/scores']:.3f} in the first step, {last['objective/scores']:.3f} in {over},"
                f" at {last['objective/kl']:.3g} nats from the reference; by the reward that was trained on: look at"
                " samples"
            )
        else:
            self.reporter.say(
                f"score {first['objective/scores']:.3f} before the only step; what came of it was not measured:"
                " prefopt compare does, and --epochs makes more steps"
            )
        self.reporter.say(f"done in {duration(seconds)}: {folder}")
        return PpoResult(folder, steps, last)


_TITLES = {"ppo": "Proximal Policy Optimization", "rloo": "REINFORCE with a leave-one-out baseline"}
_CARD = ("objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy", "val/length", "val/eos_rate")


def _given_reward(name: str, function: Scores | None) -> Reward | None:
    """What is asked for a score, unless it is a model: a name that is none is told before any model is loaded."""
    if function is not None:
        return Reward(name, function)
    return None if is_model_reward(name) else load_reward(name)


def _learn_options(config: PpoConfig) -> LearnOptions:
    names = LearnOptions.__dataclass_fields__
    return LearnOptions(**{name: getattr(config, name) for name in names})


def _controller(config: PpoConfig) -> KlController:
    if config.kl_target is None:
        return FixedKl(config.beta)
    return AdaptiveKl(config.beta, config.kl_target, config.kl_horizon)


def _largest(prompts: PromptSet, config: PpoConfig) -> Group:
    """The longest prompt with responses of the greatest length: what memory must hold."""
    prompt = max(prompts.ids, key=len)
    whole = np.concatenate([prompt, np.zeros(config.max_new_tokens, np.int32)])
    trained = np.arange(len(whole)) >= len(prompt)
    return Group.from_sequences([(whole, trained)] * config.num, row=0, pairs=())
