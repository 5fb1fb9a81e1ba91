"""The training loop: global batches cut into micro-batches, one optimiser step each, checkpoints in between."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from prefopt.core.files import output_errors
from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter
from prefopt.data.group import Group
from prefopt.data.sampler import Sampler
from prefopt.data.table import GroupTable
from prefopt.errors import Diverged, RunError
from prefopt.model.memory import out_of_memory
from prefopt.model.packed_model import PackedModel
from prefopt.model.packing import PackedBatch, pack, split
from prefopt.model.precision import MasterWeights
from prefopt.reference.in_memory import Movement
from prefopt.runs.callbacks import Callbacks, RunInfo
from prefopt.runs.metrics import Averages, Metrics, Record, note
from prefopt.train import checkpoint
from prefopt.train.checkpoint import write_tensors
from prefopt.train.inputs import Values
from prefopt.train.objective import Objective
from prefopt.train.optim import Schedule, clip_, grad_norm
from prefopt.train.step import Gradients, differentiate, evaluated


def save_best(folder: Path, step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Keep the weights of the best evaluation beside the checkpoints, in a file that its step names."""
    path = _best(folder, step)
    aside = folder / ".best.safetensors"
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(aside, weights)
        aside.replace(path)


def forget_bests(folder: Path, step: int | None) -> None:
    """Remove the weights of earlier bests that neither the run nor a checkpoint still names."""
    named = {step}
    for state in folder.glob("step-*/state.json"):
        try:
            named.add(json.loads(state.read_text())["progress"]["best_step"])
        except Exception:
            return  # a damaged checkpoint: what it named is not known
    for path in folder.glob("best-*.safetensors"):
        if path not in {_best(folder, n) for n in named if n is not None}:
            path.unlink()


