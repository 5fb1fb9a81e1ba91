"""Costs of a run: forward passes, tokens, models in memory, and the memory itself."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import psutil

from prefopt.errors import RunError

if TYPE_CHECKING:
    import torch  # imported where it is needed: run folders are read without it

Purpose = Literal["train", "score", "decode"]
LARGEST = ("models", "model_bytes", "peak_memory_bytes")
"""Maxima over several stages; all others are sums."""
MemoryFailure = RuntimeError | MemoryError
MEMORY_ERRORS = (RuntimeError, MemoryError)
"""Classes of errors that may mean that memory ran out, see :func:`out_of_memory`: a device's, or the host's."""


@dataclass(slots=True)
class Costs:
    """Counts of one run.

    A forward pass is one call of a model's layers: with gradients (``trained_tokens``), without (``scored_tokens``) or
    while sampling (``decoded_tokens``, prompt and response). A shared prefix counts once. ``models``: the most models
    in memory at once, with ``model_bytes`` of weights; a second set of weights for a whole model is another model. The
    load check's small model is not counted.
    """

    forward_passes: int = 0
    trained_tokens: int = 0
    scored_tokens: int = 0
    decoded_tokens: int = 0
    generated_tokens: int = 0
    models: int = 0
    model_bytes: int = 0
    _in_memory: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary, repr=False)

    def add_model(self, model: Any, size: int) -> None:
        """Count a model as in memory for as long as anything refers to it."""
        if model not in self._in_memory:
            self._in_memory[model] = size
            self.models = max(self.models, len(self._in_memory))
            self.model_bytes = max(self.model_bytes, sum(self._in_memory.values()))

    def to_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {count.name: getattr(self, count.name) for count in fields(self) if count.repr}


_open: list[Costs] = []
_same: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@contextmanager
def count_costs() -> Iterator[Costs]:
    """Count what happens in this block; enclosing blocks count it too."""
    costs = Costs()
    _open.append(costs)
    try:
        yield costs
    finally:
        _open.remove(costs)


@contextmanager
def uncounted() -> Iterator[None]:
    """Exclude this block from all counts."""
    before, _open[:] = list(_open), []
    try:
        yield
    finally:
        _open[:] = before


def count_pass(model: Any, tokens: int, purpose: Purpose) -> None:
    """Count a forward pass of ``model`` over ``tokens``."""
    for costs in _open:
        costs.forward_passes += 1
        name = {"train": "trained_tokens", "score": "scored_tokens", "decode": "decoded_tokens"}[purpose]
        setattr(costs, name, getattr(costs, name) + tokens)
        if _same.get(model, model) not in costs._in_memory:
            costs.add_model(_same.get(model, model), sum(p.numel() * p.element_size() for p in model.parameters()))


def count_generated(tokens: int) -> None:
    """Count sampled tokens."""
    for costs in _open:
        costs.generated_tokens += tokens


def count_as(copy: Any, model: Any) -> None:
    """Count ``copy``, which has weights at times, as the ``model`` whose weights they are."""
    _same[copy] = _same.get(model, model)


def count_held(owner: Any, size: int) -> None:
    """Count ``owner`` as a model: it holds weights for all of one."""
    for costs in _open:
        costs.add_model(owner, size)


def combine_costs(stages: list[dict[str, float]]) -> dict[str, float]:
    """The costs of several stages, one after the other.

    >>> combine_costs([{"seconds": 2.0, "models": 1}, {"seconds": 3.0, "models": 4}])
    {'seconds': 5.0, 'models': 4}
    """
    names = dict.fromkeys(name for stage in stages for name in stage)
    return {n: (max if n in LARGEST else sum)([stage[n] for stage in stages if n in stage]) for n in names}


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type != "cuda":
        return host_room()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def host_room() -> int:
    """Bytes of memory that this process may still take: what the machine has free, or less where a container or a job
    has a limit (control groups of version 2)."""
    room = int(psutil.virtual_memory().available)
    root = Path("/sys/fs/cgroup")
    with suppress(OSError):
        own = root / Path("/proc/self/cgroup").read_text().partition("0::")[2].strip().lstrip("/")
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):  # no limit is set here: there is no such file, or it says "max"
                limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
                cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
                room = min(room, limit + int(cached[1] if cached else 0))
            if group == root:
                break
    return room


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().total)
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the device's tensors, or by this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux, where getrusage reports the parent's peak
    if status.exists() and (peak := re.search(r"^VmHWM:\s*(\d+)", status.read_text(), re.M)):
        return int(peak[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA or a library of CUDA ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    pattern = r"can't allocate memory|not enough memory|out[ _]of[ _](\w+_)?memory|_STATUS_\w*ALLOC(ATION)?_FAILED"
    return isinstance(error, RuntimeError) and re.search(pattern, str(error), re.I) is not None


def halved(error: MemoryFailure, size: int, smallest: int, too_large: str, device: torch.device) -> int:
    """Half of ``size``, at least ``smallest``, after work of that size ran out of memory with ``error``.

    Raises ``error`` if it is another one, and :class:`RunError` with ``too_large`` for work of the smallest size.
    """
    if not out_of_memory(error):
        raise error
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    if size <= smallest:
        raise RunError(too_large) from error
    return max(smallest, size // 2)
