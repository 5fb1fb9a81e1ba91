"""The gradient of one global batch, cut into micro-batches that fit into memory.

Where every row's loss is its own, each micro-batch is scored and differentiated in turn. Where a loss must see the
whole batch (it sorts, or averages over it) there are two passes: one without gradients over all micro-batches gives
the values of the batch; the loss is differentiated with respect to those; then each micro-batch is scored again and
the derivatives are handed on into the model. The chain rule makes that exact. One micro-batch needs one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from prefopt.model.packed_model import PackedModel
from prefopt.model.packing import PackedBatch
from prefopt.train.inputs import Values
from prefopt.train.objective import DIFFERENTIATED, Normaliser, Objective
from prefopt.train.results import State, Sums

MicroBatch = tuple[list[int], PackedBatch]


@dataclass(slots=True)
class Gradients:
    """A global batch whose gradients are on the weights: its sums, packed batches, values and the state it leaves."""

    sums: Sums
    batches: list[PackedBatch]
    values: Values
    state: State


def differentiate(
    scorer: PackedModel, objective: Objective, indices: Sequence[int], micro_batches: Callable[[], Iterable[MicroBatch]]
) -> Gradients:
    """Add the gradients of the loss over ``indices`` to the weights'. ``micro_batches`` cuts them, in their order."""
    normaliser = objective.normaliser(indices)
    if objective.whole_batch:
        cut = list(micro_batches())
        if len(cut) > 1:
            return _two_passes(scorer, objective, indices, cut, normaliser)
        return _one_pass(scorer, objective, cut, normaliser)
    return _one_pass(scorer, objective, micro_batches(), normaliser)


@torch.no_grad()
def values_of(scorer: PackedModel, objective: Objective, micro_batches: Iterable[MicroBatch]) -> Values:
    """The values of a batch that is scored in parts, as if in one, without gradients."""
    return joined([scored(scorer, objective, part, batch) for part, batch in micro_batches])


@torch.no_grad()
def evaluated(
    scorer: PackedModel, objective: Objective, indices: Sequence[int], micro_batches: Iterable[MicroBatch]
) -> Sums:
    """The loss and metrics over ``indices``, which ``micro_batches`` cut in their order, without gradients.

    Of a loss of single rows each part is forgotten once its sums are known, so that rows may be many.
    """
    sums, normaliser = Sums(), objective.normaliser(indices)
    if objective.whole_batch:
        sums.add(objective(values_of(scorer, objective, micro_batches), indices, normaliser))
        return sums
    for part, batch in micro_batches:
        sums.add(objective(scored(scorer, objective, part, batch), part, normaliser))
    return sums


def joined(parts: Sequence[Values]) -> Values:
    """Values of parts, end to end."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _one_pass(
    scorer: PackedModel, objective: Objective, micro_batches: Iterable[MicroBatch], normaliser: Normaliser
) -> Gradients:
    sums, batches, found, state = Sums(), [], [], objective.state
    for part, batch in micro_batches:
        values = scored(scorer, objective, part, batch)
        outcome = objective(values, part, normaliser)
        outcome.total.backward()
        sums.add(outcome)
        state = outcome.state
        batches.append(batch)
        found.append({name: value.detach() for name, value in values.items()})
    return Gradients(sums, batches, joined(found), state)


def _two_passes(
    scorer: PackedModel, objective: Objective, indices: Sequence[int], cut: list[MicroBatch], normaliser: Normaliser
) -> Gradients:
    with same_randomness(next(scorer.model.parameters()).device):
        values = values_of(scorer, objective, cut)
    leaves = [name for name in DIFFERENTIATED if name in values]
    for name in leaves:
        values[name].requires_grad_()
    outcome = objective(values, indices, normaliser)
    wanted = torch.autograd.grad(outcome.total, [values[name] for name in leaves], allow_unused=True)
    slopes = {name: slope for name, slope in zip(leaves, wanted, strict=True) if slope is not None}
    done = dict.fromkeys(slopes, 0)
    for part, batch in cut:
        again = objective.policy(scorer, batch, part)
        pieces = []
        for name, slope in slopes.items():
            size = len(again[name])
            pieces.append(slope[done[name] : done[name] + size])
            done[name] += size
        torch.autograd.backward([again[name] for name in slopes], pieces)
    sums = Sums()
    sums.add(outcome)
    return Gradients(sums, [b for _, b in cut], {n: v.detach() for n, v in values.items()}, outcome.state)


def scored(scorer: PackedModel, objective: Objective, part: Sequence[int], batch: PackedBatch) -> Values:
    """The values of one part, with gradients where they are switched on."""
    training = scorer.training
    with torch.no_grad():
        scorer.train(False)
        fixed = objective.fixed(scorer, batch, part)
        scorer.train(training)
    return {**fixed, **objective.policy(scorer, batch, part)}


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