def load_best(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of evaluation ``step``. Raises :class:`RunError` where they are not there."""
    path = _best(folder, step)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: the best weights cannot be read ({error}); the last ones are in the checkpoint beside it"
        ) from error


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """How long and how often. ``eval_every`` and ``save_every`` count steps; none: never (but see the loop)."""

    steps: int
    max_grad_norm: float
    eval_every: int | None = None
    early_stopping: int | None = None
    save_every: int | None = None
    keep_last: int = 2


@dataclass(slots=True)
class Progress:
    """Where a run stands; goes into every checkpoint."""

    step: int = 0
    token_budget: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    without_gain: int = 0
    stopped_early: bool = False
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Loop:
    """One run over ``groups``, of which ``train`` and ``held_out`` are indices.

    ``checkpoints`` is a folder; ``inspect_first`` sees the first step's metrics, groups and values before any weight
    moves; ``after_save`` is called once a checkpoint is written. ``movement``: the reference moves; losses against
    different ones cannot be compared, so that no evaluation is the best.
    """

    scorer: PackedModel
    masters: MasterWeights
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    objective: Objective
    groups: Sequence[Group]
    train: Sequence[int]
    held_out: Sequence[int]
    sampler: Sampler
    options: LoopOptions
    metrics: Metrics
    reporter: Reporter
    checkpoints: Path
    stop: StopRequest
    token_budget: int
    measure: Callable[[Sequence[PackedBatch], float], Record]
    inspect_first: Callable[[Record, Sequence[int], Values], None] | None = None
    movement: Movement | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    after_save: Callable[[], None] = lambda: None
    progress: Progress = field(default_factory=Progress)
    averages: Averages = field(default_factory=Averages)
    _saved: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.scorer.model.parameters()).device

    def resume(self) -> Path | None:
        """Go back to the newest whole checkpoint; returns it, or none where there is none (then lines are dropped)."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            self.metrics.forget_after(-1)
            return None
        path, saved = found
        self.masters.load(saved.weights)
        checkpoint.restore_optimizer(self.optimizer, saved.optimizer)
        checkpoint.restore_random(saved.state["random"])
        if self.movement is not None and saved.reference is not None:
            self.movement.held.load(saved.reference)
        for name, kept in saved.state.get("losses", {}).items():
            now = self.objective.state[name]
            self.objective.state[name] = {k: now[k].new_tensor(value) for k, value in kept.items()}
        self.progress = Progress(**saved.state["progress"])
        self.averages = Averages.from_dict(saved.state.get("averages", {}))
        self.token_budget, self._saved = self.progress.token_budget, self.progress.step
        self.metrics.forget_after(self.progress.step)
        return path

    def run(self) -> Progress:
        """Train to the end, or to a stop: then :class:`prefopt.errors.Interrupted` follows on a checkpoint."""
        progress, options = self.progress, self.options
        self.scorer.train()
        about = RunInfo(
            output=self.metrics.path.parent,
            options=self.callbacks.options,
            model=self.scorer.model,
            steps=options.steps,
            step=progress.step,
        )
        with self.callbacks.around(about, self._keep), self.reporter.bar("train", options.steps, "steps") as bar:
            while progress.step < options.steps and not progress.stopped_early:
                started = time.monotonic()
                record = self._step(progress.step)
                progress.seconds += time.monotonic() - started
                progress.step += 1
                self.metrics.write({"step": progress.step, **record})
                bar.update(progress.step, note(record), first=progress.step == 1)
                evaluation = self._evaluate() if self._evaluation_due() else None
                saved = self._save() if options.save_every and progress.step % options.save_every == 0 else None
                self.callbacks.done(progress.step, record, evaluation, saved)
                if about.stopping:
                    progress.stopped_early = True
                    if self.held_out and evaluation is None:
                        self.callbacks.done(progress.step, evaluation=self._evaluate())
                if self.stop.signal is not None:
                    self._keep()
                self.stop.check(f" after step {progress.step} of {options.steps}")
            self._keep()
        return progress

    def _keep(self) -> None:
        """A checkpoint of where the run stands: what follows may fail, and nothing computed is lost."""
        if self._saved != self.progress.step:
            self._save()

    def _step(self, step: int) -> Record:
        while True:
            started = time.monotonic()
            try:
                record, found = self._gradients(step)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.masters.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                largest = max(self.scorer.layout.cost(self.groups[i]) for i in self._step_indices(step))
                if self.token_budget <= largest:
                    raise RunError(
                        f"step {step + 1}: one pair of {largest} tokens does not fit into the device's memory; give"
                        " --gradient-checkpointing, --lora or a smaller --max-length"
                    ) from error
                self.token_budget = max(largest, self.token_budget // 2)
                self.reporter.say(f"out of memory: the step is repeated with {self.token_budget} tokens at once")
                continue
            self._update(step, record, found)
            record |= self.objective.derived(record) | self.measure(found.batches, time.monotonic() - started)
            rows = len(self._step_indices(step))
            weights = {"loss": float(rows), **found.sums.weights}
            ends_epoch = (step + 1) % self.sampler.steps_per_epoch == 0
            self.averages.add(step + 1, rows, record, weights, ends_epoch=ends_epoch)
            return record

    def _gradients(self, step: int) -> tuple[Record, Gradients]:
        """Gradients of a global batch on the masters, and its metrics; weights stay as they are."""
        indices = self._step_indices(step)
        found = differentiate(self.scorer, self.objective, indices, lambda: self._micro_batches(indices))
        return found.sums.means(grad_norm(self.masters.masters.values())), found

    def _update(self, step: int, record: Record, found: Gradients) -> None:
        record["learning_rate"] = self.schedule(step)
        record["epoch"] = (step + 1) / self.sampler.steps_per_epoch
        self._refuse_nonsense(step, record)
        if step == 0 and self.inspect_first is not None:
            self.inspect_first(record, self._step_indices(step), found.values)
        clip_(self.masters.masters.values(), record["grad_norm"], self.options.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = record["learning_rate"]
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunError(
                f"step {step + 1}: the optimiser's state does not fit into the device's memory; give --lora, or a"
                " smaller --token-budget"
            ) from error
        self.masters.publish()
        self.masters.zero_grad()
        self.objective.state = found.state
        if self.movement is not None:
            self.movement.after(step + 1, self.masters)

    def _step_indices(self, step: int) -> list[int]:
        return [self.train[i] for i in self.sampler.batch(step)]

    def _micro_batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], PackedBatch]]:
        costs = [self.scorer.layout.cost(self.groups[i]) for i in indices]
        for part in split(indices, costs, self.token_budget):
            yield part, pack([self.groups[i] for i in part], self.scorer.layout).to(self.device)

    def _by_length(self, indices: Sequence[int]) -> list[int]:
        tokens = GroupTable.of(self.groups).tokens_G[np.asarray(indices)]
        return [indices[i] for i in np.argsort(tokens, kind="stable").tolist()]

    def _refuse_nonsense(self, step: int, record: Record) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record[name]):
                raise Diverged(
                    f"step {step + 1}: {name} is {record[name]}",
                    "lower --learning-rate, or try --dtype float32. Checkpoints written before are kept",
                )

    def _evaluation_due(self) -> bool:
        if not self.held_out:
            return False
        step, every = self.progress.step, self.options.eval_every or self.sampler.steps_per_epoch
        return step % every == 0 or step == self.options.steps

    @torch.no_grad()
    def _evaluate(self) -> Record:
        progress = self.progress
        self.scorer.eval()
        indices = self._by_length(self.held_out)
        record = evaluated(self.scorer, self.objective, indices, self._micro_batches(indices)).means()
        record |= self.objective.derived(record)
        self.scorer.train()
        self.metrics.write({"step": progress.step, **{f"eval_{name}": value for name, value in record.items()}})
        better = self.movement is None and record["loss"] < progress.best_loss
        self.reporter.say(
            f"step {progress.step}: held out: {', '.join(note(record))}{' (best so far)' if better else ''}"
        )
        if better:
            progress.best_step, progress.best_loss, progress.without_gain = progress.step, record["loss"], 0
            save_best(self.checkpoints, progress.step, dict(self.masters.saved()))
            forget_bests(self.checkpoints, progress.step)
        elif self.movement is None:
            progress.without_gain += 1
            patience = self.options.early_stopping
            progress.stopped_early = patience is not None and progress.without_gain >= patience
            if progress.stopped_early:
                self.reporter.say(f"stopping early: no lower loss in {patience} evaluations since {progress.best_step}")
        return record

    def _save(self) -> Path:
        self.progress.token_budget = self.token_budget
        state = {"step": self.progress.step, "progress": asdict(self.progress), "random": checkpoint.random_states()}
        state["losses"] = {name: {k: float(v) for k, v in kept.items()} for name, kept in self.objective.state.items()}
        state["averages"] = self.averages.to_dict()
        optimizer = checkpoint.optimizer_tensors(self.optimizer)
        weights = dict(self.masters.saved())
        reference = self.movement.held.saved() if self.movement is not None else None
        path = checkpoint.save(
            self.checkpoints, weights, optimizer, state, keep_last=self.options.keep_last, reference=reference
        )
        self._saved = self.progress.step
        self.after_save()
        forget_bests(self.checkpoints, self.progress.best_step)
        if self.options.save_every or self.stop.signal is not None:
            self.reporter.say(f"checkpoint: {path}")
        return path
