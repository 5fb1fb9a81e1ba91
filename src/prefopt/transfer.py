"""Arrays of the host as tensors on a device.

A copy from ordinary host memory waits for the device, and each copy costs a launch. What a micro-batch needs is laid
end to end in one pinned buffer and copied at once, while the device computes what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
_ALIGNMENT = 16  # bytes; more than any element has


def on_device(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on ``device``, with their shapes and dtypes (float32 in place of float64 on mps).

    On CUDA they are views of one buffer that is copied without a wait; on the CPU they share the arrays' memory.
    """
    if device.type == "mps":
        arrays = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    arrays = [np.ascontiguousarray(a) for a in arrays]
    if device.type != "cuda":
        return [torch.from_numpy(a).to(device) for a in arrays]
    starts = _starts(arrays)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    _fill(buffer, arrays, starts)
    return _views(buffer.to(device, non_blocking=True), arrays, starts)


def _starts(arrays: Sequence[Array]) -> list[int]:
    """The first byte of each array in a buffer, and the size of that."""
    sizes = [-(-a.nbytes // _ALIGNMENT) * _ALIGNMENT for a in arrays]
    found: list[int] = np.cumsum([0, *sizes]).tolist()
    return found


def _fill(buffer: torch.Tensor, arrays: Sequence[Array], starts: Sequence[int]) -> None:
    memory = buffer.numpy()
    for array, start in zip(arrays, starts, strict=False):
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)


def _views(buffer: torch.Tensor, arrays: Sequence[Array], starts: Sequence[int]) -> list[torch.Tensor]:
    return [
        buffer[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]
