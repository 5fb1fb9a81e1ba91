"""What passes between the host and a fake CUDA device: waits of the host, and copies of host memory, with their places.

A wait is what needs a number of the device: an item, a list, a copy to the host, a shape that depends on data. A copy
from host memory that is not pinned waits too, once the device is busy: the driver has to read that memory first.
"""

from __future__ import annotations

from fake_cuda.device import FakeTensor, unset_fake_temporarily  # isort: skip - before torch

import traceback
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prefopt

PACKAGE = Path(prefopt.__file__).parent
_COPIES = {"_to_copy", "copy_"}
_SHAPED_BY_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


@dataclass
class Traffic:
    """``waits`` and ``pageable``: their places, in order, as ``file.py:line what``; ``pinned``: number of copies."""

    waits: list[str] = field(default_factory=list)
    pageable: list[str] = field(default_factory=list)
    pinned: int = 0

    def __enter__(self) -> Traffic:
        self._modes: list[Any] = [_Calls(), _Operators(self)]
        for mode in self._modes:
            mode.__enter__()
        self._tolist = FakeTensor.tolist
        FakeTensor.tolist = partialmethod(_listed, self)  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def _place(what: str) -> str:
    """Where in the package, or else in which library, the running call is."""
    frames = [f for f in traceback.extract_stack() if "/fake_cuda/" not in f.filename and "/torch/" not in f.filename]
    own = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
    where = own[-1] if own else frames[-1] if frames else None
    if where is None:
        return f"autograd: {what}"
    return f"{'/'.join(Path(where.filename).parts[-2:])}:{where.lineno} {what}"


def _on_device(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "cuda"


def _listed(x: FakeTensor, traffic: Traffic) -> Any:
    """A list is one wait; all numbers of the device are 1."""
    if x.device.type == "cuda":
        traffic.waits.append(_place("tolist"))
    return np.ones(x.shape).tolist()


def _pinned(x: torch.Tensor) -> bool:
    if isinstance(x, FakeTensor):
        return False
    with unset_fake_temporarily():
        return x.is_pinned()


class _Calls(TorchFunctionMode):
    """Gives numbers to what has been copied to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            return np.ones(args[0].shape)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in _COPIES:
            self._copy(name, args, kwargs)
        elif any(map(_on_device, tree_leaves((args, kwargs)))):
            if name == "_local_scalar_dense":
                self.traffic.waits.append(_place("item"))
                return 1.0 if args[0].dtype.is_floating_point else 1
            masks = name.startswith("index") and any(
                isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
            )
            untold = name == "repeat_interleave" and kwargs.get("output_size") is None
            if name in _SHAPED_BY_DATA or masks or untold:
                self.traffic.waits.append(_place(name))
        return func(*args, **kwargs)

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        source = args[1] if name == "copy_" else args[0]
        to = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        if source.device.type == to.type:
            return
        if to.type == "cpu":
            self.traffic.waits.append(_place("copy to the host"))
        elif _pinned(source):
            self.traffic.pinned += 1
        else:
            self.traffic.pageable.append(_place(f"{source.dtype} {list(source.shape)}"))
