"""The gradient of one global batch, cut into micro-batches that fit into memory.

Where every row's loss is its own, each micro-batch is scored and differentiated in turn. Where a loss must see the
whole batch (it sorts, or averages over it) there are two passes: one without gradients over all micro-batches gives
the values of the batch; the loss is differentiated with respect to those; then each micro-batch is scored again and
the derivatives are handed on into the model. The chain rule makes that exact. One micro-batch needs one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel
from prefopt.train.batch import Batch, MicroBatch, State, Sums, micro_batches
from prefopt.train.columns import Values
from prefopt.train.objective import DIFFERENTIATED, Normaliser, Objective


class ReferenceInMemory(Protocol):
    """Reference values that are computed anew for each micro-batch, without gradients."""

    def values(self, scorer: PackedModel, micro: MicroBatch) -> Values:
        """Values to add to the policy's; they take the place of columns."""
        ...

    def distributions(self, packed: PackedBatch) -> Distributions | None:
        """Next-token distributions to compare the policy's with, where the objective does."""
        ...


@dataclass(slots=True)
class Gradients:
    """A global batch whose gradients are on the weights: its sums, packed parts, values and the state it leaves."""

    sums: Sums
    packed: list[PackedBatch]
    values: Values
    state: State


@dataclass(frozen=True, slots=True)
class Differentiator:
    """Computes gradients and evaluations of an objective with a scorer; ``reference`` is one in memory."""

    scorer: PackedModel
    objective: Objective
    reference: ReferenceInMemory | None = None

    def gradients(self, batch: Batch, token_budget: int, *, scale: float = 1.0) -> Gradients:
        """Add the gradients of ``scale`` times the loss of a global batch to the weights'."""
        normaliser = self.objective.normaliser(batch)
        micro = micro_batches(self.scorer, batch, token_budget)
        if self.objective.whole_batch:
            cut = list(micro)
            if len(cut) > 1:
                return self._two_passes(batch, cut, normaliser, scale)
            micro = iter(cut)
        return self._one_pass(micro, normaliser, scale)

    @torch.no_grad()
    def evaluate(self, batch: Batch, token_budget: int) -> Sums:
        """The sums of a batch without gradients.

        Of a loss of single rows each part is forgotten once its sums are known, so that rows may be many.
        """
        sums, normaliser = Sums(), self.objective.normaliser(batch)
        micro = micro_batches(self.scorer, batch, token_budget)
        if self.objective.whole_batch:
            sums.add(self.objective(batch, self.values(micro), normaliser))
            return sums
        for part in micro:
            sums.add(self.objective(part.batch, self._scored(part), normaliser))
        return sums

    @torch.no_grad()
    def values(self, micro: Iterable[MicroBatch]) -> Values:
        """The values of a batch that is scored in parts, as if in one."""
        return joined([self._scored(part) for part in micro])

    def _one_pass(self, micro: Iterable[MicroBatch], normaliser: Normaliser, scale: float) -> Gradients:
        sums, packed, found, state = Sums(), [], [], self.objective.state
        for part in micro:
            values = self._scored(part)
            result = self.objective(part.batch, values, normaliser)
            (result.total if scale == 1 else scale * result.total).backward()
            sums.add(result)
            state = result.state
            packed.append(part.packed)
            found.append({name: value.detach() for name, value in values.items()})
        return Gradients(sums, packed, joined(found), state)

    def _two_passes(self, batch: Batch, cut: Sequence[MicroBatch], normaliser: Normaliser, scale: float) -> Gradients:
        with same_randomness(next(self.scorer.model.parameters()).device):
            values = self.values(cut)
        leaves = [name for name in DIFFERENTIATED if name in values]
        for name in leaves:
            values[name].requires_grad_()
        result = self.objective(batch, values, normaliser)
        wanted = torch.autograd.grad(scale * result.total, [values[name] for name in leaves], allow_unused=True)
        slopes = {name: slope for name, slope in zip(leaves, wanted, strict=True) if slope is not None}
        done = dict.fromkeys(slopes, 0)
        for part in cut:
            again = self._policy(part)
            pieces = []
            for name, slope in slopes.items():
                size = len(again[name])
                pieces.append(slope[done[name] : done[name] + size])
                done[name] += size
            torch.autograd.backward([again[name] for name in slopes], pieces)
        sums = Sums()
        sums.add(result)
        return Gradients(sums, [p.packed for p in cut], {n: v.detach() for n, v in values.items()}, result.state)

    def _scored(self, part: MicroBatch) -> Values:
        """The values of one part, with gradients where they are switched on."""
        known: Values = {}
        if self.reference is not None:
            training = self.scorer.training
            with torch.no_grad():
                self.scorer.train(False)
                known = self.reference.values(self.scorer, part)
                self.scorer.train(training)
        return {**known, **self._policy(part)}

    def _policy(self, part: MicroBatch) -> Values:
        compared = None
        if self.reference is not None and self.objective.compares:
            compared = self.reference.distributions(part.packed)
        return self.objective.score(self.scorer, part.packed, part.batch, compared)


def joined(parts: Sequence[Values]) -> Values:
    """Values of parts, end to end."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Inside this context random numbers are drawn that will be drawn again behind it: the same dropout, twice."""
    cuda = device.type == "cuda"
    state, states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(states)
