"""Weights in shards: FSDP2 on the layers of a scorer's model, then on the scorer.

The optimiser moves float32 shards. A layer is gathered in the dtype of computation when it is needed and forgotten
afterwards, so that the whole model is never in one place; gradients are summed in float32 by the reduction that also
scatters them. Log-probabilities and gradients are those of :class:`prefopt.model.precision.MasterWeights`.

Every rank makes the same forward and backward passes, since each of them communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from prefopt.core.terminal import size
from prefopt.errors import ModelError
from prefopt.model.architectures import causal_model, layers_of, towers_of
from prefopt.model.costs import memory_of
from prefopt.model.placeholders import take_unread
from prefopt.model.precision import MasterWeights, kept_in_float32
from prefopt.model.scorer import PackedModel
from prefopt.parallel.tensors import is_sharded, local_of, sharded_as, whole_of
from prefopt.parallel.world import World

Mesh = DeviceMesh


def mesh_of(world: World, device: torch.device, *, hybrid: bool) -> Mesh:
    """All ranks in one row; ``hybrid``: replicas of shards, those of one replica on one node."""
    if not hybrid:
        return init_device_mesh(device.type, (world.size,))
    nodes = world.size // world.ranks.local_size
    return init_device_mesh(device.type, (nodes, world.ranks.local_size), mesh_dim_names=("replicate", "shard"))


CASTING = ("idefics3", "mistral3", "smolvlm")
"""Model types whose towers cast pixels to the dtype of their weights, which in shards is float32 between passes."""
ROOM = 0.6
"""Of a device's memory, what weights may take of it: the rest is for activations."""


