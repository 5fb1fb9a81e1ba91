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

import torch

from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.scorer import PackedModel, response_sums
from prefopt.reference.in_memory import InMemoryReference
from prefopt.train.batch import Batch, MicroBatch, State, Sums, micro_batches
from prefopt.train.columns import Values
from prefopt.train.objective import DIFFERENTIATED, Normaliser, Objective


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
    """Computes gradients and evaluations of an objective with a scorer."""

    scorer: PackedModel
    objective: Objective
    reference: InMemoryColumns | None = None

    def gradients(self, batch: Batch, token_budget: int, *, scale: float = 1.0) -> Gradients:
        """Add the gradients of ``scale`` times the loss of a global batch to those of the weights."""
        normaliser = self.objective.normaliser(batch)
        micro = micro_batches(self.scorer, batch, token_budget)
        if not self.objective.whole_batch:
            return self._one_pass(micro, normaliser, scale)
        parts = list(micro)
        return (
            self._one_pass(parts, normaliser, scale)
            if len(parts) == 1
            else self._two_passes(batch, parts, normaliser, scale)
        )

    @torch.no_grad()
    def evaluate(self, batch: Batch, token_budget: int) -> Sums:
        """The sums of a batch, without gradients. Unless the loss is of the whole batch, values are not kept."""
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
        """The values of a batch, from all its micro-batches."""
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


def joined(parts: Sequence[Values]) -> Values:
    """Values of micro-batches, concatenated."""
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
