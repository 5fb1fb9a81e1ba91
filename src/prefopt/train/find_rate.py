"""``--find-learning-rate``: short branches from the same weights, one a rate, compared by their held-out loss."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from prefopt.core.phases import phase
from prefopt.core.terminal import Reporter
from prefopt.errors import ConfigError, Diverged
from prefopt.runs.callbacks import Callbacks
from prefopt.runs.metrics import Metrics, Record
from prefopt.train.data import DataBatches
from prefopt.train.objective import Objective
from prefopt.train.offline import OfflineRun, Plan
from prefopt.train.optim import Network
from prefopt.train.rate import set_rate
from prefopt.train.routing import routed
from prefopt.train.saver import Saver
from prefopt.train.step import InMemoryColumns
from prefopt.train.trainer import Trainer

APART = 3.0
"""Times that neighbouring rates differ by."""
BRANCHES, MOST_BRANCHES = 5, 9
"""Rates that are tried around the one suggested; more where the best of them is the first or the last."""
SHARE, FEWEST = 0.1, 20
"""A branch takes this fraction of the run's steps, and at least so many if the run has them."""
TRIED, FOUND = "learning_rates_tried", "learning_rate_found"
"""Keys of ``run.json``: the held-out loss of each branch, by its rate, and the best rate once all are made."""
FOLDER = "branches"


@dataclass(slots=True)
class Branches:
    """Branches of one run. ``losses``: held-out losses by rate, infinite for a branch that diverged; of ``before``
    training."""

    offline: OfflineRun
    objective: Objective
    source: DataBatches
    reference: InMemoryColumns | None
    tokens: int
    steps: int
    losses: dict[float, float]
    before: float = math.nan

    def run_at(self, rate: float) -> float:
        """The held-out loss after a branch at ``rate``."""
        trainer = self._trainer(rate)
        try:
            while trainer.state.step < self.steps:
                trainer.metrics.write({"step": trainer.state.step + 1, **trainer.make_step()})
                self._stop()
            return _finite(trainer.evaluate())
        except Diverged:
            return math.inf

    def before_training(self) -> float:
        """The held-out loss of the weights at the start."""
        return _finite(self._trainer(0.0).evaluate())

    def _trainer(self, rate: float) -> Trainer:
        run, offline = self.offline.run, self.offline
        folder = run.folder.path / FOLDER
        network = Network.of(offline.policy.masters, run.config, self.steps, rate)
        trainer = Trainer(
            scorer=offline.policy.scorer,
            networks={"policy": network},
            objective=self.objective,
            source=self.source,
            steps=self.steps,
            max_grad_norm=run.config.max_grad_norm,
            eval_every=None,
            early_stopping=None,
            save_every=None,
            keep_last=1,
            metrics=Metrics(folder / f"rate-{rate:g}.jsonl", writes=run.world.first),
            reporter=Reporter("none"),
            saver=Saver(folder, run.world),
            stop=run.stop,
            token_budget=self.tokens,
            reference=self.reference,
            callbacks=Callbacks(),
            world=run.world,
            lockstep=offline.policy.sharded,
        )
        trainer.state.best_loss = -math.inf  # no evaluation of a branch writes weights
        torch.manual_seed(run.config.seed + 1)
        return trainer

    def _stop(self) -> None:
        run = self.offline.run
        if asked := run.world.largest(run.stop.signal or 0):
            run.stop.signal = asked
            run.stop.check(" while learning rates were tried")


@phase("learning rates")
def find_rate(offline: OfflineRun, objective: Objective, source: DataBatches, plan: Plan) -> bool:
    """Try rates, print a table, and set the run's to the best one. Returns whether to go on with training.

    A resumed run takes the rate that was found, and goes on with the branches that it has not finished. Raises
    :class:`ConfigError` for weights in shards.
    """
    run, policy = offline.run, offline.policy
    if policy.sharded:
        raise ConfigError("--find-learning-rate needs whole weights in every process: give --shard none")
    tried = {float(rate): _read(loss) for rate, loss in run.folder.record.get(TRIED, {}).items()}
    if FOUND not in run.folder.record:
        _try(offline, objective, source, plan, tried)
    found = min(sorted(tried), key=tried.__getitem__)
    if math.isinf(tried[found]):
        raise ConfigError(
            f"--find-learning-rate: training diverged at every rate from {found:g} to {max(tried):g}; start a new run"
            " elsewhere with a --learning-rate far below, or try --dtype float32"
        )
    set_rate(run, found)
    run.folder.remember(**{FOUND: found})
    if run.config.find_learning_rate == "stop":
        run.say(f"stopped, as --find-learning-rate stop asks: --resume without it trains at {found:g}")
        return False
    run.say(f"training at {found:g}, the rate with the lowest held-out loss")
    return True


def _try(offline: OfflineRun, objective: Objective, source: DataBatches, plan: Plan, tried: dict[float, float]) -> None:
    """Make the branches that ``tried`` lacks, print their table, and restore weights and losses' state."""
    run, masters = offline.run, offline.policy.masters
    start = {name: value.to("cpu", copy=True) for name, value in masters.saved()}
    objective = routed(objective, offline.policy.scorer, run.config)
    state = copy.deepcopy(objective.state)
    reference = plan.in_memory(offline.policy)
    tokens, _ = offline.token_budget(objective, source, reference)
    steps = min(offline.steps, max(FEWEST, round(SHARE * offline.steps)))
    branches = Branches(offline, objective, source, reference, tokens, steps, tried)
    branches.before = branches.before_training()
    middle = run.config.learning_rate
    rates = [float(f"{middle * APART**k:.2g}") for k in range(-(BRANCHES // 2), BRANCHES // 2 + 1)]
    while missing := [rate for rate in rates if rate not in tried]:
        rate = missing[0]
        tried[rate] = branches.run_at(rate)
        masters.zero_grad()
        masters.load({name: value.to(dict(masters.saved())[name].device) for name, value in start.items()})
        objective.state = copy.deepcopy(state)
        run.folder.remember(**{TRIED: {f"{r:g}": None if math.isinf(x) else x for r, x in tried.items()}})
        run.say(f"learning rate {rate:g}: held-out loss {tried[rate]:.4f} after {steps} steps")
        best = min(rates, key=lambda r: tried.get(r, math.inf))
        if len(missing) == 1 and len(rates) < MOST_BRANCHES and best in (rates[0], rates[-1]):
            further = float(f"{best * (APART if best == rates[-1] else 1 / APART):.2g}")
            rates = sorted([*rates, further])
    for line in table(tried, branches.before, steps):
        run.say(line)


def table(losses: dict[float, float], before: float, steps: int) -> list[str]:
    """The branches, lowest rate first; the best one is marked."""
    best = min(sorted(losses), key=losses.__getitem__)
    lines = [f"learning rates, {steps} steps each from the same weights, held-out loss ({before:.4f} before training):"]
    for rate in sorted(losses):
        loss = "diverged" if math.isinf(losses[rate]) else f"{losses[rate]:.4f}"
        lines.append(f"  {rate:<8g} {loss}{'  best' if rate == best else ''}")
    if losses[best] >= before:
        lines.append("  none of them lowers the held-out loss: more steps, or other data, may")
    return lines


def _finite(record: Record) -> float:
    return record["loss"] if math.isfinite(record["loss"]) else math.inf


def _read(loss: float | None) -> float:
    return math.inf if loss is None else loss
