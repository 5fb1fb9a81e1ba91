"""Training on data that is read once: the stages that SFT, DPO and reward models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.core.terminal import duration, size
from prefopt.data.chat.spans import trained_ends
from prefopt.data.chat.truncate import longer_limit
from prefopt.data.group import show
from prefopt.data.table import IndexArray
from prefopt.model.architectures import causal_model, vocabulary_size
from prefopt.model.check import CheckReport
from prefopt.model.costs import peak_memory
from prefopt.runs.folder import fingerprint
from prefopt.train import budget, checkpoint
from prefopt.train.data import DataBatches, TrainingData
from prefopt.train.objective import Objective
from prefopt.train.optim import Network
from prefopt.train.policy import Trained
from prefopt.train.reference import check_vocabulary
from prefopt.train.run import ModelStart, Run, TrainingResult, steps_of
from prefopt.train.step import Differentiator, InMemoryColumns
from prefopt.train.trainer import Inspect, Trainer


@dataclass(kw_only=True)
class OfflineRun:
    """A run on ``data``. ``passes``: how often a batch that is cut goes through the model, in training steps; ``unit``:
    what groups are called in the metric of speed."""

    run: Run
    start: ModelStart
    data: TrainingData
    policy: Trained[Any]
    unit: str = "pairs"
    passes: float = 1.0

    def __post_init__(self) -> None:
        self.sampler = self.data.sampler(
            self.run.config.batch_size, seed=self.run.config.seed, shuffle=self.run.config.shuffle
        )
        self.steps = steps_of(self.run.config, self.sampler.steps_per_epoch)

    def check(self, check: Callable[..., CheckReport]) -> CheckReport:
        """Show that scoring is exact for this model and these data."""
        model = causal_model(self.policy.scorer.model)
        check_vocabulary(self.data.groups, vocabulary_size(model), self.run.config.model)
        found = check(self.policy.scorer, self.data.groups)
        error = found.clone_error
        twin = "no small copy could be built" if error is None else f"small copy exact to {error:.0e}"
        self.run.say_scoring(self.policy, found, f" {twin};")
        self.run.say(self.policy.leftover())
        return found

    def take_folder(self, same: Mapping[str, tuple[Any, str]] | None = None, **facts: Any) -> None:
        data = self.data
        sizes = f"{len(data.train)}+{len(data.held_out)}"
        identity = {**(same or {}), "data": (f"{fingerprint(data.groups)} {sizes}", "the data")}
        rows = {name: getattr(data.source, name) for name in ("read", "kept", "truncated")}
        self.run.take_folder(identity, max_length=self.start.limit, rows=rows, **facts)

    def groups_read(self) -> IndexArray | None:
        """The groups that training and evaluations read, sorted; None where ``--max-steps`` leaves none out."""
        if self.run.config.max_steps is None:
            return None
        train = np.asarray(self.data.train, np.int64)
        drawn = [train[self.sampler.batch(step)] for step in range(self.steps)]
        found = np.unique(np.concatenate([*drawn, np.asarray(self.data.held_out, np.int64)]))
        return found if len(found) < len(self.data.groups) else None

    def fit(
        self,
        objective: Objective,
        source: DataBatches,
        *,
        reference: InMemoryColumns | None = None,
        inspect: Inspect | None = None,
        movement: Any = None,
    ) -> Trainer:
        """Train to the end; the policy then has the weights to save."""
        run, config, policy = self.run, self.run.config, self.policy
        tokens, speed = self._token_budget(objective, source, reference)
        run.say(self.plan(tokens, speed))
        network = Network.of(policy.masters, config, self.steps, config.learning_rate)
        trainer = run.trainer(
            {"policy": network},
            policy,
            objective,
            source,
            steps=self.steps,
            token_budget=tokens,
            reference=reference,
            inspect=inspect,
            movement=movement,
            measure=budget.measure_of(policy.scorer.model, run.device, run.dtype, self.unit),
        )
        trainer.fit()
        return trainer

    def preview(
        self,
        objective: Callable[[], Objective],
        source: DataBatches,
        *,
        reference: Callable[[], InMemoryColumns | None] = lambda: None,
        ahead: Callable[[float], float | None] = lambda speed: None,
        say_ahead: Callable[[], None] = lambda: None,
    ) -> None:
        """What a dry run shows beyond the lines of every run: examples, options, what it would take.

        ``ahead``: seconds to be spent before training, at so many tokens per second.
        """
        run = self.run
        for group in self.data.source.groups[:2]:
            run.reporter.show(f"\nrow {group.row}, trained tokens in ⟦ ⟧:\n{show(group, self.start.tokenizer)}")
        run.reporter.show("\n" + run.options())
        say_ahead()
        run.say(self.policy.make_trainable())
        tokens, speed = self._token_budget(objective(), source, reference())
        before = ahead(speed)
        peak, state = peak_memory(run.device), budget.state_bytes(self.policy.masters)
        whole = "" if before is None else f", with the reference {duration(before + self._seconds(tokens, speed))}"
        run.say(self.plan(tokens, speed) + whole)
        run.say(f"memory: {size(peak)} in the trial, and {size(state)} for the optimiser to come")
        run.say("dry run: nothing was trained, and no output written")

    def plan(self, tokens: int, speed: float) -> str:
        """A line on how long training takes, at ``speed`` tokens per second."""
        return (
            f"{self.steps} steps of {self.run.config.batch_size} {self.data.noun}, {tokens} tokens at once: about"
            f" {duration(self._seconds(tokens, speed))}"
        )

    def _seconds(self, tokens: int, speed: float) -> float:
        epoch = np.asarray(self.data.train)[self.sampler.order(0)]
        costs = self.policy.scorer.layout.costs(self.data.groups)
        per_step = int(costs[epoch].sum()) / self.sampler.steps_per_epoch
        return self.steps * per_step / speed * (self.passes if per_step > tokens else 1)

    def _token_budget(
        self, objective: Objective, source: DataBatches, reference: InMemoryColumns | None
    ) -> tuple[int, float]:
        """The budget of ``--token-budget``, of the run's first start, or an estimate; tried either way."""
        run, policy, groups = self.run, self.policy, self.data.groups
        tokens = run.config.token_budget or run.folder.record.get("token_budget")
        if not tokens:
            tokens = budget.estimate(
                policy.scorer,
                groups,
                checkpointing=run.config.gradient_checkpointing,
                still_to_come=budget.state_bytes(policy.masters),
            )
        differentiator = Differentiator(policy.scorer, objective, reference)
        tokens, speed = budget.try_largest(differentiator, policy.masters, groups, source.of, int(tokens))
        run.folder.remember(token_budget=tokens)
        return tokens, speed

    def finish(
        self,
        trainer: Trainer,
        *,
        title: str,
        tag: str,
        before_save: Callable[[Trainer], Mapping[str, Any]] = lambda trainer: {},
        closing: Callable[[], list[str]] = list,
    ) -> TrainingResult:
        """Save the best weights, or the last, with their card. ``before_save`` gives further results of those weights;
        ``closing`` what is told once the folder is finished."""
        run, state, data = self.run, trainer.state, self.data
        metrics, told = trainer.averages.told(run.folder.path, trainer.objective.derived)
        if state.best_step is not None and state.best_step != state.step:
            self.policy.masters.load(checkpoint.load_best(trainer.checkpoints, state.best_step))
            run.say(f"the weights of step {state.best_step} are saved: the best on held-out {data.noun}")
        held_out_loss = state.best_loss if state.best_step is not None else None
        more = before_save(trainer)
        run.save(self.policy, self.start.tokenizer, trained_ends(data.groups, self.start.tokenizer))
        results: dict[str, Any] = {
            "steps": state.step,
            "held-out loss": held_out_loss,
            "best step": state.best_step,
            "training metrics": told,
            **{f"training: {n}": metrics[n] for n in sorted(metrics) if n.partition("/")[0] in _CARD},
            **more,
        }
        words = data.in_words(run.config.data)
        run.finish(self.policy, results, seconds=state.seconds, title=title, tag=tag, data=words, closing=closing)
        return TrainingResult(run.folder.path, state.step, metrics, held_out_loss, state.best_step)


_CARD = {"loss", "rewards", "logps", "lengths", "perplexity", "nll", "router"}


def say_truncated(run: Run, start: ModelStart, data: TrainingData) -> None:
    """What a longer ``--max-length`` would keep."""
    run.say(longer_limit(data.source.truncated, data.source.kept, start.limit, start.positions))
