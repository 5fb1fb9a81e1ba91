"""What a run costs, counted where it is spent: forward passes, tokens, models in memory, and the memory itself.

>>> with count_costs() as costs:
...     count_generated(3)
>>> costs.generated_tokens
3
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import psutil

from prefopt.errors import RunError

if TYPE_CHECKING:
    import torch  # imported where it is needed: run folders are read without it

Purpose = Literal["train", "score", "decode"]
COUNTS = """
    forward_passes trained_tokens scored_tokens decoded_tokens generated_tokens models model_bytes
""".split()
LARGEST = ("models", "model_bytes", "peak_memory_bytes")
"""Over several stages these are maxima; all others are sums."""


@dataclass(slots=True)
class Costs:
    """Counts of one run.

    A forward pass is one call of a model's layers: with gradients (``trained_tokens``), without (``scored_tokens``) or
    while sampling (``decoded_tokens``, prompt and response). A shared prefix counts once. ``generated_tokens`` were
    sampled. ``models``: the most models in memory at once, of those used, with ``model_bytes`` of weights; a second set
    of weights for a whole model is another model. The load check's small model is not counted; its check on real rows
    and the trial of the token budget are.
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
        return {name: getattr(self, name) for name in COUNTS}


_open: list[Costs] = []


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
        if model not in costs._in_memory:
            costs.add_model(model, sum(p.numel() * p.element_size() for p in model.parameters()))


def count_generated(tokens: int) -> None:
    """Count sampled tokens."""
    for costs in _open:
        costs.generated_tokens += tokens


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
        return int(psutil.virtual_memory().available)
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the device's tensors, or by this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:  # what getrusage reports on Linux is inherited from the parent process
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# torch on the CPU; CUDA, as a plain error where it comes from a kernel or a copy; and CUDA's libraries.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|CU\w+_STATUS_\w*ALLOC(ATION)?_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library of the device, ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def halved(error: RuntimeError, size: int, smallest: int, too_large: str, device: torch.device) -> int:
    """Half of ``size``, at least ``smallest``, after work of that size ran out of memory with ``error``.

    Raises ``error`` if it is another one, and :class:`RunError` with ``too_large`` for work of the smallest size.
    """
    if not out_of_memory(error):
        raise error
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    if size <= smallest:
        raise RunError(too_large) from error
    return max(smallest, size // 2)
