"""Direct Preference Optimization, from a configuration to a finished model."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.document import write_document
from prefopt.config.dpo import DpoConfig
from prefopt.data.group import Group
from prefopt.data.packer import PackedBatch
from prefopt.data.sampler import Sampler
from prefopt.data.show import show
from prefopt.data.tokenizer import load_tokenizer
from prefopt.data.truncate import sequence_limit
from prefopt.disk.write import output_errors
from prefopt.errors import ConfigError
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.flops import FlopCount, matmul_peak
from prefopt.model.live import Movement
from prefopt.model.load import (
    load_config,
    local_folder,
    resolve_device,
    resolve_dtype,
    slow_dtype,
    vocabulary_size,
)
from prefopt.model.memory import peak_memory
from prefopt.model.save import repair_generation
from prefopt.model.scorer import Scorer, causal_model
from prefopt.model.sharing import context_length
from prefopt.progress import Reporter, duration, size
from prefopt.train import budget
from prefopt.train.against import Against
from prefopt.train.best import load_best
from prefopt.train.callbacks import Callbacks
from prefopt.train.card import save_model, write_card
from prefopt.train.data import TrainingData, load_data
from prefopt.train.diagnose import diagnose, in_words
from prefopt.train.folder import FREE, RunFolder, fingerprint
from prefopt.train.history import read_history
from prefopt.train.loop import Loop, LoopOptions
from prefopt.train.metrics import Metrics
from prefopt.train.objective import PreferenceObjective
from prefopt.train.optim import Schedule, adamw
from prefopt.train.policy import Policy
from prefopt.train.preflight import inspect_first
from prefopt.train.reference import ReferenceRun, check_vocabulary, choose_reference, identify
from prefopt.train.stop import StopRequest
from prefopt.train.sums import Record
from prefopt.train.terms import needs_reference, terms_of, want_of, words
from prefopt.train.watch import watchers


@dataclass(frozen=True, slots=True)
class DpoResult:
    """What a run gives back: ``metrics`` are the last step's, ``held_out_loss`` is that of the saved weights."""

    output: Path
    steps: int
    metrics: dict[str, float]
    held_out_loss: float | None
    best_step: int | None


