"""A reference in memory that is scored with every batch: for losses on whole distributions, or if it moves (TR-DPO)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from prefopt.model.costs import count_held
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer, ScoreRequest
from prefopt.parallel.tensors import is_sharded, local_of, sharded_as


class SwappedWeights:
    """A second set of values for a model's trainable weights, which are swapped in to score with them.

    They begin as the current weights. Frozen weights are shared: with a LoRA adapter this costs little, with full
    fine-tuning it is a second copy of the model. Values that move are kept in float32, as the masters are.
    """

    def __init__(self, masters: MasterWeights, *, moves: bool = False) -> None:
        own = dict(masters.model.named_parameters())
        self._masters = masters
        self._parameters = {name: own[name] for name in masters.masters}
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}
        size = sum(v.numel() for v in self._values.values())
        if 2 * size > sum(p.numel() for p in own.values()):  # not of an adapter
            count_held(self, sum(v.numel() * v.element_size() for v in self._values.values()))
        wide = {n: m.detach() for n, m in masters.masters.items()} if moves else {}
        self._wide = {n: m.clone() for n, m in wide.items() if m.dtype != self._values[n].dtype}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In this block the model has these weights. Nothing may be differentiated through it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self._masters.reshard()
        for name, parameter in self._parameters.items():
            if is_sharded(parameter):  # layers are gathered from this memory, and not from what the name stands for
                here, there = local_of(parameter.detach()), local_of(self._values[name])
                kept = here.clone()
                here.copy_(there)
                there.copy_(kept)
            else:
                parameter.data, self._values[name] = self._values[name], parameter.data

    @torch.no_grad()
    def mix(self, weights: Mapping[str, torch.Tensor], amount: float) -> None:
        """Set the values to ``amount`` of ``weights`` (the masters) plus 1 - ``amount`` of themselves."""
        for name, value in self._values.items():
            wide = self._wide.get(name, value)
            wide.copy_(weights[name]) if amount == 1 else wide.lerp_(weights[name].to(wide.device), amount)
            if name in self._wide:
                value.copy_(wide)

    @property
    def held(self) -> list[torch.Tensor]:
        """All that is in memory: the values, and wide ones of those that move."""
        return [*self._values.values(), *self._wide.values()]

    def saved(self) -> dict[str, torch.Tensor]:
        """The values by parameter name, for checkpoints."""
        return self._values | self._wide

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set the values to whole tensors, which every rank has."""
        self.mix({name: sharded_as(values[name], value) for name, value in self._values.items()}, 1.0)


@dataclass(frozen=True, slots=True)
class TrDpoUpdate:
    """A reference that follows the policy: every ``every`` steps it moves by ``amount`` (1: a copy) to the policy.
    Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656), equations 2 (soft) and 3 (hard)."""

    weights: SwappedWeights
    every: int
    amount: float

    def after(self, steps: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Move to the policy's ``weights`` where an update is due after ``steps``."""
        if steps % self.every == 0:
            self.weights.mix(dict(weights), self.amount)


class InMemoryReference:
    """A reference that is scored with every batch: the policy's model with other weights, or another model."""

    def __init__(self, scorer: Scorer, weights: SwappedWeights | None = None, *, vocabulary: int | None = None) -> None:
        """``scorer`` is the policy's where ``weights`` are given, else the reference's own. ``vocabulary``: the tokens
        that the policy has; distributions are over these alone."""
        self.scorer, self.weights, self.vocabulary = scorer, weights, vocabulary

    @property
    def bytes_held(self) -> int:
        """Bytes of weights on this process that are the reference's alone."""
        held = self.weights.held if self.weights is not None else [*self.scorer.model.parameters()]
        return sum(local_of(x).numel() * x.element_size() for x in held)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probability [M] of every scored token."""
        with self._as_reference(batch) as packed:
            return cast(torch.Tensor, self.scorer(packed))

    @torch.no_grad()
    def distributions(self, batch: PackedBatch) -> Distributions:
        """Next-token distributions at every scored token."""
        with self._as_reference(batch) as packed:
            found = cast(Distributions, self.scorer(packed, ScoreRequest(distributions=True)).distributions)
        tokens = self.vocabulary
        if tokens is None or tokens == found.vocabulary:
            return found
        return Distributions(tokens, lambda rows: found.logits(rows)[:, :tokens])

    @contextmanager
    def _as_reference(self, batch: PackedBatch) -> Iterator[PackedBatch]:
        """In this block the scorer is the reference; the batch in the reference's own layout."""
        training = self.scorer.training
        self.scorer.eval()
        try:
            if self.weights is None:
                yield pack(batch.groups, self.scorer.layout).to(batch.target.device)
            else:
                with self.weights.applied():
                    yield batch
        finally:
            self.scorer.train(training)