def choose(
    asked: str,
    world: World,
    model: torch.nn.Module,
    trained: Mapping[str, torch.Tensor],
    device: torch.device,
    others: Callable[[], int] = int,
) -> tuple[Literal["none", "full", "hybrid"], str]:
    """What ``--shard`` comes to, and a phrase that says so. Sizes alone count: ``model`` may have no contents yet.
    ``others``: bytes of models that are still to be loaded, and of their training."""
    if asked in ("none", "full", "hybrid"):
        return cast(Any, asked), {"none": "every process has all weights"}.get(asked, f"weights in shards ({asked})")
    own = list(model.parameters())
    held = {id(p): p for p in (*own, *trained.values())}.values()  # a master may be the model's own weight
    # Beside the weights: the gradient and two moments of each that trains.
    need = others() + sum(p.numel() * p.element_size() for p in (*held, *(3 * [*trained.values()])))
    machines = world.size // world.ranks.local_size
    room = ROOM * world.smallest(memory_of(device) // (1 if device.type == "cuda" else world.ranks.local_size))
    told = f"they need {size(need)} of {size(room)} on each"
    if need <= room:
        return "none", f"every process has all weights: {told}"
    if machines > 1 and need / world.ranks.local_size <= room:
        return "hybrid", f"weights in shards on each machine (hybrid): {told}"
    return "full", f"weights in shards (full): {told}"


def shard(
    scorer: PackedModel,
    weights: MasterWeights,
    world: World,
    dtype: torch.dtype,
    *,
    hybrid: bool,
    device: torch.device | None = None,
) -> ShardedWeights:
    """Cut the weights of a scorer's model into shards over all ranks, on its device or another."""
    device = device or next(scorer.model.parameters()).device
    scorer.most_passes = world.largest
    return ShardedWeights(scorer, weights, mesh_of(world, device, hybrid=hybrid), dtype)


def _refuse_casting(model: PreTrainedModel) -> None:
    """Refuse towers that would be given pixels of another dtype than their gathered weights have."""
    if (kind := model.config.model_type) in CASTING:
        raise ModelError(
            f"the vision tower of {kind} cannot be trained in shards in half precision: give --dtype float32, --vision"
            " frozen, or --shard none"
        )


class ShardedWeights(MasterWeights):
    """Trainable weights of which a rank holds a part. ``masters`` are DTensors, by the names of the model's parameters.

    It takes the place of ``weights``, which are released: the scorer's model computes in the same dtype as before, but
    holds its shards of the masters. Weights that the class keeps in float32, and those of vision towers that do not
    train, stay whole on every rank. Where a weight of one trains, the blocks of towers are cut as layers are.
    """

    def __init__(self, scorer: PackedModel, weights: MasterWeights, mesh: Mesh, dtype: torch.dtype) -> None:
        """Shard ``scorer`` in place. ``dtype``: that of computation."""
        self.scorer, self.mesh = scorer, mesh
        self.model = weights.model
        weights.release()
        for name, parameter in self.model.named_parameters():
            if name in weights.masters:
                parameter.data = weights.masters[name].data
        scorer.compute_dtype, scorer.outer_weights = dtype, self.outer_weights
        self.unread = take_unread(self.model)
        """Weights whose contents are still to be read, by name: see :mod:`prefopt.parallel.loading`."""
        causal = causal_model(scorer.model)
        kept = kept_in_float32(causal) if dtype.itemsize < 4 else lambda name: False
        whole = {p for n, p in self.model.named_parameters() if kept(n)}
        # Frozen towers cost less memory than a pass for nothing of a rank whose rows have no pictures costs time.
        towers = towers_of(causal)
        masters = {id(p) for n, p in self.model.named_parameters() if n in weights.masters}
        scorer.cut_towers = scorer.pictures and any(id(p) in masters for t in towers for p in t.parameters())
        if scorer.cut_towers and dtype.itemsize < 4:
            _refuse_casting(causal)
        whole |= set() if scorer.cut_towers else {p for tower in towers for p in tower.parameters()}
        # Frozen weights have the dtype of computation already; those that train are float32 until they are gathered.
        # Inputs of layers keep their dtype: a class may add what a float32 router weighs to a residual in bfloat16.
        wide = torch.promote_types(dtype, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole}
        blocks = [block for tower in towers for block in _blocks(tower)] if scorer.cut_towers else []
        for layer in (*layers_of(scorer.model), *blocks):
            fully_shard(layer, **options)
        fully_shard(scorer, **options)
        for module in _sharded(scorer):
            module.set_gradient_divide_factor(1.0)  # sums, not averages: the loss has its normaliser already
            module.set_force_sum_reduction_for_comms(True)
        self._trained = set(weights.masters)
        self._name_masters()

    def allocate(self, device: torch.device) -> None:
        """Give what is on the meta device its memory on ``device``, and move everything else there."""
        scorer: Any = self.scorer
        scorer._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
        self._name_masters()

    def _name_masters(self) -> None:
        self.masters = {n: p for n, p in self.model.named_parameters() if n in self._trained}

    def publish(self) -> None:
        """Nothing to do: layers are gathered from the masters at their next use."""

    def release(self) -> None:
        """Nothing to give back."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.masters.values():
            parameter.grad = None

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set the masters to whole tensors, which every rank has."""
        self.reshard()
        for name, master in self.masters.items():
            local_of(master).copy_(local_of(sharded_as(values[name], master)))

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The masters by name, in shards."""
        for name, master in self.masters.items():
            yield name, master.detach()

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """In this block, which all ranks enter, the weights outside of layers are whole: embedding, last norm, head."""
        root = cast(FSDPModule, self.scorer)
        root.unshard()
        try:
            yield
        finally:
            root.reshard()

    def reshard(self) -> None:
        """Forget what was gathered, so that shards may be changed."""
        for module in _sharded(self.scorer):
            module.reshard()


def _blocks(tower: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The parts of a tower that are called as one, below its models, whose classes transformers looks up, and below
    lists: hidden states of each block in a list may be what is read of the tower."""
    if any(isinstance(module, (PreTrainedModel, torch.nn.ModuleList)) for module in tower.modules()):
        for child in tower.children():
            yield from _blocks(child)
    elif any(True for _ in tower.parameters()):
        yield tower


def _sharded(scorer: torch.nn.Module) -> Iterator[FSDPModule]:
    return (module for module in scorer.modules() if isinstance(module, FSDPModule))


def made_whole(scorer: PackedModel, *, keep: bool) -> None:
    """Put whole weights, on the CPU, in the place of shards for good, to be changed and saved. All ranks call this, and
    only where ``keep`` the model is changed."""
    for sharded in _sharded(scorer):
        sharded.reshard()
    for module in scorer.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = whole_of(parameter.detach()) if is_sharded(parameter) else None
            if keep and whole is not None:
                setattr(module, name, torch.nn.Parameter(whole.cpu(), requires_grad=parameter.requires_grad))
    for sharded in list(_sharded(scorer)) if keep else ():
        cast(Any, sharded).__class__ = type(sharded).__bases__[1]  # fully_shard put a class of its own before it
