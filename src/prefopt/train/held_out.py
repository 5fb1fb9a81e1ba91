"""Held-out losses in float32 where the rounding of the run's dtype would hide what was learned.

A loss on log-ratios reads small differences of large numbers. Early in a run, or at a low learning rate, the log-ratios
of a response in bfloat16 are mostly rounding, and held-out losses and accuracies are noise. The policy's masters are
float32, so that an evaluation can be, too; the reference's values of the held-out rows are then cached in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from prefopt.errors import ConfigError
from prefopt.model.costs import out_of_memory
from prefopt.model.precision import in_float32
from prefopt.parallel.world import ALONE, World
from prefopt.train.batch import Batch, Sums, micro_batches
from prefopt.train.policy import Trained
from prefopt.train.step import Differentiator

Choice = Literal["run", "float32"]
NEGLIGIBLE = 0.1
"""Rounding of a tenth of the spread of log-ratios turns the sign of about 3 % of margins: atan(0.1) / pi."""
SAMPLE = 64
"""Held-out groups that the rounding is measured on, once in a run."""


class Rounding(NamedTuple):
    """Of held-out responses' log-ratios, in nats: the root mean square ``error`` of the run's dtype, and the ``spread``
    (standard deviation) of the float32 ones."""

    error: float
    spread: float

    @property
    def matters(self) -> bool:
        return self.error > NEGLIGIBLE * self.spread


@dataclass
class HeldOutPrecision:
    """Evaluates a held-out batch in float32, or in the run's dtype, by ``choice``; None: the first evaluation measures
    which, and later ones follow it, so that their losses are comparable. ``batch`` has the reference's float32 values.
    ``decided`` is told of the choice, with a line for the log.
    """

    policy: Trained[Any]
    batch: Batch
    choice: Choice | None
    decided: Callable[[Choice, str], None]
    world: World = field(default=ALONE)

    def sums(self, differentiator: Differentiator, narrow: Batch, token_budget: int) -> Sums:
        """The sums of an evaluation; ``narrow`` is the batch with the reference's values in the run's dtype. Raises
        :class:`ConfigError` where float32 was asked for and there is no memory for it."""
        if self.choice is None:
            self._decide(differentiator, narrow, token_budget)
        if self.choice == "run":
            return differentiator.evaluate(narrow, token_budget)
        try:
            with in_float32(self.policy.masters):
                return differentiator.evaluate(self.batch, token_budget)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            remedy = "give --eval-dtype run, or a lower --token-budget"
            raise ConfigError(f"held-out losses in float32 do not fit into memory: {remedy}") from error

    def _decide(self, differentiator: Differentiator, narrow: Batch, token_budget: int) -> None:
        name = str(self.policy.dtype).removeprefix("torch.")
        try:
            world = self.world
            found = world.from_first(world.together(lambda: self.measure(differentiator, narrow, token_budget)))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.choice, why = "run", "float32 does not fit into memory"
        else:
            self.choice = "float32" if found.matters else "run"
            why = f"{name} rounds log-ratios by {found.error:.2g} nats, and they spread by {found.spread:.2g}"
        used = name if self.choice == "run" else "float32"
        self.decided(self.choice, f"held out: evaluated in {used}: {why}")

    def measure(self, differentiator: Differentiator, narrow: Batch, token_budget: int) -> Rounding:
        """The rounding of log-ratios on some held-out groups of all lengths. Where groups have several responses,
        log-ratios are taken relative to their mean, as losses on pairs read them."""
        alone = Differentiator(differentiator.scorer, differentiator.objective, differentiator.reference)
        chosen = np.unique(np.linspace(0, len(narrow) - 1, SAMPLE).round().astype(int)).tolist()
        before = _log_ratios(alone, narrow.select(chosen), token_budget)
        with in_float32(self.policy.masters):
            after = _log_ratios(alone, self.batch.select(chosen), token_budget)
        return Rounding(float(np.sqrt(np.mean((before - after) ** 2))), float(after.std()))


def _log_ratios(differentiator: Differentiator, batch: Batch, token_budget: int) -> np.ndarray:
    """Log-ratios [N] to the reference."""
    values = differentiator.values(micro_batches(differentiator.scorer, batch, token_budget))
    found: np.ndarray = values["logp_N"].double().cpu().numpy() - batch.columns["ref_logp_N"]
    count = batch.responses_G[batch.group_N]
    mean = (np.bincount(batch.group_N, found) / batch.responses_G)[batch.group_N]
    return np.where(count > 1, found - mean, found)
