"""What a device asks of the head: the size of its tiles, memory that products are fast on, and fused kernels."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefopt.errors import first_line
from prefopt.model.costs import memory_of, out_of_memory
from prefopt.model.kernels.device import kind_of

if TYPE_CHECKING:
    from prefopt.model.kernels.head_triton import FusedHead

FUSED_WIDTH = 2048
"""Up to this width the fused kernels are used: beyond it the matrix products take longer than all else."""
_FUSED_DTYPES = (torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)


def tiles(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Even tiles of rows, small enough for their logits."""
    height = max(16, tile_elements(as_counted(device)) // vocabulary)
    height = -(-rows // -(-rows // height)) if rows else 1  # even tiles
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def as_counted(device: torch.device) -> torch.device:
    """The device that ``meta`` stands for."""
    return torch.device(kind_of(device)) if device.type == "meta" else device


@cache
def tile_elements(device: torch.device) -> int:
    """Logits of one tile. On a GPU the weight of the head is read for every tile, so that a tile must be tall enough to
    keep its products bound by arithmetic: its float32 logits take a 150th of the memory, up to 1 GiB."""
    if device.type == "cuda" and not torch.cuda.is_available():  # memory is counted for a GPU that is not here
        return 2**27
    if device.type == "cuda":
        return min(2**28, max(2**24, memory_of(device) // 150 // 4))
    return {"cpu": 2**23}.get(device.type, 2**25)


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory [rows, columns] whose rows begin at multiples of 8: products of odd vocabularies take slow paths else."""
    return torch.empty(rows, -(-columns // 8) * 8, dtype=dtype, device=device)[:, :columns]


def fused_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> FusedHead | None:
    """The head in fused kernels; None where they do not serve. The first call tries them on the device."""
    if hidden.device.type != "cuda" or hidden.dtype not in _FUSED_DTYPES or hidden.dtype != weight.dtype:
        return None
    if hidden.shape[1] > FUSED_WIDTH or hidden.stride(1) != 1 or weight.stride(1) != 1:
        return None
    if not _fused_works(hidden.device, hidden.dtype, bias is not None, softcap is not None):
        return None
    from prefopt.model.kernels.head_triton import FusedHead

    return FusedHead(weight, bias, scale, softcap)


@cache
def _fused_works(device: torch.device, dtype: torch.dtype, bias: bool, softcap: bool) -> bool:
    """Whether the fused kernels run here and give what the plain head gives. Where not, a line says why."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        error = fused_error(device, dtype, bias=bias, softcap=softcap)
        reason = None if error < 0.02 else f"they differ by {error:.2g} (relative) from the plain head"
    except Exception as failure:  # of any kind: Triton compiles for this device here
        if out_of_memory(failure):
            raise
        reason = first_line(failure)
    if reason is not None:
        log.warning("head: the fused kernels are not used: %s", reason)
    return reason is None


def fused_error(device: torch.device, dtype: torch.dtype, *, bias: bool, softcap: bool) -> float:
    """Largest relative error (norm of the difference) of values and gradients by the fused kernels, on random numbers,
    against float32."""
    from prefopt.model.kernels.head import token_logprobs
    from prefopt.model.kernels.head_triton import FusedHead, fused_logprobs

    rows, vocabulary, width = 150, 1001, 192
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    cap, upstream = (5.0 if softcap else None), torch.linspace(-1, 1, rows, device=device)
    hidden, weight, b = normal(rows, width), normal(vocabulary, width), normal(vocabulary) if bias else None
    target = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    wide = [x.detach().float().requires_grad_() for x in leaves]
    with torch.enable_grad():
        found = fused_logprobs(hidden, FusedHead(weight, b, 0.5, cap), target, squares=True)
        right = token_logprobs(
            wide[0], wide[1], target, bias=wide[2] if bias else None, scale=0.5, softcap=cap, squares=True
        )
        pairs = zip(
            (*found, *torch.autograd.grad(found[0], leaves, upstream)),
            (*right, *torch.autograd.grad(right[0], wide, upstream)),
            strict=True,
        )
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in pairs)
