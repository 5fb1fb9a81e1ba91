"""The gradient of one global batch, in micro-batches that fit into memory.

Where the loss is a sum over rows, each micro-batch is scored and differentiated in turn. A loss of the whole batch (it
sorts, or averages over it) takes two passes: the first scores all micro-batches without gradients, and the loss is
differentiated with respect to these values; the second scores each micro-batch again and passes the derivatives on into
the model. By the chain rule this is exact. A single micro-batch takes one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefopt.core.phases import phase
from prefopt.data.table import GroupTable, IndexArray
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.scorer import PackedModel, response_sums
from prefopt.parallel.arrays import gather_tensors
from prefopt.parallel.balance import balanced
from prefopt.parallel.world import ALONE, World
from prefopt.reference.in_memory import InMemoryReference
from prefopt.train.batch import Batch, MicroBatch, State, Sums, micro_batches
from prefopt.train.columns import Values
from prefopt.train.objective import DIFFERENTIATED, Normaliser, Objective

_MICRO = "micro-batches"
"""The name under which their number travels with values."""


class InMemoryColumns:
    """Values scored without gradients for each micro-batch; they replace columns. These are log-probabilities under a
    reference in memory, unless whole distributions are compared, and those of mismatched responses.

    ``tokens``: log-probabilities of tokens are needed, not only sums by response.
    """

    def __init__(self, live: InMemoryReference | None, *, compares: bool, tokens: bool) -> None:
        self.live, self._compares, self._tokens = live, compares, tokens

    def values(self, scorer: PackedModel, micro: MicroBatch) -> Values:
        """``ref_logp_N`` (and ``_M``), ``mismatched_logp_N``, ``mismatched_ref_logp_N``: those that are needed."""
        found: Values = {}
        if self.live is not None and not self._compares:
            logp_M = self.live.logprobs(micro.packed)
            found["ref_logp_N"] = response_sums(logp_M, micro.packed)
            if self._tokens:
                found["ref_logp_M"] = logp_M
        if micro.batch.mismatched is not None:
            other = pack(micro.batch.mismatched.groups, scorer.layout).to(micro.packed.target.device)
            found["mismatched_logp_N"] = response_sums(scorer(other), other)
            if self.live is not None:
                found["mismatched_ref_logp_N"] = response_sums(self.live.logprobs(other), other)
        return found

    def distributions(self, packed: PackedBatch) -> Distributions | None:
        """The reference's next-token distributions."""
        return None if self.live is None else self.live.distributions(packed)


@dataclass(slots=True)
class Gradients:
    """What is known of a global batch after its gradients are on the weights. ``state``: that of the losses."""

    sums: Sums
    packed: list[PackedBatch]
    values: Values
    state: State


