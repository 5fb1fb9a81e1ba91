"""Whole weights for as long as a rank makes passes that the others do not make: drawing tokens, scoring samples.

A pass through a model in shards communicates, so that all ranks must make it together. Here a scorer without weights of
its own gets those of all ranks, in the dtype of computation, when :meth:`prefopt.model.scorer.PackedModel.gathered` is
entered, which all ranks do together, and gives them up when it is left. Within, nothing is sent: ranks may make any
number of passes, and repeat them after out-of-memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from prefopt.core.terminal import size
from prefopt.errors import RunError
from prefopt.model.architectures import causal_model
from prefopt.model.checkpoint import origin_of
from prefopt.model.costs import count_as, out_of_memory
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import PackedModel
from prefopt.parallel.shard import ShardedWeights, shard
from prefopt.parallel.tensors import is_sharded, shard_of, whole_of
from prefopt.parallel.world import World

AnyModel = TypeVar("AnyModel", bound=PackedModel)


class Shards:
    """The ``weights`` of ``scorer``, by the names of its parameters: parts of them on each rank, or whole."""

    def __init__(self, scorer: PackedModel, weights: Mapping[str, torch.Tensor], world: World) -> None:
        self.weights, self.world = weights, world
        self._parameters = dict(scorer.named_parameters())
        assert weights.keys() == self._parameters.keys()
        scorer.shards = self

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """In this block the scorer has whole weights. All ranks enter and leave it together.

        Raises :class:`RunError` on all of them where the weights do not fit into memory on one.
        """
        try:
            self.world.together(self._allocate)  # before anything is sent: what fails here fails on all
            self._fill()
            yield
        finally:
            for parameter in self._parameters.values():
                parameter.data = parameter.data.new_empty(0)

    def _allocate(self) -> None:
        try:
            for name, parameter in self._parameters.items():
                if is_sharded(self.weights[name]):
                    parameter.data = parameter.data.new_empty(self.weights[name].shape)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            need = sum(w.numel() * self._parameters[name].element_size() for name, w in self.weights.items())
            raise RunError(
                f"out of memory: drawing and scoring responses needs the whole weights of one model ({size(need)}) on"
                " every process; give more memory, or --lora, whose training leaves more of it"
            ) from error

    @torch.no_grad()
    def _fill(self) -> None:
        for name, parameter in self._parameters.items():
            weight = self.weights[name].detach()
            if is_sharded(weight):  # one at a time: beside the whole weights only the largest is there twice
                parameter.copy_(whole_of(weight.to(parameter.dtype)))
            else:
                parameter.data = weight.to(parameter.dtype)


def without_weights(scorer: AnyModel) -> AnyModel:
    """A copy of a scorer and its model, in evaluation mode, whose parameters are empty. They have the dtypes that
    ``scorer`` computes in: those of before it is cut into shards."""
    known: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in scorer.parameters()
    }
    if (origin := origin_of(causal_model(scorer.model))) is not None:
        known[id(origin)] = origin  # of many small parts, which nothing changes
    if scorer.shards is not None:
        known[id(scorer.shards)] = None
    return copy.deepcopy(scorer, known).eval()


def shard_with_copy(
    scorer: AnyModel, weights: MasterWeights, world: World, dtype: torch.dtype, *, hybrid: bool
) -> tuple[ShardedWeights, AnyModel]:
    """Cut a model that trains into shards. Returns its weights, and a copy of the scorer that gathers them."""
    apart = without_weights(scorer)
    sharded = shard(scorer, weights, world, dtype, hybrid=hybrid)
    Shards(apart, dict(scorer.named_parameters()), world)
    count_as(causal_model(apart.model), causal_model(scorer.model))
    return sharded, apart


def shard_like(
    first: MasterWeights, scorer: AnyModel, weights: MasterWeights, world: World
) -> tuple[ShardedWeights, AnyModel]:
    """:func:`shard_with_copy` of a second model that trains, over the ranks that share the ``first``."""
    assert isinstance(first, ShardedWeights) and first.scorer.compute_dtype is not None
    return shard_with_copy(scorer, weights, world, first.scorer.compute_dtype, hybrid=first.mesh.ndim > 1)


def copy_as_it_is(apart: AnyModel, world: World) -> AnyModel:
    """A scorer of the weights that ``apart`` gathers now, whatever training makes of them; those that do not train are
    shared."""
    assert apart.shards is not None
    found, now = without_weights(apart), apart.shards.weights
    dtypes = {name: parameter.dtype for name, parameter in found.named_parameters()}
    trained = {n: weight.detach().to(dtypes[n], copy=True) for n, weight in now.items() if weight.requires_grad}
    Shards(found, {**now, **trained}, world)
    if 2 * sum(w.numel() for w in trained.values()) <= sum(w.numel() for w in now.values()):  # it is an adapter
        count_as(causal_model(found.model), causal_model(apart.model))
    return found


def cut(scorer: PackedModel, first: MasterWeights, world: World) -> None:
    """Keep the whole weights of a frozen scorer in shards, from which it gathers them, over the ranks that share the
    ``first`` model's."""
    assert isinstance(first, ShardedWeights)
    parts = {name: shard_of(parameter.detach(), first.mesh) for name, parameter in scorer.named_parameters()}
    for parameter in scorer.parameters():
        parameter.data = parameter.data.new_empty(0)
    Shards(scorer, parts, world)
