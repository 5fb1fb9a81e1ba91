"""Tensors of which a rank holds a part (DTensors), or all: parts, wholes, and which of the two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a rank holds a part of ``tensor``."""
    return hasattr(tensor, "full_tensor")


def shards_of(tensor: torch.Tensor) -> int:
    """Into how many parts a tensor is cut; 1: it is whole."""
    sharded: Any = tensor
    return int(sharded.device_mesh.size(-1)) if is_sharded(tensor) else 1


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all ranks, which all ask for it; one that is whole already stays."""
    sharded: Any = tensor
    whole: torch.Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return whole


def whole_tensors(tensors: Iterable[tuple[str, torch.Tensor]], *, keep: bool) -> dict[str, torch.Tensor]:
    """Tensors by name, sharded ones whole and on the CPU. All ranks take part; only where ``keep`` they are kept."""
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors:
        whole = whole_of(value)
        if keep:
            found[name] = whole.cpu() if is_sharded(value) else whole
    return found


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest_of(weights: Iterable[torch.Tensor]) -> str:
    """A short digest of whole tensors, of sums of their bits as integers: exact in whatever order a device adds."""
    sums = [w.contiguous().view(_SAME_SIZE[w.element_size()]).sum(dtype=torch.int64).cpu() for w in weights]
    return hashlib.sha256(torch.stack(sums).numpy().tobytes()).hexdigest()[:12] if sums else ""


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    sharded: Any = tensor
    local: torch.Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return local


def shard_of(whole: torch.Tensor, mesh: Any) -> torch.Tensor:
    """A tensor that every rank has, cut over the last dimension of ``mesh``; nothing is sent. A number stays whole."""
    if not whole.ndim:
        return whole
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [*(Replicate() for _ in range(mesh.ndim - 1)), Shard(0)]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).clone()  # of its own, not a view of the whole


def sharded_as(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank has, cut as ``like`` is if it has the same shape; nothing is sent."""
    if not is_sharded(like) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    value = whole.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
