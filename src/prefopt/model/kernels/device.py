"""The kind of a device, by which kernels and tile sizes are chosen. Tensors on ``meta``, which have no contents, can
stand for those of another kind of device: memory is counted on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_meta = "meta"


def kind_of(device: torch.device) -> str:
    """``cpu``, ``cuda``, ``mps``; for ``meta`` the kind that it stands for."""
    return _meta if device.type == "meta" else device.type


@contextmanager
def meta_as(kind: str) -> Iterator[None]:
    """In this block ``meta`` stands for devices of ``kind``."""
    global _meta
    before, _meta = _meta, kind
    try:
        yield
    finally:
        _meta = before