@dataclass(frozen=True, slots=True)
class Differentiator:
    """Computes gradients and evaluations of an objective with a scorer.

    Every rank of ``world`` calls it with the same global batch, and computes the groups that are dealt to it by tokens.
    The normaliser is that of the global batch; a loss of the whole batch sees the values of all ranks. What comes back
    is of this rank alone: sums and gradients are still to be added up. ``lockstep``: passes through the model
    communicate (shards), so that every rank makes equally many; those that count for nothing use the smallest group.
    """

    scorer: PackedModel
    objective: Objective
    reference: InMemoryColumns | None = None
    world: World = ALONE
    lockstep: bool = False

    def gradients(self, batch: Batch, token_budget: int, *, scale: float = 1.0) -> Gradients:
        """Add the gradients of ``scale`` times the loss of a global batch to those of the weights."""
        normaliser = self.objective.normaliser(batch)
        dealt = self._deal(batch)
        micro = self._micro_batches(batch, dealt, token_budget)
        if not self.objective.whole_batch:
            return self._one_pass(micro, normaliser, scale)
        if self.world.alone and len(parts := list(micro)) == 1:
            return self._one_pass(parts, normaliser, scale)
        return self._two_passes(batch, dealt, parts if self.world.alone else micro, normaliser, scale)

    @phase("evaluation")
    @torch.no_grad()
    def evaluate(self, batch: Batch, token_budget: int) -> Sums:
        """The sums of a batch, without gradients. Unless the loss is of the whole batch, values are not kept.

        What fails on one rank is raised on all, but in lockstep: there the others wait in the pass that failed.
        """
        sums, normaliser = Sums(), self.objective.normaliser(batch)
        dealt, together = self._deal(batch), ALONE.together if self.lockstep else self.world.together
        micro = self._micro_batches(batch, dealt, token_budget)
        if self.objective.whole_batch:
            values, _ = self._of_all(batch, dealt, together(lambda: self.values(micro)))
            if self.world.first:
                sums.add(self.objective(batch, values, normaliser))
            return sums

        def add_all() -> None:
            for part in micro:
                values = self._scored(part)
                if part.counts:
                    sums.add(self.objective(part.batch, values, normaliser))

        together(add_all)
        return sums

    @torch.no_grad()
    def values(self, micro: Iterable[MicroBatch]) -> Values:
        """The values of this rank's part of a batch, from all its micro-batches."""
        scored = ((part, self._scored(part)) for part in micro)
        return joined([values for part, values in scored if part.counts])

    def values_of_all(self, batch: Batch, values: Values) -> Values:
        """The ``values`` of all ranks, each its part of ``batch``, in the order of the batch."""
        found, _ = self._of_all(batch, self._deal(batch), values)
        return found

    def _deal(self, batch: Batch) -> list[IndexArray]:
        """The groups of each rank, as positions in the global batch."""
        if self.world.alone:
            return [np.arange(len(batch))]
        costs = self.scorer.layout.costs(GroupTable.of(batch.groups))
        return balanced(costs, self.world.size)

    def _micro_batches(self, batch: Batch, dealt: Sequence[IndexArray], token_budget: int) -> Iterator[MicroBatch]:
        """This rank's groups, cut; in lockstep as many micro-batches as the rank with the most has."""
        mine = dealt[self.world.rank]
        some = batch if self.world.alone else batch.select(mine.tolist())
        micro = micro_batches(self.scorer, some, token_budget)
        if not self.lockstep:
            return micro
        parts = list(micro)
        smallest = batch.select([int(np.argmin(self.scorer.layout.costs(GroupTable.of(batch.groups))))])
        idle = next(micro_batches(self.scorer, smallest, token_budget))._replace(counts=False)
        return iter(parts + [idle] * (self.world.largest(len(parts)) - len(parts)))

    def _one_pass(self, micro: Iterable[MicroBatch], normaliser: Normaliser, scale: float) -> Gradients:
        sums, packed, found, state = Sums(), [], [], self.objective.state
        for part in self._reduced_last(micro):
            values = self._scored(part)
            if not part.counts:
                _backward_nothing(values)
                continue
            result = self.objective(part.batch, values, normaliser)
            (result.total if scale == 1 else scale * result.total).backward()
            sums.add(result)
            state = result.state
            packed.append(part.packed)
            found.append({name: value.detach() for name, value in values.items()})
        return Gradients(sums, packed, joined(found), state)

    def _two_passes(
        self,
        batch: Batch,
        dealt: Sequence[IndexArray],
        micro: Iterable[MicroBatch],
        normaliser: Normaliser,
        scale: float,
    ) -> Gradients:
        def scored() -> tuple[list[MicroBatch], Values]:
            cut = list(micro)
            return cut, self.values(cut)

        with same_randomness(next(self.scorer.model.parameters()).device):
            # What fails on one rank fails on all, so that all repeat it; in lockstep all end.
            cut, mine = scored() if self.lockstep else self.world.together(scored)
        # After this nothing is sent before the update's sums are.
        values, counts = self._of_all(batch, dealt, mine, sum(part.counts for part in cut))
        leaves = [name for name in DIFFERENTIATED if name in values]
        for name in leaves:
            values[name].requires_grad_()
        result = self.objective(batch, values, normaliser)
        wanted = torch.autograd.grad(scale * result.total, [values[name] for name in leaves], allow_unused=True)
        slopes = {name: slope for name, slope in zip(leaves, wanted, strict=True) if slope is not None}
        slopes = self._of_mine(batch, dealt, slopes, counts)
        done = dict.fromkeys(slopes, 0)
        for part in self._reduced_last(cut):
            again = self._policy(part)
            if not part.counts:
                _backward_nothing(again)
                continue
            pieces = []
            for name, slope in slopes.items():
                size = len(again[name])
                pieces.append(slope[done[name] : done[name] + size])
                done[name] += size
            torch.autograd.backward([again[name] for name in slopes], pieces)
        sums = Sums()
        if self.world.first:  # every rank has computed the same
            sums.add(result)
        packed = [part.packed for part in cut if part.counts]
        return Gradients(sums, packed, {n: v.detach() for n, v in values.items()}, result.state)

    def _reduced_last(self, micro: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches; between replicas of shards, gradients are summed after the last of them alone."""
        if not self.lockstep:
            yield from micro
            return
        parts = list(micro)
        models: list[Any] = [self.scorer, *self.objective.other_models]
        for i, part in enumerate(parts):
            for model in models:
                model.set_requires_all_reduce(i == len(parts) - 1)
            yield part

    def _of_all(
        self, batch: Batch, dealt: Sequence[IndexArray], mine: Values, micro: int = 0
    ) -> tuple[Values, list[int]]:
        """The values of all ranks in the order of the global batch, as if one had scored it, and each rank's ``micro``,
        the number of its micro-batches."""
        if self.world.alone:
            return mine, [micro]
        device = next(self.scorer.model.parameters()).device
        every = gather_tensors(self.world, {**mine, _MICRO: torch.tensor(micro)})
        counts = [int(values.pop(_MICRO)) for values in every]
        order = np.concatenate(dealt)
        found: Values = {}
        for name in next(values for values in every if values):
            whole = torch.cat([values[name] for values in every if values])
            if (axis := axis_of(name)) != "B":
                whole[torch.from_numpy(batch.places(axis, order))] = whole.clone()
            found[name] = whole.to(device)
        return found, counts

    def _of_mine(self, batch: Batch, dealt: Sequence[IndexArray], values: Values, counts: Sequence[int]) -> Values:
        """The parts of values of the global batch that belong to this rank's groups, or to its micro-batches, of which
        every rank has ``counts``."""
        if self.world.alone:
            return values
        device = next(self.scorer.model.parameters()).device
        before, micro = sum(counts[: self.world.rank]), counts[self.world.rank]
        found: Values = {}
        for name, value in values.items():
            if (axis := axis_of(name)) == "B":
                found[name] = value[before : before + micro]
            else:
                at = batch.places(axis, dealt[self.world.rank])
                found[name] = value[torch.from_numpy(at).to(device)]
        return found

    def _scored(self, part: MicroBatch) -> Values:
        """The values of one micro-batch: of the policy, and without gradients those of :class:`InMemoryColumns`."""
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


def axis_of(name: str) -> str:
    """The first axis of values of this name: ``N`` of ``logp_N``, ``B`` (micro-batches) of ``router_prob_BE``."""
    return name.rpartition("_")[2][0]


def _backward_nothing(values: Values) -> None:
    """A backward pass whose gradients are zero."""
    sum(value.sum() * 0 for value in values.values() if value.requires_grad).backward()  # type: ignore[union-attr]


def joined(parts: Sequence[Values]) -> Values:
    """Values of micro-batches, concatenated."""
    if not parts:
        return {}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Restore the random states on leaving: what follows draws the same numbers again, such as dropout."""
    cuda = device.type == "cuda"
    state, states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(states)
