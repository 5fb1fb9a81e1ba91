"""Large arrays between processes: sent as they are, in pieces of bounded size, where a pickled object would be held
several times over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefopt.parallel.world import World, peer_errors

Array = npt.NDArray[Any]
PIECE = 64 * 2**20
"""Bytes of all processes that travel at once."""
ALIGNED = 16
"""Every tensor of a message begins at a multiple of this many bytes, so that it can be read in place."""


def gather_tensors(world: World, mine: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The named tensors of all ranks, on the CPU, in the order of ranks. Names and shapes may differ between ranks."""
    if world.alone:
        return [dict(mine)]
    import torch.distributed as dist

    heads = world.gather([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in mine.items()])
    places = [_places(head) for head in heads]
    buffers = [torch.empty(size, dtype=torch.uint8) for _, size in places]
    for (start, end), tensor in zip(places[world.rank][0], mine.values(), strict=True):
        buffers[world.rank][start:end] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    longest = max(size for _, size in places)
    each = max(1, PIECE // world.size)
    for start in range(0, longest, each):
        found = [torch.zeros(min(each, longest - start), dtype=torch.uint8) for _ in buffers]
        sent = torch.zeros_like(found[0])
        part = buffers[world.rank][start : start + each]
        sent[: len(part)] = part
        with peer_errors():
            dist.all_gather(found, sent)
        for buffer, piece in zip(buffers, found, strict=True):
            into = buffer[start : start + each]
            into.copy_(piece[: len(into)])
    return [
        {
            name: buffer[start:end].view(dtype).reshape(shape)
            for (name, dtype, shape), (start, end) in zip(head, spans, strict=True)
        }
        for head, (spans, _), buffer in zip(heads, places, buffers, strict=True)
    ]


def _places(head: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor begins and ends in a message, in bytes, and the message's length."""
    spans, at = [], 0
    for _, dtype, shape in head:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        spans.append((at, at + size))
        at += -(-size // ALIGNED) * ALIGNED
    return spans, at


def arrays_from_first(world: World, function: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
    """The named arrays that ``function`` gives on the first rank, which alone calls it, or its error, on all ranks."""
    if world.alone:
        return dict(function())
    import torch.distributed as dist

    own: dict[str, Array] = {}

    def made() -> dict[str, tuple[str, tuple[int, ...]]]:
        own.update(function())
        return {name: (array.dtype.str, array.shape) for name, array in own.items()}

    found: dict[str, Array] = {}
    for name, (dtype, shape) in world.on_first(made).items():
        # A copy where the array is a mapped file, which torch will not take.
        found[name] = np.require(own[name], requirements=["C", "W"]) if world.first else np.empty(shape, dtype)
        data = torch.from_numpy(found[name].reshape(-1).view(np.uint8))
        for piece in data.split(PIECE):
            with peer_errors():
                dist.broadcast(piece, src=0)
    return found