def run(
    config: DpoConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> DpoResult | None:
    """Run DPO, or the other loss of ``config``. ``callbacks``: see :class:`prefopt.train.callbacks.Callback`.

    ``model``, ``tokenizer`` and ``rows`` stand in for what ``config`` names (a model is trained in place).

    Returns none for a dry run. Raises :class:`prefopt.errors.UserError`, and
    :class:`prefopt.errors.Interrupted` after a stop, with everything kept.
    """
    with StopRequest() as stop:
        run = _Run(config, Reporter(config.progress), stop, model, tokenizer, rows)
        run.callbacks = Callbacks([*watchers(run.config, run.folder), *callbacks], run.config.to_dict())
        return run.run()


class _Run:
    """One run, stage by stage."""

    callbacks: Callbacks

    def __init__(
        self, config: DpoConfig, reporter: Reporter, stop: StopRequest, model: Any, tokenizer: Any, rows: Any
    ) -> None:
        config, self.terms = terms_of(config)
        self.config, self.reporter, self.stop = config, reporter, stop
        self.given, self.rows = model, rows
        self.device = resolve_device(config.device) if model is None else next(model.parameters()).device
        if config.device and torch.device(config.device).type != self.device.type:
            raise ConfigError(f"--device {config.device}: the model given is on {self.device}; move it with model.to()")
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.folder = RunFolder(Path(config.output), config.to_dict(), resume=config.resume, dry=config.dry_run)
        self.source = "" if model is not None else local_folder(config.model)
        # A copy: the plain chat template may be put on it.
        self.tokenizer = copy.deepcopy(tokenizer) if tokenizer is not None else load_tokenizer(self.source)
        positions = context_length(model.config if model is not None else load_config(self.source))
        self.limit = sequence_limit(config.max_length, positions)

    def run(self) -> DpoResult | None:
        self._prepare_machine()
        data = load_data(
            self.config,
            self.tokenizer,
            self.limit,
            self.rows,
            self.reporter,
            seed=self.config.seed,
            want=want_of(self.terms),
            workers=self.config.threads,
            stop=self.stop,
        )
        choice = choose_reference(self.config, self.given) if needs_reference(self.terms) else None
        identity = identify(choice, self.given) if choice else None
        policy = Policy(self.config, self.source, self.dtype, self.device, self.given)
        try:
            check_vocabulary(data.groups, vocabulary_size(causal_model(policy.scorer.model)), self.config.model)
            if self.config.attention != "auto" and policy.scorer.path == "separate":
                raise ConfigError(f"--attention does nothing here: {policy.scorer.reason}; leave it out")
            check = check_scoring(policy.scorer, data.groups)
            self._say_scoring(policy.scorer, check)
            self.reporter.say(f"loss: {words(self.terms)}")
            reference = None
            if choice and identity:
                tokens = any(term.loss.needs_head_values for term in self.terms)
                reference = ReferenceRun(choice, identity, policy.scorer, self.config, token_values=tokens)
            against = Against(self.config, self.terms, data, reference, self.limit, self.reporter)
            if self.config.dry_run:
                self._preview(data, against, policy)
                return None
            self._take_folder(data, reference)
            values = against.values(policy.scorer, self.folder, self.stop)
            self.reporter.say(policy.make_trainable())
            objective = against.objective(policy, values)
            known = check if choice and choice.is_start else None
            loop = self._loop(policy, objective, data, known, against.movement)
            loop.run()
            return self._finish(loop, data)
        finally:
            policy.release()
            self.folder.leave()

    # -- what is needed before training ------------------------------------------------------------------------

    def _prepare_machine(self) -> None:
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if slow := slow_dtype(self.dtype, self.device):
            self.reporter.say(slow)
        if self.device.type == "mps" and self.dtype == torch.float64:
            raise ConfigError("--dtype float64: mps has none; take --device cpu")

    def _say_scoring(self, scorer: Scorer, check: CheckReport) -> None:
        if scorer.reason and scorer.path == "separate":
            self.reporter.say(f"scoring: each response separately, since {scorer.reason}")
        error = check.clone_error
        twin = "no small copy could be built" if error is None else f"small copy exact to {error:.0e}"
        self.reporter.say(
            f"scoring: {scorer.path} ({scorer.kernel}, {str(self.dtype).removeprefix('torch.')}, {self.device});"
            f" {twin}; rounding {check.noise:.1g} nats per token"
        )

    def _take_folder(self, data: TrainingData, reference: ReferenceRun | None) -> None:
        """From here on the output folder is this run's."""
        self.folder.take()
        self.folder.same("reference", reference.identity.digest if reference else "none", "the reference model")
        sizes = f"{len(data.train)}+{len(data.held_out)}"
        self.folder.same("data", f"{fingerprint(data.groups)} {sizes}", "the data")
        source = data.source
        rows = {"read": source.read, "kept": source.kept, "truncated": source.truncated}
        self.folder.remember(max_length=self.limit, loss=words(self.terms), rows=rows)
        path = self.folder.path / "config.yaml"
        with output_errors(path):
            path.write_text(self._options(), encoding="utf-8")

    def _options(self) -> str:
        """The options as a file for ``--config``, less what a second run should not repeat."""
        return write_document(DpoConfig, {**self.config.to_dict(), "dry_run": False, "resume": False})

    def _preview(self, data: TrainingData, against: Against, policy: Policy) -> None:
        """What a dry run shows beyond the lines of every run: examples, options, what it would take."""
        say = self.reporter.say
        for group in data.source.groups[:2]:
            say(f"\nrow {group.row}, trained tokens in ⟦ ⟧:\n{show(group, self.tokenizer)}")
        say("\n" + self._options())
        missing = against.missing()
        if against.reference is not None and not against.live:
            say(f"reference: {missing or 'no'} responses are still to be scored")
        say(policy.make_trainable())
        tokens, speed = self._token_budget(policy, against.preview(policy), data.groups)
        # Forward alone is a third of a training step's work.
        ahead = int(policy.scorer.layout.costs(against.groups).sum()) / (3 * speed) if missing else 0.0
        peak, state = peak_memory(self.device), budget.state_bytes(policy.masters)
        whole = duration(ahead + self._seconds(policy, data, tokens, speed))
        ahead_too = f", with the reference {whole}" if against.reference is not None and not against.live else ""
        say(self._plan(policy, data, tokens, speed) + ahead_too)
        say(f"memory: {size(peak)} in the trial, and {size(state)} for the optimiser to come")
        say("dry run: nothing was trained, and no output written")

    # -- training ----------------------------------------------------------------------------------------------

    def _loop(
        self,
        policy: Policy,
        objective: PreferenceObjective,
        data: TrainingData,
        check: CheckReport | None,
        movement: Movement | None,
    ) -> Loop:
        config = self.config
        steps = self._steps(data)
        tokens, speed = self._token_budget(policy, objective, data.groups)
        self.reporter.say(self._plan(policy, data, tokens, speed))
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
            sampler=self._sampler(data),
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
            measure=self._measure(policy.scorer),
            inspect_first=lambda *found: self._tell(inspect_first(objective, check, *found)),
            callbacks=self.callbacks,
            movement=movement,
        )
        torch.manual_seed(config.seed + 1)
        if config.resume:
            path = loop.resume()
            none = "no checkpoint that is whole" if loop.checkpoints.exists() else "no checkpoint yet"
            self.reporter.say(f"resumed: {path}" if path else f"{none}: starting at the first step")
        return loop

    def _sampler(self, data: TrainingData) -> Sampler:
        return data.sampler(self.config.batch_size, seed=self.config.seed, shuffle=self.config.shuffle)

    def _steps(self, data: TrainingData) -> int:
        steps = max(1, math.ceil(self.config.epochs * self._sampler(data).steps_per_epoch))
        return min(steps, self.config.max_steps or steps)

    def _seconds(self, policy: Policy, data: TrainingData, tokens: int, speed: float) -> float:
        sampler = self._sampler(data)
        epoch = np.asarray(data.train)[sampler.order(0)]
        per_step = int(policy.scorer.layout.costs(data.groups)[epoch].sum()) / sampler.steps_per_epoch
        # A forward pass more, a third of a step's work, where a loss sees the whole batch and it is cut.
        twice = any(term.loss.whole_batch for term in self.terms) and per_step > tokens
        return self._steps(data) * per_step / speed * (4 / 3 if twice else 1)

    def _plan(self, policy: Policy, data: TrainingData, tokens: int, speed: float) -> str:
        return (
            f"{self._steps(data)} steps of {self.config.batch_size} {data.noun}, {tokens} tokens at once: about"
            f" {duration(self._seconds(policy, data, tokens, speed))}"
        )

    def _token_budget(
        self, policy: Policy, objective: PreferenceObjective, groups: Sequence[Group]
    ) -> tuple[int, float]:
        """The budget of ``--token-budget``, of the run's first start, or an estimate; tried either way."""
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

    def _measure(self, scorer: Scorer) -> Any:
        peak, flops = matmul_peak(self.device, self.dtype), FlopCount.of(scorer.model)

        def measure(batches: Sequence[PackedBatch], seconds: float) -> Record:
            tokens, pairs = sum(b.tokens for b in batches), sum(len(b.groups) for b in batches)
            return {
                "step_seconds": seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "pairs_per_second": pairs / seconds,
                "utilisation": sum(map(flops, batches)) / seconds / peak,
                "peak_memory_bytes": peak_memory(self.device),
            }

        return measure

    def _tell(self, line: str | None) -> None:
        if line is not None:
            self.reporter.say(line)

    # -- after training ----------------------------------------------------------------------------------------

    def _finish(self, loop: Loop, data: TrainingData) -> DpoResult:
        progress = loop.progress
        last = self._last_metrics()
        if progress.best_step is not None and progress.best_step != progress.step:
            loop.masters.load(load_best(loop.checkpoints, progress.best_step))
            self.reporter.say(f"the weights of step {progress.best_step} are saved: the best on held-out {data.noun}")
        held_out_loss = progress.best_loss if progress.best_step is not None else None
        folder = self.folder.path
        if said := repair_generation(causal_model(loop.scorer.model)):
            self.reporter.say(f"the model as it was given cannot be saved: {said}")
        save_model(folder, loop.scorer, loop.masters, self.tokenizer)
        results: dict[str, Any] = {
            "steps": progress.step,
            "held-out loss": held_out_loss,
            "best step": progress.best_step,
            **{f"last step: {name}": last[name] for name in sorted(last) if name.partition("/")[0] in _CARD},
            "training time": duration(progress.seconds),
            "peak memory": size(peak_memory(self.device)),
        }
        files = ", ".join(f"`{Path(d).name}`" for d in self.config.data)
        pairs = (
            f"{len(data.train)} preference {data.noun}" if data.noun == "pairs" else f"{len(data.train)} {data.noun}"
        )
        pairs += f", {len(data.held_out)} held out" if data.held_out else ""
        write_card(
            folder,
            model=self.config.model,
            title=_TITLES.get(self.config.loss, f"Preference optimisation ({words(self.terms)})"),
            tag=self.terms[0].loss.name.rpartition(":")[2],
            data=f"{pairs}, from {files}. {data.source.summary()[0]}.",
            settings={n: v for n, v in self.config.to_dict().items() if n not in FREE},
            results=results,
            license="The licences of the base model and of the data apply.",
        )
        if not self.config.save_every:
            shutil.rmtree(loop.checkpoints)  # they were there for what might have happened until now
        self.folder.remember(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), results=results)
        for line in in_words(diagnose(read_history(folder))):
            self.reporter.say(line)
        self.reporter.say(f"done in {duration(progress.seconds)}: {folder}")
        return DpoResult(folder, progress.step, last, held_out_loss, progress.best_step)

    def _last_metrics(self) -> dict[str, float]:
        lines = (self.folder.path / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "loss" in record]
        return steps[-1]  # type: ignore[no-any-return]


_TITLES = {"dpo": "Direct Preference Optimization"}
_CARD = {"loss", "rewards", "logps", "lengths"}
