"""Direct Preference Optimization, from a configuration to a finished model."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.document import write_document
from prefopt.config.dpo import DpoConfig
from prefopt.data.formats import parse_comparisons
from prefopt.data.group import Group
from prefopt.data.load import GroupSet, build_groups, load_groups
from prefopt.data.packer import PackedBatch
from prefopt.data.sampler import Sampler
from prefopt.data.show import show
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.losses.preference import LossOutput, dpo
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.flops import FlopCount, matmul_peak
from prefopt.model.load import (
    load_config,
    load_model,
    local_folder,
    native_bfloat16,
    new_lora,
    resolve_device,
    resolve_dtype,
    silence_dropout,
    vocabulary_size,
)
from prefopt.model.precision import MasterWeights
from prefopt.model.reference import ReferenceCache, ReferenceValues
from prefopt.model.scorer import Scorer, causal_model
from prefopt.model.sharing import context_length
from prefopt.train import budget
from prefopt.train.card import save_model, write_card
from prefopt.train.folder import RunFolder, fingerprint
from prefopt.train.log import Metrics, Reporter, duration, size
from prefopt.train.loop import Loop, LoopOptions, Record, load_best
from prefopt.train.optim import Schedule, adamw
from prefopt.train.reference import ReferenceRun, check_vocabulary, choose_reference, identify
from prefopt.train.stop import StopRequest

DEFAULT_LENGTH = 1024
SCORING_AHEAD = 4
"""The reference is scored in batches this much larger than training's: no activations are kept for backward."""


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
) -> DpoResult | None:
    """Run DPO. ``model``, ``tokenizer`` and ``rows`` stand in for what ``config`` names (a model is trained in place).

    Returns none for a dry run. Raises :class:`prefopt.errors.UserError`, and
    :class:`prefopt.errors.Interrupted` after a stop, with everything kept.
    """
    with StopRequest() as stop:
        return _Run(config, Reporter(config.progress), stop, model, tokenizer, rows).run()


class PairObjective:
    """The DPO loss on packed pairs: response 2g is group g's chosen one, 2g + 1 its rejected one."""

    def __init__(self, reference: ReferenceValues, *, beta: float, label_smoothing: float) -> None:
        self.reference_G2 = torch.from_numpy(reference.sums_N.reshape(-1, 2))
        self.beta, self.label_smoothing = beta, label_smoothing

    def weight(self, indices: Sequence[int]) -> float:
        """Every pair weighs 1."""
        return float(len(indices))

    def __call__(self, logp_N: torch.Tensor, batch: PackedBatch, indices: Sequence[int]) -> LossOutput:
        """See :class:`prefopt.train.loop.Objective`."""
        reference = self.reference_G2[list(indices)].to(logp_N.device, logp_N.dtype)
        policy = logp_N.view(-1, 2)
        out = dpo(*policy.unbind(1), *reference.unbind(1), beta=self.beta, label_smoothing=self.label_smoothing)
        length = batch.length.view(-1, 2).to(logp_N.dtype)
        ratio = (policy.detach() - reference) / length
        more = {}
        for side, name in enumerate(("chosen", "rejected")):
            more[f"log_ratios_per_token/{name}"] = ratio[:, side]
            more[f"lengths/{name}"] = length[:, side]
        return LossOutput(out.numerator_G, out.weight_G, {**out.metrics, **more})


