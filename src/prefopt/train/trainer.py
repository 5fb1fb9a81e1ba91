"""The trainer: optimiser steps on batches, evaluations, checkpoints and reports, for every method.

Batches come from a :class:`BatchSource`: data read once, or responses sampled during training. A step is one batch of
data, or one round of sampled responses with several updates on them. A run that was stopped resumes from its checkpoint
to the same bits, also between two updates of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from prefopt.core.terminal import Reporter, StopRequest
from prefopt.errors import Diverged
from prefopt.model.costs import MEMORY_ERRORS, MemoryFailure, out_of_memory
from prefopt.model.scorer import PackedModel
from prefopt.parallel.gradients import grad_norm, sum_gradients
from prefopt.parallel.world import ALONE, World
from prefopt.reference.in_memory import TrDpoUpdate
from prefopt.runs.callbacks import Callbacks, RunInfo
from prefopt.runs.experts import ExpertUse, shares
from prefopt.runs.metrics import Averages, Metrics, Record, note
from prefopt.train import checkpoint, snapshot
from prefopt.train.batch import Batch
from prefopt.train.budget import Speed, fatal_in_shards, smaller_budget
from prefopt.train.columns import Values
from prefopt.train.held_out import HeldOutPrecision
from prefopt.train.objective import Objective
from prefopt.train.optim import Network
from prefopt.train.saver import Saver
from prefopt.train.source import AuxiliaryLoss, BatchSource
from prefopt.train.step import Differentiator, Gradients, InMemoryColumns


@dataclass(slots=True)
class TrainerState:
    """The progress of a run, part of every checkpoint. ``done`` counts updates of the step at hand; its ``records`` and
    ``times`` (seconds by phase) are kept until it is complete."""

    step: int = 0
    done: int = 0
    token_budget: int = 0
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_loss: float = math.inf
    without_gain: int = 0
    stopped_early: bool = False


Inspect = Callable[[int, int, Record, Batch, Values], bool]
"""Called with step, update, metrics, batch and values of an update before the weights move; may raise. Returns whether
it printed a line."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Trains ``networks`` (the policy first; with PPO actor and critic) on the batches of ``source``.

    ``eval_every`` and ``save_every`` count steps; None: each epoch, and :meth:`BatchSource.saves`.
    ``saver`` writes checkpoints and best weights. ``measure_costs`` returns what records the costs until now, once the
    checkpoint of this moment is there. ``movement``: the reference moves, so that losses at different steps are not
    comparable and no evaluation is the best. ``precision``: in which dtype the held-out batch is evaluated; None: in
    that of the run. ``experts`` counts the tokens of each, where the model has some.

    Every rank of ``world`` has a trainer and makes the same calls; files and lines are those of the first one (whose
    ``metrics`` and ``reporter`` alone write). ``lockstep``: see :class:`Differentiator`.
    """

    scorer: PackedModel
    networks: Mapping[str, Network]
    objective: Objective
    source: BatchSource
    steps: int
    max_grad_norm: float
    eval_every: int | None
    early_stopping: int | None
    save_every: int | None
    keep_last: int
    metrics: Metrics
    reporter: Reporter
    saver: Saver
    stop: StopRequest
    token_budget: int
    reference: InMemoryColumns | None = None
    speed: Speed | None = None
    inspect: Inspect | None = None
    movement: TrDpoUpdate | None = None
    precision: HeldOutPrecision | None = None
    experts: ExpertUse | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    measure_costs: Callable[[], Callable[[], None]] = lambda: lambda: None
    state: TrainerState = field(default_factory=TrainerState)
    averages: Averages = field(default_factory=Averages)
    world: World = ALONE
    lockstep: bool = False
    _stop_signal: int | None = None
    _saved: tuple[int, int, str] | None = None
    _held_out: Batch | None = None
    _said: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.scorer.model.parameters()).device

    @property
    def policy(self) -> Network:
        """The first network."""
        return next(iter(self.networks.values()))

    def fit(self) -> TrainerState:
        """Train to the end. After a stop: write a checkpoint and raise :class:`prefopt.errors.Interrupted`.

        Raises :class:`Diverged` where numbers are not finite, or where the source finds so.
        """
        state = self.state
        folder, options = self.metrics.path.parent, self.callbacks.options
        about = RunInfo(output=folder, options=options, model=self.scorer.model, steps=self.steps, step=state.step)
        self.train_mode()
        with (
            self.callbacks.around(about, self.keep),
            self.reporter.bar("train", self.steps, "steps") as bar,
            self.saver.around(),
        ):
            while state.step < self.steps and not state.stopped_early:
                record = self.make_step()
                self.metrics.write({"step": state.step, **record})
                bar.update(state.step, note(record), first=state.step == 1 and not self._said)
                evaluation = self.evaluate() if self._evaluation_due() else None
                self.callbacks.done(state.step, record, evaluation)
                if self.saver.due:
                    self.saver.settle()
                if not self.source.draws and self._save_due(state.step):
                    self.keep(due=True)
                if about.stopping:
                    state.stopped_early = True
                    if self._evaluates and evaluation is None:
                        self.callbacks.done(state.step, evaluation=self.evaluate())
                self.pause()
            self.keep()
        if self.experts is not None and self.world.first:
            self.experts.write(folder)
        return state

    def pause_together(self) -> None:
        """As :meth:`pause`, where several ranks have not agreed on stop requests since the last update."""
        self._stop_signal = self.world.largest(self.stop.signal or 0) or None
        self.pause()

    def train_mode(self, mode: bool = True) -> None:
        """Set all networks to training or evaluation mode."""
        self.scorer.train(mode)
        for network in self.networks.values():
            network.train(mode)

    def pause(self) -> None:
        """After a stop request: write a checkpoint and raise. Several ranks stop at the update that they agreed on."""
        # Read once: a signal that comes later than this is for the next pause, which then writes a checkpoint.
        asked = self.stop.signal if self.world.alone else self._stop_signal
        if asked is None:
            return
        self.stop.signal = asked
        self.keep()
        within = f", {self.state.done} of the updates of the next one made" if self.state.done else ""
        self.stop.check(f" after step {self.state.step} of {self.steps}{within}")

    def make_step(self) -> Record:
        """One step: all updates on what the source has for it. Returns its metrics."""
        state, source, started = self.state, self.source, time.monotonic()
        if source.begin(self) and self._save_due(state.step):
            self.keep(due=True)
        while state.done < source.updates:
            begun = time.monotonic()
            batch = source.batch(state.step, state.done)
            record, weights = self._update(batch)
            state.records.append(record)
            state.done += 1
            state.times["seconds/training"] = state.times.get("seconds/training", 0.0) + time.monotonic() - begun
            if state.done < source.updates:
                self.pause()
        if self.movement is not None:
            self.movement.after(state.step + 1, self.policy.weights.saved())
        names = dict.fromkeys(name for r in state.records for name in r)  # none where a round taught nothing
        record = {name: float(np.mean([r[name] for r in state.records if name in r])) for name in names}
        record["learning_rate"] = self.policy.schedule(state.step)
        record["epoch"] = (state.step + 1) / source.steps_per_epoch
        ends_epoch = (state.step + 1) % source.steps_per_epoch == 0
        if state.records:
            self.averages.add(state.step + 1, len(batch), record, weights, ends_epoch=ends_epoch)
        elif ends_epoch:
            self.averages.end_epoch()
        record = source.end(self, record)
        state.step, state.done, state.records, state.times = state.step + 1, 0, [], {}
        state.seconds += time.monotonic() - started
        return record

    def _save_due(self, step: int) -> bool:
        return step % self.save_every == 0 if self.save_every else self.source.saves(step)

    def _update(self, batch: Batch) -> tuple[Record, dict[str, float]]:
        """One update on a global batch, if it applies. Returns metrics, and their weights in an average over steps."""
        step, update = self.state.step, self.state.done
        started = time.monotonic()
        found, record, work = self._gradients(batch)
        norms = {"grad_norm" if n is self.policy else f"grad_norm/{name}": n for name, n in self.networks.items()}
        self._refuse_nonsense(step, record, [*norms])
        if self.inspect is not None:
            values = found.values
            if step == update == 0 and not self.objective.whole_batch:
                values = self._differentiator(self.objective).values_of_all(batch, values)
            self._said = self.inspect(step, update, record, batch, values)
        applies = self.source.applies(update, record)
        for name, network in norms.items():
            network.update(step, record[name], self.max_grad_norm) if applies else network.weights.zero_grad()
        self.objective.state = found.state
        record = self.objective.derived(record)
        weights = {"loss": float(len(batch)), **found.sums.weights}
        if self.experts is not None and found.sums.table is not None:
            record |= (parts := shares(found.sums.table))
            weights |= dict.fromkeys(parts, float(len(batch)))
            if (line := self.experts.add(step + 1, found.sums.table)) is not None:
                self.reporter.say(line)
        if self.speed is not None:
            seconds = time.monotonic() - started
            record |= self.speed.record(work or self.speed.work(found.packed), seconds)
        return record, weights

    def _gradients(self, batch: Batch) -> tuple[Gradients, Record, dict[str, float]]:
        """Add the gradients of a global batch to the weights. Returns them with the metrics, loss and norms of all
        ranks, and the work done.

        On out-of-memory, on any rank, this is repeated with half the token budget.
        """
        auxiliary = self.source.auxiliary(self.state.step, self.state.done)
        while True:
            found = second = error = None
            try:
                self.train_mode()
                found = self._differentiator(self.objective).gradients(batch, self.token_budget)
                if auxiliary is not None:
                    second = self._differentiator(auxiliary.objective, None).gradients(
                        auxiliary.batch, self.token_budget, scale=auxiliary.coefficient
                    )
            except MEMORY_ERRORS as caught:
                error = caught
                if not out_of_memory(error):
                    raise
                if self.lockstep:
                    raise fatal_in_shards(f"step {self.state.step + 1}", self.token_budget) from error
            totals = self._exchange(found, second, error)
            if found is not None and not totals.get("failed"):
                return found, *self._record(found, auxiliary, second, totals)
            for network in self.networks.values():
                network.weights.zero_grad()
            largest = max(self.scorer.layout.cost(group) for group in batch.groups)
            self.halve(error or torch.OutOfMemoryError("out of memory"), f"step {self.state.step + 1}", largest)

    def _differentiator(self, objective: Objective, reference: InMemoryColumns | str | None = "own") -> Differentiator:
        known = self.reference if reference == "own" else None
        return Differentiator(self.scorer, objective, known, self.world, self.lockstep)

    def _exchange(
        self, found: Gradients | None, second: Gradients | None, error: MemoryFailure | None
    ) -> dict[str, float]:
        """The numbers of an update that all ranks add up, in one message: sums, work, failures and stop requests."""
        if self.world.alone:
            return {"failed": float(error is not None)}
        mine: dict[str, float] = {"failed": float(error is not None), "written": float(self.saver.written)}
        if found is not None and error is None:
            mine |= found.sums.numbers()
            mine |= {f"work/{n}": x for n, x in self.speed.work(found.packed).items()} if self.speed else {}
            mine |= {f"auxiliary/{n}": x for n, x in second.sums.numbers().items()} if second is not None else {}
        if self.stop.signal is not None:
            mine[f"signal/{self.stop.signal}"] = 1.0
        totals = self.world.totals(mine)
        signals = [int(n.removeprefix("signal/")) for n, count in totals.items() if n.startswith("signal/") and count]
        self._stop_signal = max(signals, default=None)
        self.saver.agreed = totals["written"] == self.world.size
        return totals

    def _record(
        self, found: Gradients, auxiliary: AuxiliaryLoss | None, second: Gradients | None, totals: dict[str, float]
    ) -> tuple[Record, dict[str, float]]:
        """Metrics, loss and gradient norms of an update, and its work; gradients become those of all ranks."""
        networks = {"grad_norm" if n is self.policy else f"grad_norm/{name}": n for name, n in self.networks.items()}
        for network in networks.values():
            network.weights.settle()
            sum_gradients(self.world, network.weights.masters.values())
        norms = {name: grad_norm(n.weights.masters.values()).to(self.device) for name, n in networks.items()}
        if self.world.alone:
            record = found.sums.means(norms)
            work = {}  # counted when the clock has stopped
            value = second.sums.means()["loss"] if second is not None else 0.0
        else:
            record = found.sums.of_ranks(totals) | dict(
                zip(norms, torch.stack([*norms.values()]).tolist(), strict=True)
            )
            work = {n.removeprefix("work/"): x for n, x in totals.items() if n.startswith("work/")}
            value = totals.get("auxiliary/share/loss", 0.0)
        if auxiliary is not None:
            record["loss"] += auxiliary.coefficient * value
            record[auxiliary.name] = value
        return record, work

    def halve(self, error: MemoryFailure, what: str, largest: int = 1) -> None:
        """Halve the token budget after ``error``, to repeat ``what``. Raises as :func:`smaller_budget`."""
        self.token_budget = smaller_budget(error, self.token_budget, what, largest, self.device)
        self.reporter.say(f"out of memory: {what} is repeated with {self.token_budget} tokens at once")

    def _refuse_nonsense(self, step: int, record: Record, norms: Sequence[str]) -> None:
        for name in ("loss", *norms):
            if not math.isfinite(record[name]):
                raise Diverged(
                    f"step {step + 1}: {name} is {record[name]}",
                    "lower --learning-rate, or try --dtype float32. Checkpoints written before are kept",
                )

    @property
    def _evaluates(self) -> bool:
        if self._held_out is None:
            self._held_out = self.source.held_out
        return self._held_out is not None

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.eval_every or self.source.steps_per_epoch
        return self._evaluates and (step % every == 0 or step == self.steps)

    def evaluate(self) -> Record:
        """Metrics on the held-out batch. The weights are saved if its loss is the lowest so far."""
        state = self.state
        assert self._evaluates and self._held_out is not None
        self.train_mode(False)
        differentiator = self._differentiator(self.objective)
        evaluate = differentiator.evaluate if self.precision is None else partial(self.precision.sums, differentiator)
        sums = evaluate(self._held_out, self.token_budget)
        record = sums.means() if self.world.alone else sums.of_ranks(self.world.totals(sums.numbers()))
        record = self.objective.derived(record) | (shares(sums.table) if sums.table is not None else {})
        self.train_mode()
        self.metrics.write({"step": state.step, **{f"eval_{name}": value for name, value in record.items()}})
        better = self.movement is None and record["loss"] < state.best_loss
        best = " (best so far)" if better else ""
        self.reporter.say(f"step {state.step}: held out: {', '.join(note(record))}{best}")
        if better:
            state.best_step, state.best_loss, state.without_gain = state.step, record["loss"], 0
            self.saver.save_best(state.step, self.policy.weights.saved())
        elif self.movement is None:
            state.without_gain += 1
            patience = self.early_stopping or math.inf
            if state.without_gain >= patience:
                state.stopped_early = True
                self.reporter.say(f"stopping early: no lower loss in {patience} evaluations since {state.best_step}")
        return record

    def keep(self, *, due: bool = False) -> None:
        """Write a checkpoint, unless one of this state exists, and wait until it is there. One that is ``due`` is
        written while training goes on, if it does; callbacks are called when it is there."""
        state, now = self.state, snapshot.point_of(self)
        wait = not due or state.step == self.steps or state.stopped_early
        if self._saved != now:
            assert not state.done or state.done < self.source.updates, "a step that is over cannot be resumed"
            state.token_budget = self.token_budget
            step, note_costs = state.step, self.measure_costs()

            def there(path: Path) -> None:
                note_costs()
                if self.save_every or self.stop.signal is not None:
                    self.reporter.say(f"checkpoint: {path}")
                if due:
                    self.callbacks.saved(step, path)

            self.saver.save(snapshot.take(self), keep_last=self.keep_last, wait=wait, then=there)
            self._saved = now
        elif due:  # a callback asked for it
            self.callbacks.saved(state.step, checkpoint.path_of(self.saver.folder, *now[:2]))
        if wait:
            self.saver.settle()

    def resume(self) -> None:
        """Load the newest undamaged checkpoint, if there is one."""
        found = checkpoint.newest(self.saver.folder, self.world)
        if found is None:
            self.metrics.forget_after(-1)
            none = "that is whole" if self.saver.folder.exists() else "yet"
            self.reporter.say(f"no checkpoint {none}: starting at the first step")
            return
        path, saved = found
        if (line := snapshot.restore(self, saved)) is not None:
            self.reporter.say(line)
        self._saved = snapshot.point_of(self)
        self.metrics.forget_after(self.state.step)
        self.reporter.say(f"resumed: {path}")
