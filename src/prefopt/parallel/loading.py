"""Models that are read in shards: each rank reads the rows that it will hold, and the whole model is nowhere.

A model is loaded with placeholders for its large weights (:mod:`prefopt.model.placeholders`), gets its adapter and its
scorer as any other, and is cut while its weights are on the meta device. Then every rank reads its rows of the
safetensors files. What a class fuses or splits as it loads it (experts, for instance) is in no file as it is in the
model: there the first rank loads the whole model, and sends its weights one by one.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from prefopt.core.terminal import size
from prefopt.model.placeholders import Contents, Unread, without_contents
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import PackedModel
from prefopt.parallel.shard import ShardedWeights, shard
from prefopt.parallel.tensors import is_sharded, local_of
from prefopt.parallel.world import World

COMPARED = 16
"""Numbers of each weight in a file that all ranks compare: files of other contents differ there."""


def from_first(
    world: World, load: Callable[[], PreTrainedModel], made: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """A :data:`prefopt.model.placeholders.FromFirst`: the model that ``load`` gives on the first rank, and on the
    others the same one with placeholders for its weights. ``made`` is not needed."""
    held: list[PreTrainedModel] = []

    def on_first() -> bytes:
        held.append(load())
        return without_contents(held[0])

    data = world.on_first(on_first)
    if held:
        return held[0]
    found: PreTrainedModel = pickle.loads(data)  # of this run's own first process
    return found


def shard_unread(
    scorer: PackedModel,
    weights: MasterWeights,
    world: World,
    dtype: torch.dtype,
    device: torch.device,
    *,
    hybrid: bool,
) -> tuple[ShardedWeights, str]:
    """Cut a model with placeholders into shards on ``device``, and read them. Returns a line on what was read."""
    sharded = shard(scorer, weights, world, dtype, hybrid=hybrid, device=device)
    unread = sharded.unread
    world.agree("weights in the model's files", world.together(lambda: _probe(unread)))
    sharded.allocate(device)
    parameters = dict(sharded.model.named_parameters())
    stored = {name: there.contents for name, there in unread.items() if there.contents.stored is not None}
    world.together(lambda: [_read(parameters[name], contents) for name, contents in stored.items()])
    for name, there in unread.items():
        if name not in stored:
            _receive(parameters[name], there, world, device)
    sharded.unread = {}
    total = sum(p.numel() * p.element_size() for p in parameters.values())
    mine = sum(local_of(p).numel() * p.element_size() for p in parameters.values())
    if len(stored) == len(unread):
        return sharded, f"weights: {size(mine)} of {size(total)} read by each process"
    return sharded, (
        f"weights: this class changes them as it loads them, so that the first process held all {size(total)} and sent"
        f" each process {size(mine)}"
    )


def _probe(unread: dict[str, Unread]) -> str:
    """A digest of where weights are and of a few numbers of each in a file."""
    digest = hashlib.sha256()
    for name, there in unread.items():
        place, stored = there.contents.name, there.contents.stored
        digest.update(f"{name}:{place};".encode())
        if stored is not None:
            row = stored.read(place, slice(0, 1)).flatten()[:COMPARED]
            digest.update(f"{stored.dtype}{stored.shape}{row.tolist()}".encode())
    return digest.hexdigest()[:12]


@torch.no_grad()
def _read(parameter: torch.Tensor, contents: Contents) -> None:
    """Read this rank's rows of a weight; those beyond the file's are zero."""
    assert contents.stored is not None
    local = local_of(parameter.detach())
    start = rows_before(parameter)
    there = max(0, min(len(local), contents.stored.shape[0] - start))
    if there:
        local[:there].copy_(contents.stored.read(contents.name, slice(start, start + there)))
    local[there:].zero_()


@torch.no_grad()
def _receive(parameter: torch.Tensor, there: Unread, world: World, device: torch.device) -> None:
    """Take this rank's rows of a weight that the first rank holds."""
    if there.held is not None:
        whole = there.held.to(device).contiguous()
    else:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    world.send_(whole)
    local, start = local_of(parameter.detach()), rows_before(parameter)
    local.copy_(whole[start : start + len(local)])


def rows_before(parameter: torch.Tensor) -> int:
    """The first of the rows that this rank holds of a weight, cut as FSDP cuts: into parts of the same size, of which
    the last may be smaller or empty."""
    if not is_sharded(parameter):
        return 0
    mesh: DeviceMesh = cast(Any, parameter).device_mesh
    each = -(-parameter.shape[0] // mesh.size(-1))
    return min(parameter.shape[0], each * mesh.get_local_rank(mesh.ndim - 1))
