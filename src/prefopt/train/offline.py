"""Training on a fixed data set: the stages that SFT, distillation, DPO and reward models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prefopt.core.phases import phase
from prefopt.core.terminal import duration, size
from prefopt.data.chat.ends import trained_ends
from prefopt.data.group import show
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import IndexArray
from prefopt.model.architectures import causal_model, vocabulary_size
from prefopt.model.check import CheckReport
from prefopt.model.costs import peak_memory
from prefopt.model.scorer import Scorer
from prefopt.reference.in_memory import TrDpoUpdate
from prefopt.runs.diagnose import held_out_accuracy
from prefopt.runs.folder import fingerprint
from prefopt.runs.history import read_history
from prefopt.runs.table import reached
from prefopt.train import budget, checkpoint
from prefopt.train.data import DataBatches, TrainingData
from prefopt.train.held_out import HeldOutPrecision
from prefopt.train.memory import Trainee, TrainingMemory
from prefopt.train.objective import Objective
from prefopt.train.optim import Network
from prefopt.train.policy import Trained
from prefopt.train.reference import check_vocabulary
from prefopt.train.result import TrainingResult
from prefopt.train.routing import describe_routing, routed
from prefopt.train.run import EXAMPLE_TEXT, ModelStart, Run, steps_of
from prefopt.train.samples import HeldOutSamples
from prefopt.train.step import Differentiator, InMemoryColumns
from prefopt.train.trainer import Inspect, Trainer


class Plan(Protocol):
    """The model that a policy is compared with: a reference, or a teacher. ``movement``: how it follows the policy."""

    movement: TrDpoUpdate | None

    def say_missing(self) -> None:
        """Report what is still to be scored before training."""
        ...

    def seconds_ahead(self, scorer: Scorer, speed: float) -> float | None:
        """Seconds of that, if ``scorer`` trains ``speed`` tokens per second; None if nothing is scored ahead."""
        ...

    def in_memory(self, policy: Trained[Any]) -> InMemoryColumns | None:
        """What is scored with every micro-batch; ``policy`` is trainable already."""
        ...


@dataclass(kw_only=True)
class OfflineRun:
    """A run on ``data``."""

    run: Run
    start: ModelStart
    data: TrainingData
    policy: Trained[Any]
    _counted: TrainingMemory | None = None

    def __post_init__(self) -> None:
        config, data = self.run.config, self.data
        self.sampler = BatchSampler(
            len(data.train), config.batch_size, seed=config.seed, shuffle=config.shuffle, shares=data.shares
        )
        self.steps = steps_of(config, self.sampler.steps_per_epoch)
        self.samples = HeldOutSamples(self.run, self.start, self.policy, self.data)

    @phase("checks")
    def check(self, check: Callable[..., CheckReport]) -> CheckReport:
        """Check that scoring is exact for this model and these data."""
        model = causal_model(self.policy.scorer.model)
        check_vocabulary(self.data.groups, vocabulary_size(model), self.run.config.model)
        found = check(self.policy.scorer, self.data.groups)
        error = found.clone_error
        twin = "no small copy could be built" if error is None else f"small copy exact to {error:.0e}"
        self.run.say_scoring(self.policy, found, f" {twin};")
        self.run.say(self.policy.reading)
        self.run.say(self.policy.leftover())
        for line in describe_routing(self.policy.scorer, self.run.config):
            self.run.say(line)
        return found

    def take_folder(self, same: Mapping[str, tuple[Any, str]] | None = None, **facts: Any) -> None:
        """See :meth:`Run.take_folder`; the data must be the same, too."""
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

    @phase("training")
    def fit(
        self,
        objective: Objective,
        source: DataBatches,
        *,
        plan: Plan | None = None,
        inspect: Inspect | None = None,
        precision: HeldOutPrecision | None = None,
    ) -> Trainer:
        """Train to the end, then load the best weights if rows are held out. ``plan``: the reference, if any."""
        run, config, policy = self.run, self.run.config, self.policy
        objective = routed(objective, self.policy.scorer, self.run.config)
        reference = plan.in_memory(policy) if plan is not None else None
        tokens, speed = self.token_budget(objective, source, reference)
        run.say(self._memory(reference).line(source.groups, tokens))
        run.say(self._plan(tokens, self._seconds(objective, tokens, speed)))
        self.samples.before()
        trainer = run.trainer(
            {"policy": Network.of(policy.masters, config, self.steps, config.learning_rate)},
            policy,
            objective,
            source,
            steps=self.steps,
            token_budget=tokens,
            reference=reference,
            inspect=inspect,
            precision=precision,
            movement=plan.movement if plan is not None else None,
            speed=budget.Speed(policy.scorer.model, run.device, run.dtype, self.data.unit, run.world.size),
        )
        state = trainer.fit()
        if state.best_step is not None and state.best_step != state.step:
            policy.masters.load(checkpoint.load_best(trainer.saver.folder, state.best_step))
            run.say(f"the weights of step {state.best_step} are saved: the best on held-out {self.data.noun}")
        return trainer

    def preview(self, objective: Objective, source: DataBatches, *, plan: Plan | None = None) -> None:
        """The output of a dry run: a rendered example, the options that are set, time and memory."""
        run, policy = self.run, self.policy
        for group in self.data.source.groups[:1]:
            run.say_example(
                f"row {group.row}, trained tokens in ⟦ ⟧:",
                show(group, self.start.tokenizer, most=EXAMPLE_TEXT, flat=True),
            )
        run.say_options()
        if plan is not None:
            plan.say_missing()
        run.say(policy.make_trainable(run.world))
        objective = routed(objective, self.policy.scorer, self.run.config)
        reference = plan.in_memory(policy) if plan is not None else None
        tokens, speed = self.token_budget(objective, source, reference)
        seconds = self._seconds(objective, tokens, speed)
        before = plan.seconds_ahead(policy.scorer, speed) if plan is not None else None
        whole = "" if before is None else f", with the reference {duration(before + seconds)}"
        run.say(self._plan(tokens, seconds) + whole)
        run.say(self._memory(reference).whole_line(source.groups, tokens))
        run.say(f"memory: {size(peak_memory(run.device))} at most so far")
        run.say("dry run: nothing was trained, and no output written")

    def _plan(self, tokens: int, seconds: float) -> str:
        held_out = f", {len(self.data.held_out)} held out" if self.data.held_out else ""
        return (
            f"{self.steps} steps of {self.run.config.batch_size} {self.data.noun}{held_out}, {tokens} tokens at once:"
            f" about {duration(seconds)}"
        )

    def _seconds(self, objective: Objective, tokens: int, speed: float) -> float:
        """Training time at ``speed`` tokens per second."""
        epoch = np.asarray(self.data.train)[self.sampler.order(0)]
        costs = self.policy.scorer.layout.costs(self.data.groups)
        per_step = int(costs[epoch].sum()) / self.sampler.steps_per_epoch
        # Two passes: a second forward pass is a third of a step's work.
        return self.steps * per_step / speed * (4 / 3 if objective.whole_batch and per_step > tokens else 1)

    def token_budget(
        self, objective: Objective, source: DataBatches, reference: InMemoryColumns | None
    ) -> tuple[int, float]:
        """The token budget (of the options, the first start, or estimated) after a trial, and tokens per second."""
        run, policy, groups = self.run, self.policy, source.groups
        memory, before = self._memory(reference), run.folder.record
        tokens = run.config.token_budget or before.get("token_budget")
        tokens = memory.plan(groups, tokens=tokens, checkpointed=before.get("checkpointed"), world=run.world)
        tokens = run.world.smallest(int(tokens))
        differentiator = Differentiator(policy.scorer, objective, reference, lockstep=policy.sharded)
        state = memory.parts().get("optimiser state", 0)
        tokens, speed = budget.try_largest(differentiator, policy.masters, groups, source.of, tokens, state)
        tokens = run.world.smallest(tokens)
        run.folder.remember(token_budget=tokens, checkpointed=memory.trainees[0].checkpointed)
        return tokens, speed * run.world.size

    def _memory(self, reference: InMemoryColumns | None) -> TrainingMemory:
        """The memory of this run. Its blueprint is kept."""
        if self._counted is None:
            policy, live = self.policy, reference.live if reference is not None else None
            trainee = Trainee(policy.scorer, policy.masters, policy.blueprint)
            others = {} if live is None else {"reference": live.bytes_held}
            sharing = self.run.world.ranks.local_size
            self._counted = TrainingMemory([trainee], self.run.config, self.run.device, others, sharing)
        return self._counted

    def finish(
        self,
        trainer: Trainer,
        *,
        title: str,
        tag: str,
        measured: Mapping[str, Any] | None = None,
        closing: Callable[[], list[str]] = list,
    ) -> TrainingResult:
        """Save the policy with its card. ``measured``: further results of its weights; ``closing``: the last lines of
        the log, made when the folder is finished."""
        run, state, data = self.run, trainer.state, self.data
        metrics, averaged = trainer.averages.final(run.folder.path, trainer.objective.derived)
        held_out_loss = state.best_loss if state.best_step is not None else None
        run.save(self.policy, self.start.tokenizer, trained_ends(data.groups, self.start.tokenizer))
        for line in self.samples.after():
            run.say(line)
        results: dict[str, Any] = {
            "steps": state.step,
            "held-out loss": held_out_loss,
            "best step": state.best_step,
            "training metrics": averaged,
            **{f"training: {n}": metrics[n] for n in sorted(metrics) if n.partition("/")[0] in _CARD},
            **(self._held_out() if run.world.first else {}),
            **(measured or {}),
        }
        words = data.in_words(run.config.data)
        run.finish(self.policy, results, seconds=state.seconds, title=title, tag=tag, data=words, closing=closing)
        return TrainingResult(run.folder.path, state.step, metrics, held_out_loss, state.best_step)

    def _held_out(self) -> dict[str, Any]:
        """The metrics of held-out rows at the step with the lowest loss, for the card."""
        history = read_history(self.run.folder.path)
        accuracy = held_out_accuracy(history)
        best = reached(history)["held_out"]
        found: dict[str, Any] = {} if accuracy is None else {"held-out accuracy": accuracy.in_words}
        kept = {n for n in best if n.partition("/")[0] in _CARD and n not in ("loss", "rewards/accuracies")}
        return found | {f"held-out: {n}": best[n] for n in sorted(kept)}


_CARD = {"loss", "rewards", "logps", "lengths", "perplexity", "nll", "router"}
