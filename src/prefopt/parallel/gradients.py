"""Sums of gradients over ranks whose weights are whole, and norms of gradients that may be shards.

Gradients of sharded weights (DTensors) are summed by FSDP in the backward pass and are left alone here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from prefopt.parallel.tensors import is_sharded, whole_of
from prefopt.parallel.world import World

BUCKET = 16 * 2**20
"""Numbers that are sent at once."""


@torch.no_grad()
def sum_gradients(world: World, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradient of each whole parameter by its sum over ranks, in the parameter's dtype.

    A weight without a gradient on any rank keeps none, so that the optimiser passes over it as in one process. Ranks
    call this with the same parameters in the same order; nothing is sent where there is one rank.
    """
    if world.alone:
        return
    for bucket in _buckets([p for p in parameters if not is_sharded(p)]):
        # The last numbers count the ranks that have a gradient of each parameter.
        sizes = [p.numel() for p in bucket]
        flat = bucket[0].new_zeros(sum(sizes) + len(bucket))
        *parts, counts = flat.split([*sizes, len(bucket)])
        for i, (part, parameter) in enumerate(zip(parts, bucket, strict=True)):
            if parameter.grad is not None:
                part.copy_(parameter.grad.reshape(-1))
                counts[i] = 1
        world.add_(flat)
        for part, parameter, count in zip(parts, bucket, counts.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in order, cut where their dtype changes or a bucket is full."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or size + parameter.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def grad_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The global norm of all gradients, on the device; of shards, over all ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if is_sharded(g)]
    if not sharded:
        return torch.nn.utils.get_total_norm(gradients)
    norm = whole_of(torch.nn.utils.get_total_norm(sharded))
    whole = [g for g in gradients if not is_sharded(g)]
    return torch.hypot(norm, torch.nn.utils.get_total_norm(whole)) if whole else norm


@torch.no_grad()
def clip_(parameters: Iterable[torch.nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients of global norm ``norm`` down to ``limit``; shorter ones are left alone."""
    if not (math.isfinite(norm) and norm > limit):
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for some in ([g for g in gradients if is_sharded(g)], [g for g in gradients if not is_sharded(g)]):
        if some:
            torch._foreach_mul_(some, limit / (norm + 1e-6))
