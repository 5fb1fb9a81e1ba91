"""Held-out losses in float32 where the rounding of the run's dtype would hide what was learned.

A loss on log-ratios reads small differences of large numbers. Early in a run, or at a low learning rate, the log-ratios
of a response in bfloat16 are mostly rounding, and held-out losses and accuracies are noise. The policy's masters are
float32, so that an evaluation can be, too; the reference's values of the held-out rows are then cached in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from prefopt.core.phases import phase
from prefopt.data.table import GroupTable
from prefopt.errors import RunError
from prefopt.model.costs import MEMORY_ERRORS, free_memory, halved, out_of_memory
from prefopt.model.precision import MasterWeights, bytes_in_float32, in_float32
from prefopt.parallel.world import ALONE, World
from prefopt.train.batch import Batch, Sums, micro_batches
from prefopt.train.policy import Trained
from prefopt.train.step import Differentiator

Choice = Literal["run", "float32"]
NEGLIGIBLE = 0.1
"""Rounding of a tenth of the spread of log-ratios turns the sign of about 3 % of margins: atan(0.1) / pi."""
SAMPLE = 64
"""Held-out groups that the rounding is measured on, once in a run."""


NO_ROOM = "float32 does not fit into memory"
TOO_LARGE = "held-out losses in float32 do not fit into memory; give --eval-dtype run, or shorter rows (--max-length)"


def no_room(error: BaseException) -> bool:
    """Whether memory ran out, also where it is reported as an error of the run after the last smaller batch."""
    cause = error.__cause__ if isinstance(error, RunError) else error
    return cause is not None and out_of_memory(cause)


@contextmanager
def widened(weights: MasterWeights, world: World = ALONE) -> Iterator[None]:
    """:func:`in_float32` on every rank of ``world``. Raises :class:`torch.OutOfMemoryError` on all of them, before
    anything is allocated, where the copies do not fit on one."""
    device = next(weights.model.parameters()).device
    if world.largest(bytes_in_float32(weights) - free_memory(device)) > 0:
        raise torch.OutOfMemoryError("float32 copies of the weights: out of memory")
    with ExitStack() as block:
        world.together(lambda: block.enter_context(in_float32(weights)))
        yield


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
    ``decided`` gets the choice, and a line for the log.
    """

    policy: Trained[Any]
    batch: Batch
    choice: Choice | None
    decided: Callable[[Choice, str], None]
    world: World = field(default=ALONE)
    _most_tokens: int | None = field(default=None, init=False)
    """At once in float32, after a larger number did not fit."""

    @phase("evaluation")
    def sums(self, differentiator: Differentiator, narrow: Batch, token_budget: int) -> Sums:
        """The sums of an evaluation; ``narrow`` is the batch with the reference's values in the run's dtype.

        Where the first evaluation was to decide and finds no memory for float32, this and all later ones are in the
        run's dtype; elsewhere that is a :class:`RunError`, since losses in two dtypes are not comparable.
        """
        decides = self.choice is None
        if self.choice is None:
            self._decide(differentiator, narrow, token_budget)
        if self.choice == "float32":
            try:
                return self._in_float32(differentiator, token_budget)
            except RunError as error:
                if not (decides and no_room(error)):
                    raise
            self._choose("run", NO_ROOM)
        return differentiator.evaluate(narrow, token_budget)

    def _in_float32(self, differentiator: Differentiator, token_budget: int) -> Sums:
        """The sums in float32: numbers of twice the size, so of half as many tokens at once, and fewer where those do
        not fit."""
        tokens = min(max(1, token_budget // 2), self._most_tokens or token_budget)
        scorer = differentiator.scorer
        while True:
            try:
                with widened(self.policy.masters, self.world):
                    return differentiator.evaluate(self.batch, tokens)
            except MEMORY_ERRORS as error:
                largest = int(scorer.layout.costs(GroupTable.of(self.batch.groups)).max())
                device = next(scorer.model.parameters()).device
                tokens = self._most_tokens = halved(error, tokens, largest, TOO_LARGE, device)

    def _choose(self, choice: Choice, why: str) -> None:
        self.choice = choice
        used = "float32" if choice == "float32" else str(self.policy.dtype).removeprefix("torch.")
        self.decided(choice, f"held out: evaluated in {used}: {why}")

    def _decide(self, differentiator: Differentiator, narrow: Batch, token_budget: int) -> None:
        name = str(self.policy.dtype).removeprefix("torch.")
        try:
            world = self.world
            found = world.from_first(world.together(lambda: self.measure(differentiator, narrow, token_budget)))
        except MEMORY_ERRORS as error:
            if not out_of_memory(error):
                raise
            self._choose("run", NO_ROOM)
            return
        why = f"{name} rounds log-ratios by {found.error:.2g} nats, and they spread by {found.spread:.2g}"
        self._choose("float32" if found.matters else "run", why)

    def measure(self, differentiator: Differentiator, narrow: Batch, token_budget: int) -> Rounding:
        """The rounding of log-ratios on some held-out groups of all lengths. Where groups have several responses,
        log-ratios are taken relative to their mean, as losses on pairs read them."""
        alone = Differentiator(differentiator.scorer, differentiator.objective, differentiator.reference)
        chosen = np.unique(np.linspace(0, len(narrow) - 1, SAMPLE).round().astype(int)).tolist()
        before = _log_ratios(alone, narrow.select(chosen), token_budget)
        with widened(self.policy.masters):
            after = _log_ratios(alone, self.batch.select(chosen), max(1, token_budget // 2))
        return Rounding(float(np.sqrt(np.mean((before - after) ** 2))), float(after.std()))


def _log_ratios(differentiator: Differentiator, batch: Batch, token_budget: int) -> np.ndarray:
    """Log-ratios [N] to the reference."""
    values = differentiator.values(micro_batches(differentiator.scorer, batch, token_budget))
    found: np.ndarray = values["logp_N"].double().cpu().numpy() - batch.columns["ref_logp_N"]
    count = batch.responses_G[batch.group_N]
    mean = (np.bincount(batch.group_N, found) / batch.responses_G)[batch.group_N]
    return np.where(count > 1, found - mean, found)
