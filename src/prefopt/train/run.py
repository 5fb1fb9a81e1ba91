"""A run of any method that trains on a file of data, stage by stage, from its options to a finished folder.

What methods have in common stands here; a method (:mod:`prefopt.methods`) says what it wants of the data, which model
it trains, what it optimises, and what becomes of it in the end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch

from prefopt.config.training import MethodOptions
from prefopt.core.files import output_errors
from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter, duration, size
from prefopt.core.yaml_file import write_document
from prefopt.data.chat.answers import trained_ends
from prefopt.data.chat.truncate import longer_limit, sequence_limit
from prefopt.data.kinds import Want
from prefopt.data.sampler import IndexArray, Sampler
from prefopt.data.show import show
from prefopt.errors import ConfigError
from prefopt.model.check import CheckReport
from prefopt.model.load import load_config, local_folder, resolve_device, resolve_dtype, vocabulary_size
from prefopt.model.memory import peak_memory
from prefopt.model.packed_model import causal_model, context_length
from prefopt.model.save import add_end_tokens, repair_generation
from prefopt.model.supported import refuse_untrainable
from prefopt.reference.identity import tokenizer_of_name
from prefopt.reference.in_memory import Movement
from prefopt.runs.callbacks import Callbacks
from prefopt.runs.card import save_model, write_card
from prefopt.runs.folder import FREE, RunFolder, fingerprint, spending
from prefopt.runs.metrics import Metrics, Record
from prefopt.runs.trackers import watchers
from prefopt.train import budget
from prefopt.train.budget import measure_of, prepare_machine
from prefopt.train.data import TrainingData, load_data
from prefopt.train.inputs import Values
from prefopt.train.objective import Objective
from prefopt.train.optim import Schedule, adamw
from prefopt.train.policy import AnyScorer, Trained, with_base
from prefopt.train.reference import check_vocabulary, groups_read
from prefopt.train.trainer import Loop, LoopOptions, load_best


class TrainingRun(Generic[AnyScorer]):
    """One run. Subclasses fill in the stages that raise ``NotImplementedError``, and may add to the others."""

    want: Want
    """What is made of a row."""
    which: str = "all"
    """The pairs that are read, see :data:`prefopt.train.rows.WHICH`."""
    unit = "pairs"
    """What groups are called in the name of the metric of speed."""

    def __init__(
        self,
        config: MethodOptions,
        reporter: Reporter,
        stop: StopRequest,
        *,
        model: Any = None,
        tokenizer: Any = None,
        rows: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        """``model``, ``tokenizer`` and ``rows`` stand in for what ``config`` names."""
        self.reporter, self.stop = reporter, stop
        self.given, self.rows = model, rows
        self.device = resolve_device(config.device) if model is None else next(model.parameters()).device
        if config.device and torch.device(config.device).type != self.device.type:
            raise ConfigError(f"--device {config.device}: the model given is on {self.device}; move it with model.to()")
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.config = config = with_base(config, reporter.say) if model is None else config
        self.folder = RunFolder(Path(config.output), config.to_dict(), resume=config.resume, dry=config.dry_run)
        self.source = "" if model is not None else local_folder(config.model)
        # A copy: the plain chat template may be put on it.
        self.tokenizer = copy.deepcopy(tokenizer) if tokenizer is not None else self.load_tokenizer()
        configuration = model.config if model is not None else load_config(self.source)
        refuse_untrainable(config.model if model is None else type(model).__name__, configuration)
        self.positions = context_length(configuration)
        self.limit = sequence_limit(config.max_length, self.positions)
        self.callbacks = Callbacks([*watchers(config, self.folder), *callbacks], config.to_dict())

    def run(self) -> Loop | None:
        """Every stage in turn; the loop that trained, or none for a dry run."""
        prepare_machine(self.config, self.dtype, self.device, self.reporter)
        with spending(self.folder, self.device) as self.spending:
            return self._run()

    def _run(self) -> Loop | None:
        self.data = self.load()
        self._tell(longer_limit(self.data.source.truncated, self.data.source.kept, self.limit, self.positions))
        self.before_model()
        self.policy = self.load_policy()
        try:
            policy, groups = self.policy, self.data.groups
            check_vocabulary(groups, vocabulary_size(causal_model(policy.scorer.model)), self.config.model)
            if self.config.attention != "auto" and policy.scorer.path == "separate":
                raise ConfigError(f"--attention does nothing here: {policy.scorer.reason}; leave it out")
            self.check = self.check_scores()
            self._say_scoring()
            self._tell(self.policy.leftover())
            self.prepare()
            if self.config.dry_run:
                self._preview()
                return None
            self._take_folder()
            objective = self.objective()
            loop = self._loop(objective)
            loop.run()
            self._finish(loop)
            return loop
        finally:
            self.policy.release()

    # -- what a method says ------------------------------------------------------------------------------------

    def load_tokenizer(self) -> Any:
        """The tokenizer of the model named."""
        return tokenizer_of_name(self.config.model, self.config.named_adapter)

    def load(self) -> TrainingData:
        """The data as the method wants them."""
        return load_data(
            self.config,
            self.tokenizer,
            self.limit,
            self.rows,
            self.reporter,
            seed=self.config.seed,
            want=self.want,
            which=self.which,
            workers=self.config.threads,
            stop=self.stop,
        )

    def before_model(self) -> None:
        """What must be looked at before a model takes memory."""

    def load_policy(self) -> Trained[AnyScorer]:
        """The model, not yet trainable."""
        raise NotImplementedError

    def check_scores(self) -> CheckReport:
        """That scoring is exact for this model and these data."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Whatever else is needed, before anything is written; says what is optimised."""

    def identities(self) -> dict[str, tuple[str, str]]:
        """What must be the same at a resume beside options and data: name in ``run.json`` to (digest, words)."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` is told beside."""
        return {}

    def objective(self) -> Objective:
        """What is optimised; makes the policy trainable on the way."""
        raise NotImplementedError

    def objective_to_try(self) -> Objective:
        """The same for a step of a dry run, in which nothing may be computed ahead; the policy is trainable."""
        raise NotImplementedError

    def work_ahead(self, speed: float) -> float | None:
        """Seconds that a dry run says are to be spent before training, at ``speed`` tokens per second."""
        return None

    def inspect_first(self, objective: Objective, record: Record, indices: Sequence[int], values: Values) -> str | None:
        """What to say of the first step's numbers, before any weight has moved."""
        return None

    @property
    def movement(self) -> Movement | None:
        """How the reference moves, where it does."""
        return None

    @property
    def passes(self) -> float:
        """How often a batch that is cut goes through the model, in training steps."""
        return 1.0

    def trained(self, loop: Loop) -> dict[str, Any]:
        """What follows training, on the weights that are saved; the results it adds to the card."""
        return {}

    def save(self) -> None:
        """Write the model."""
        save_model(self.folder.path, self.policy.scorer, self.policy.masters, self.tokenizer)

    def title(self) -> tuple[str, str]:
        """What the card calls the method, and its tag."""
        raise NotImplementedError

    def closing(self) -> list[str]:
        """What is said once the folder is finished."""
        return []

    # -- what is needed before training ------------------------------------------------------------------------

    def _say_scoring(self) -> None:
        scorer, check = self.policy.scorer, self.check
        if scorer.reason and scorer.path == "separate":
            self.reporter.say(f"scoring: each response separately, since {scorer.reason}")
        error = check.clone_error
        twin = "no small copy could be built" if error is None else f"small copy exact to {error:.0e}"
        self.reporter.say(
            f"scoring: {scorer.path} ({scorer.kernel}, {str(self.dtype).removeprefix('torch.')}, {self.device});"
            f" {twin}; rounding {check.noise:.1g} {check.unit}"
        )

    def _take_folder(self) -> None:
        """From here on the output folder is this run's."""
        self.folder.take()
        for name, (digest, words) in self.identities().items():
            self.folder.same(name, digest, words)
        sizes = f"{len(self.data.train)}+{len(self.data.held_out)}"
        self.folder.same("data", f"{fingerprint(self.data.groups)} {sizes}", "the data")
        rows = {name: getattr(self.data.source, name) for name in ("read", "kept", "truncated")}
        self.folder.remember(max_length=self.limit, rows=rows, **self.facts())
        path = self.folder.path / "config.yaml"
        with output_errors(path):
            path.write_text(self._options(), encoding="utf-8")

    def _options(self) -> str:
        """The options as a file for ``--config``, less what a second run should not repeat."""
        return write_document(type(self.config), {**self.config.to_dict(), "dry_run": False, "resume": False})

    def _preview(self) -> None:
        """What a dry run shows beyond the lines of every run: examples, options, what it would take."""
        say = self.reporter.say
        for group in self.data.source.groups[:2]:
            self.reporter.show(f"\nrow {group.row}, trained tokens in ⟦ ⟧:\n{show(group, self.tokenizer)}")
        self.reporter.show("\n" + self._options())
        self.say_ahead()
        say(self.policy.make_trainable())
        tokens, speed = self._token_budget(self.objective_to_try())
        ahead = self.work_ahead(speed)
        peak, state = peak_memory(self.device), budget.state_bytes(self.policy.masters)
        whole = "" if ahead is None else f", with the reference {duration(ahead + self._seconds(tokens, speed))}"
        say(self._plan(tokens, speed) + whole)
        say(f"memory: {size(peak)} in the trial, and {size(state)} for the optimiser to come")
        say("dry run: nothing was trained, and no output written")

    def say_ahead(self) -> None:
        """What a dry run says is to be computed before training."""

    # -- training ----------------------------------------------------------------------------------------------

    def _loop(self, objective: Objective) -> Loop:
        config, data, policy = self.config, self.data, self.policy
        steps = self.steps()
        tokens, speed = self._token_budget(objective)
        self.reporter.say(self._plan(tokens, speed))
        assert config.learning_rate is not None
        betas = (config.adam_beta1, config.adam_beta2)
        masters = policy.masters
        loop = Loop(
            scorer=policy.scorer,
            masters=masters,
            optimizer=adamw(
                masters.masters, betas=betas, epsilon=config.adam_epsilon, weight_decay=config.weight_decay
            ),
            schedule=Schedule(config.schedule, config.learning_rate, steps, round(config.warmup * steps)),
            objective=objective,
            groups=data.groups,
            train=data.train,
            held_out=data.held_out,
            sampler=self._sampler(),
            options=LoopOptions(
                steps=steps,
                max_grad_norm=config.max_grad_norm,
                eval_every=config.eval_every,
                early_stopping=config.early_stopping,
                save_every=config.save_every,
                keep_last=config.keep_last,
            ),
            metrics=Metrics(self.folder.path / "metrics.jsonl"),
            reporter=self.reporter,
            checkpoints=self.folder.checkpoints,
            stop=self.stop,
            token_budget=tokens,
            measure=measure_of(policy.scorer.model, self.device, self.dtype, self.unit),
            inspect_first=lambda *found: self._tell(self.inspect_first(objective, *found)),
            callbacks=self.callbacks,
            movement=self.movement,
            after_save=self.spending.note,
        )
        torch.manual_seed(config.seed + 1)
        if config.resume:
            path = loop.resume()
            none = "no checkpoint that is whole" if loop.checkpoints.exists() else "no checkpoint yet"
            self.reporter.say(f"resumed: {path}" if path else f"{none}: starting at the first step")
        return loop

    def _sampler(self) -> Sampler:
        return self.data.sampler(self.config.batch_size, seed=self.config.seed, shuffle=self.config.shuffle)

    def steps(self) -> int:
        """How many there are to do."""
        steps = max(1, math.ceil(self.config.epochs * self._sampler().steps_per_epoch))
        return min(steps, self.config.max_steps or steps)

    def groups_read(self) -> IndexArray | None:
        """The groups that training and evaluations read, where ``--max-steps`` leaves some out."""
        if self.config.max_steps is None:
            return None
        found = groups_read(self._sampler(), self.steps(), self.data.train, self.data.held_out)
        return found if len(found) < len(self.data.groups) else None

    def _seconds(self, tokens: int, speed: float) -> float:
        sampler = self._sampler()
        epoch = np.asarray(self.data.train)[sampler.order(0)]
        per_step = int(self.policy.scorer.layout.costs(self.data.groups)[epoch].sum()) / sampler.steps_per_epoch
        return self.steps() * per_step / speed * (self.passes if per_step > tokens else 1)

    def _plan(self, tokens: int, speed: float) -> str:
        return (
            f"{self.steps()} steps of {self.config.batch_size} {self.data.noun}, {tokens} tokens at once: about"
            f" {duration(self._seconds(tokens, speed))}"
        )

    def _token_budget(self, objective: Objective) -> tuple[int, float]:
        """The budget of ``--token-budget``, of the run's first start, or an estimate; tried either way."""
        policy, groups = self.policy, self.data.groups
        tokens = self.config.token_budget or self.folder.record.get("token_budget")
        if not tokens:
            tokens = budget.estimate(
                policy.scorer,
                groups,
                checkpointing=self.config.gradient_checkpointing,
                still_to_come=budget.state_bytes(policy.masters),
            )
        tokens, speed = budget.try_largest(policy.scorer, policy.masters, objective, groups, int(tokens))
        self.folder.remember(token_budget=tokens)
        return tokens, speed

    def _tell(self, line: str | None) -> None:
        if line is not None:
            self.reporter.say(line)

    # -- after training ----------------------------------------------------------------------------------------

    def _finish(self, loop: Loop) -> None:
        progress, data, folder = loop.progress, self.data, self.folder.path
        self.metrics, told = loop.averages.told(folder, loop.objective.derived)
        if progress.best_step is not None and progress.best_step != progress.step:
            loop.masters.load(load_best(loop.checkpoints, progress.best_step))
            self.reporter.say(f"the weights of step {progress.best_step} are saved: the best on held-out {data.noun}")
        self.held_out_loss = progress.best_loss if progress.best_step is not None else None
        more = self.trained(loop)
        self._tell(repair_generation(causal_model(loop.scorer.model)))
        self.save()
        self._tell(add_end_tokens(folder, trained_ends(data.groups, self.tokenizer), self.tokenizer, loop.scorer.model))
        results: dict[str, Any] = {
            "steps": progress.step,
            "held-out loss": self.held_out_loss,
            "best step": progress.best_step,
            "training metrics": told,
            **{f"training: {n}": self.metrics[n] for n in sorted(self.metrics) if n.partition("/")[0] in _CARD},
            **more,
            "training time": duration(progress.seconds),
            "peak memory": size(peak_memory(self.device)),
        } | self.policy.adapters
        title, tag = self.title()
        write_card(
            folder,
            model=self.config.model,
            title=title,
            tag=tag,
            data=data.in_words(self.config.data),
            settings={n: v for n, v in self.config.to_dict().items() if n not in FREE},
            results=results,
            license="The licences of the base model and of the data apply.",
        )
        self.folder.finish(results, keep_checkpoints=bool(self.config.save_every))
        for line in self.closing():
            self.reporter.say(line)
        self.reporter.say(f"done in {duration(progress.seconds)}: {folder}")


_CARD = {"loss", "rewards", "logps", "lengths", "perplexity", "nll", "router"}
