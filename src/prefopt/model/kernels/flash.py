"""The implementation of flash attention behind torch's operators: FlashAttention-2, or 3 or 4 where torch can switch
them on.

Torch keeps a registry of implementations (``torch.nn.attention.activate_flash_attention_impl``); their packages are
installed by the user. The best for the device is tried on rows of the model's own head widths, against plain
arithmetic, values and gradients. What fails there is switched off again. One that the user has switched on stays.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from prefopt.errors import first_line
from prefopt.model.costs import out_of_memory
from prefopt.model.kernels import plain
from prefopt.model.kernels.shared import KERNELS, How

BEST = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn")}
"""By the major compute capability: the implementation and the package that provides it."""
ALLOWED = 0.02
"""Relative error of values and gradients in bfloat16 that rounding explains."""
log = logging.getLogger(__name__)
_refused: set[str] = set()

HeadShape = tuple[int, int, int]
"""Query heads, key heads, and their width."""


def _function(name: str) -> Callable[..., Any] | None:
    """A function of the registry, which torch has since 2.12."""
    return getattr(torch.nn.attention, name, None)


def implementation() -> str:
    """The implementation in use with its version, such as ``FA3 3.0.0``; ``FA2`` is torch's own."""
    current = _function("current_flash_attention_impl")
    name = current() if current is not None else None
    if name is None:
        return "FA2"
    package = next((package for impl, package in BEST.values() if impl == name), "")
    found = importlib.metadata.packages_distributions().get(package, [])
    return " ".join([str(name), *(importlib.metadata.version(distribution) for distribution in found[:1])])


def activate(device: torch.device, dtype: torch.dtype, shapes: Sequence[HeadShape], window: int | None) -> None:
    """Switch on the best implementation for ``device`` that is installed, unless the user has chosen one. It stays on
    only where it is right for all ``shapes``."""
    switch, current, known = map(
        _function,
        ("activate_flash_attention_impl", "current_flash_attention_impl", "list_flash_attention_impls"),
    )
    best = BEST.get(_generation(device))
    if switch is None or current is None or known is None or best is None:
        return
    name, package = best
    if current() not in (None, name) or name in _refused or name not in known():
        return
    if current() is None:
        try:
            switch(name)
        except ImportError:  # its package is not installed
            return
        except Exception as error:  # of any kind: the package is of another version, or for other devices
            _refuse(name, first_line(error))
            return
    try:
        worst = max((_error(device, dtype, shape, w) for shape in shapes for w in {None, window}), default=0.0)
        reason = None if worst < ALLOWED else f"it differs by {worst:.2g} (relative) from plain arithmetic"
    except Exception as failure:
        if out_of_memory(failure):
            raise
        reason = first_line(failure)
    if reason is not None:
        _refuse(name, f"{package}: {reason}")


def _generation(device: torch.device) -> int:
    """The major compute capability; 0 where the device has none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _refuse(name: str, reason: str) -> None:
    _refused.add(name)
    restore = _function("restore_flash_attention_impl")
    if restore is not None:
        restore()
    log.warning("attention: %s is not used, FA2 takes its place: %s", name, reason)


def _error(device: torch.device, dtype: torch.dtype, shape: HeadShape, window: int | None) -> float:
    """Largest relative error (norm of the difference) of output and gradients on a row with a shared prefix."""
    heads, key_heads, width = shape
    segments = ((0, 150, 0, 0), (150, 290, 0, 40), (290, 300, 0, 40))
    generator = torch.Generator().manual_seed(0)
    row = [torch.randn(h, 300, width, generator=generator).to(device, dtype) for h in (heads, key_heads, key_heads)]
    grad = torch.randn(300, heads, width, generator=generator).to(device, dtype)
    how, fast = How(width**-0.5, window), KERNELS["varlen"]
    plan = fast.plan(segments, device)
    out, lse = fast.forward(*row, plan, how)
    found = (out, *fast.backward(grad, *row, out, lse, plan, how))
    wide = [x.float() for x in row]
    right, right_lse = plain.forward(wide[0], wide[1], wide[2], segments, how)
    wanted = (right, *plain.backward(grad.float(), wide[0], wide[1], wide[2], right, right_lse, segments, how))
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