class _Run:
    """One run, stage by stage."""

    def __init__(
        self, config: DpoConfig, reporter: Reporter, stop: StopRequest, model: Any, tokenizer: Any, rows: Any
    ) -> None:
        self.config, self.reporter, self.stop = config, reporter, stop
        self.given, self.rows = model, rows
        self._scorer: Scorer | None = None
        self.device = resolve_device(config.device) if model is None else next(model.parameters()).device
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.folder = RunFolder(Path(config.output), config.to_dict(), resume=config.resume, dry=config.dry_run)
        self.source = "" if model is not None else local_folder(config.model)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(self.source)
        self.limit = self._max_length(model.config if model is not None else load_config(self.source))

    def run(self) -> DpoResult | None:
        try:
            return self._stages()
        finally:
            if self._scorer is not None:  # a model given in Python goes back to its owner, whatever happened
                self._scorer.detach_hook()

    def _stages(self) -> DpoResult | None:
        self._prepare_machine()
        data, groups, train, held_out = self._data()
        choice = choose_reference(self.config)
        identity = identify(choice, self.given)
        scorer = self._load(groups)
        check = check_scoring(scorer, groups)
        self._say_scoring(scorer, check)
        reference = ReferenceRun(choice, identity, scorer, self.config)
        self.reporter.say(f"reference: {choice.words}, {identity.digest[:12]}")
        if self.config.dry_run:
            self._preview(data, groups, train, scorer, reference)
            return None
        self.folder.same("reference", identity.digest, "the reference model")
        self.folder.same("data", fingerprint(groups), "the data")
        self._start_folder()
        values, report = reference.values(groups, self._scoring_budget(scorer, groups), self.reporter, self.stop)
        if report.scored_responses:
            self.reporter.say(
                f"reference: {report.scored_responses} responses scored in {duration(report.seconds)},"
                f" {report.reused_responses} from the cache"
            )
        else:
            self.reporter.say(f"reference: all {report.reused_responses} responses from the cache")
        scorer, masters = self._trainable(scorer)
        objective = PairObjective(values, beta=self.config.beta, label_smoothing=self.config.label_smoothing)
        loop = self._loop(scorer, masters, objective, groups, train, held_out, check if choice.is_start else None)
        progress = loop.run()
        return self._finish(loop, data, len(train), len(held_out)) if progress.step else None

    # -- what is needed before training ------------------------------------------------------------------------

    def _prepare_machine(self) -> None:
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if self.dtype == torch.bfloat16 and not native_bfloat16(self.device):
            self.reporter.say(
                "bfloat16: this device emulates it, many times slower than float32; leave --dtype out to use float32"
            )
        if self.device.type == "mps" and self.dtype == torch.float64:
            raise ConfigError("--dtype float64: mps has none; take --device cpu")

    def _max_length(self, model_config: Any) -> int:
        context = context_length(model_config)
        if self.config.max_length is None:
            return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
        if context is not None and self.config.max_length > context:
            raise ConfigError(
                f"--max-length {self.config.max_length} is over the model's context of {context} tokens; give no more"
            )
        return self.config.max_length

    def _data(self) -> tuple[GroupSet, list[Group], list[int], list[int]]:
        config = self.config
        options: dict[str, Any] = {"max_length": self.limit, "on_bad_row": config.on_bad_row}
        if self.rows is not None:
            data = build_groups([parse_comparisons(self.rows, "data")], self.tokenizer, **options)
        else:
            data = load_groups(config.data, self.tokenizer, **options)
        for line in data.summary():
            self.reporter.say(f"data: {line}")
        groups = list(data.groups)
        train, held_out = list(range(len(groups))), list[int]()
        if config.eval_fraction:
            train, held_out = data.split(config.eval_fraction, config.seed)
        elif config.eval_data:
            more = load_groups(config.eval_data, self.tokenizer, **options)
            for line in more.summary():
                self.reporter.say(f"evaluation data: {line}")
            both = {c.prompt_key for c in data.comparisons} & {c.prompt_key for c in more.comparisons}
            if both:
                self.reporter.say(f"evaluation data: {len(both)} prompts stand in the training data too")
            held_out = list(range(len(groups), len(groups) + len(more.groups)))
            groups += more.groups
        if not train:
            raise DataError("no pair is left to train on; lower --eval-fraction")
        if held_out:
            self.reporter.say(f"data: {len(train)} pairs to train on, {len(held_out)} held out")
        if data.template and not self.tokenizer.chat_template:
            self.tokenizer.chat_template = data.template
        return data, groups, train, held_out

    def _load(self, groups: Sequence[Group]) -> Scorer:
        config = self.config
        model = self.given
        if model is None:
            # A full fine-tuning keeps float32 masters: they come from the file, not from rounded weights.
            dtype = self.dtype if config.lora else torch.promote_types(self.dtype, torch.float32)
            adapter = local_folder(config.adapter) if config.adapter else None
            model = load_model(self.source, dtype=dtype, device=self.device, adapter=adapter)
        else:
            silence_dropout(model)
        check_vocabulary(groups, vocabulary_size(causal_model(model)), config.model)
        self._new_lora = config.lora and config.adapter is None
        for parameter in model.parameters() if self._new_lora else ():
            parameter.requires_grad_(False)
        self._masters = MasterWeights(model, self.dtype)
        self._scorer = Scorer(model, attention=config.attention)
        return self._scorer

    def _say_scoring(self, scorer: Scorer, check: CheckReport) -> None:
        if scorer.reason and scorer.path == "separate":
            self.reporter.say(f"scoring: each response separately, since {scorer.reason}")
        twin = (
            "no small copy could be built"
            if check.clone_error is None
            else f"small copy exact to {check.clone_error:.0e}"
        )
        self.reporter.say(
            f"scoring: {scorer.path} ({scorer.kernel}, {str(self.dtype).removeprefix('torch.')}, {self.device});"
            f" {twin}; rounding {check.noise:.1g} nats per token"
        )

    def _start_folder(self) -> None:
        self.folder.remember(max_length=self.limit)
        path = self.folder.path / "config.yaml"
        path.write_text(write_document(DpoConfig, self.config.to_dict()))

    def _scoring_budget(self, scorer: Scorer, groups: Sequence[Group]) -> int:
        still = self.config.token_budget or budget.estimate(scorer, groups, checkpointing=False, still_to_come=0)
        return SCORING_AHEAD * still

    def _trainable(self, scorer: Scorer) -> tuple[Scorer, MasterWeights]:
        """Wrap the model for LoRA, and turn activation checkpointing on."""
        config = self.config
        torch.manual_seed(config.seed)
        model, masters = scorer.model, self._masters
        if self._new_lora:
            scorer.detach_hook()
            assert config.lora_rank and config.lora_alpha and config.lora_dropout is not None
            model = new_lora(
                model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
            )
            masters = MasterWeights(model, self.dtype)
            self._scorer = scorer = Scorer(model, attention=config.attention)
        if config.gradient_checkpointing:
            causal: Any = causal_model(model)
            # Older versions of transformers know only the second name, newer ones warn of it.
            enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        trained, total = sum(p.numel() for p in masters.masters.values()), sum(p.numel() for p in model.parameters())
        self.reporter.say(f"training {trained:,} of {total:,} weights{' (LoRA)' if config.lora else ''}")
        return scorer, masters

    def _preview(
        self, data: GroupSet, groups: Sequence[Group], train: Sequence[int], scorer: Scorer, reference: ReferenceRun
    ) -> None:
        """What a dry run shows beyond the lines of every run: examples, options, what it would take."""
        say = self.reporter.say
        for i in range(min(2, len(data.groups))):
            say(f"\nrow {data.comparisons[i].row}, trained tokens in ⟦ ⟧:\n{show(data.groups[i], self.tokenizer)}")
        say("\n" + write_document(DpoConfig, self.config.to_dict()))
        missing = ReferenceCache(reference.space()).missing(groups)
        say(f"reference: {missing} of {sum(len(g.continuations) for g in groups)} responses are not in the cache")
        scorer, masters = self._trainable(scorer)
        zeros = np.zeros(2 * len(groups))
        counts, starts = np.ones(len(zeros), np.int32), np.arange(0, len(zeros) + 1, 2)
        values = ReferenceValues(zeros, counts, starts, np.arange(len(zeros) + 1))
        objective = PairObjective(values, beta=self.config.beta, label_smoothing=self.config.label_smoothing)
        tokens, speed = self._token_budget(scorer, masters, objective, groups)
        steps = self._steps(len(train))
        # Forward alone is a third of a training step's work.
        ahead = sum(g.tokens for g in groups) / (3 * speed) if missing else 0.0
        state = budget.state_bytes(masters)
        say(
            f"{steps} steps of {self.config.batch_size} pairs, {tokens} tokens at once: about"
            f" {duration(ahead + self._seconds(groups, train, steps, speed))} on this machine"
        )
        say(
            f"memory: {size(budget.peak_memory(self.device))} in the trial, and {size(state)} for the optimiser to come"
        )
        say("dry run: nothing was trained or written")

    # -- training ----------------------------------------------------------------------------------------------

    def _loop(
        self,
        scorer: Scorer,
        masters: MasterWeights,
        objective: PairObjective,
        groups: Sequence[Group],
        train: Sequence[int],
        held_out: Sequence[int],
        check: CheckReport | None,
    ) -> Loop:
        config = self.config
        sampler = Sampler(len(train), config.batch_size, seed=config.seed, shuffle=config.shuffle)
        steps = self._steps(len(train))
        tokens, speed = self._token_budget(scorer, masters, objective, groups)
        assert config.learning_rate is not None
        schedule = Schedule(config.schedule, config.learning_rate, steps, round(config.warmup * steps))
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = adamw(masters.masters, betas=betas, epsilon=config.adam_epsilon, weight_decay=config.weight_decay)
        self.reporter.say(
            f"{steps} steps of {config.batch_size} pairs, {tokens} tokens at once; about"
            f" {duration(self._seconds(groups, train, steps, speed))}"
        )
        loop = Loop(
            scorer=scorer,
            masters=masters,
            optimizer=optimizer,
            schedule=schedule,
            objective=objective,
            groups=groups,
            train=train,
            held_out=held_out,
            sampler=sampler,
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
            measure=self._measure(scorer),
            inspect_first=lambda record: self._inspect_first(record, check),
        )
        torch.manual_seed(config.seed + 1)
        if config.resume:
            path = loop.resume()
            self.reporter.say(f"resumed: {path}" if path else "no checkpoint yet: starting at the first step")
        return loop

    def _steps(self, pairs: int) -> int:
        steps = max(1, math.ceil(self.config.epochs * math.ceil(pairs / self.config.batch_size)))
        return min(steps, self.config.max_steps or steps)

    def _seconds(self, groups: Sequence[Group], train: Sequence[int], steps: int, speed: float) -> float:
        tokens = sum(groups[i].tokens for i in train) / math.ceil(len(train) / self.config.batch_size)
        return steps * tokens / speed

    def _token_budget(
        self, scorer: Scorer, masters: MasterWeights, objective: PairObjective, groups: Sequence[Group]
    ) -> tuple[int, float]:
        """The budget of ``--token-budget``, of the run's first start, or an estimate; tried either way."""
        tokens = self.config.token_budget or self.folder.record.get("token_budget")
        if not tokens:
            tokens = budget.estimate(
                scorer,
                groups,
                checkpointing=self.config.gradient_checkpointing,
                still_to_come=budget.state_bytes(masters),
            )
        tokens, speed = budget.try_largest(scorer, masters, objective, groups, int(tokens))
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
                "peak_memory_bytes": budget.peak_memory(self.device),
            }

        return measure

    def _inspect_first(self, record: Record, check: CheckReport | None) -> None:
        """Preflight on the first step's numbers, before any weight has moved."""
        if check is None:
            if record["rewards/accuracies"] == 1.0 and self.config.batch_size >= 8:
                self.reporter.say(
                    "step 1: the policy already prefers every chosen response to the reference's mind (accuracy 1.0);"
                    " is --reference the model that training started from?"
                )
            return
        expected = math.log(2.0)
        tokens = max(record["lengths/chosen"], record["lengths/rejected"])
        allowed = self.config.beta * 2 * check.tolerance(tokens) + 1e-6
        if abs(record["loss"] - expected) > allowed:
            raise RunError(
                f"step 1: the loss is {record['loss']:.6f} where an untrained policy has ln 2 = {expected:.6f}"
                f" (rounding explains {allowed:.1g}): the reference's values are not this model's. Check them with"
                " prefopt cache verify, or remove them with prefopt cache clear"
            )
        self.reporter.say(
            f"step 1: loss {record['loss']:.6f}, ln 2 = {expected:.6f}, as it must be before any weight moves"
        )

    # -- after training ----------------------------------------------------------------------------------------

    def _finish(self, loop: Loop, data: GroupSet, train: int, held_out: int) -> DpoResult:
        progress = loop.progress
        last = self._last_metrics()
        if progress.best_step is not None and progress.best_step != progress.step:
            loop.masters.load(load_best(loop.checkpoints, progress.best_step))
            self.reporter.say(f"the weights of step {progress.best_step} are saved: the best on held-out pairs")
        held_out_loss = progress.best_loss if progress.best_step is not None else None
        folder = self.folder.path
        save_model(folder, loop.scorer, loop.masters, self.tokenizer)
        results: dict[str, Any] = {
            "steps": progress.step,
            "held-out loss": held_out_loss,
            "best step": progress.best_step,
            **{f"last step: {name}": last[name] for name in sorted(last) if name.partition("/")[0] in _CARD},
            "training time": duration(progress.seconds),
            "peak memory": size(budget.peak_memory(self.device)),
        }
        pairs = f"{train} preference pairs" + (f", {held_out} held out" if held_out else "")
        write_card(
            folder,
            model=self.config.model,
            title="Direct Preference Optimization",
            data=f"{pairs}, from {', '.join(f'`{Path(d).name}`' for d in self.config.data)}. {data.summary()[0]}.",
            settings=self.config.to_dict(),
            results=results,
            license="The licences of the base model and of the data apply.",
        )
        self.folder.remember(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), results=results)
        self.reporter.say(f"done in {duration(progress.seconds)}: {folder}")
        return DpoResult(folder, progress.step, last, held_out_loss, progress.best_step)

    def _last_metrics(self) -> dict[str, float]:
        lines = (self.folder.path / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "loss" in record]
        return steps[-1]  # type: ignore[no-any-return]


_CARD = {"loss", "rewards", "logps", "lengths"}
