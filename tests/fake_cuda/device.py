"""A CUDA device for a torch without CUDA: shapes, devices and dtypes of what runs on it are real, numbers are not.

Import this before torch. Tensors of the device are fake (torch's FakeTensorMode); those of the host stay real, so that
data are read and packed as ever. FakeTensorMode alone traces forward passes; a backward pass asks for a device guard
and streams, which ``device.cpp`` provides. It is compiled once and kept in pytest's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(os.environ.get("PREFOPT_FAKE_CUDA") or Path(__file__).resolve().parents[2] / ".pytest_cache/fake_cuda")


def compiled() -> Path:
    """The device as a shared library for the torch that is installed."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    version = (torch_folder / "version.py").read_bytes()
    library = CACHE / f"{hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        include = torch_folder / "include"
        paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
        subprocess.run(["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *paths, str(SOURCE), "-o", made], check=True)
        made.rename(library)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), ctypes.RTLD_GLOBAL)
    return library


assert "torch" not in sys.modules, "torch keeps what it found when it was imported: import this before it"
ctypes.CDLL(str(compiled()), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from model import flash  # noqa: E402
from prefopt.model.kernels.varlen import has_varlen  # noqa: E402

CUDA = torch.device("cuda", 0)


def _of_device(x: object) -> bool:
    if isinstance(x, torch.device | str):
        return str(x).startswith("cuda")
    return isinstance(x, FakeTensor)


class _HostIsReal(TorchFunctionMode):
    """Leaves calls that name no tensor of the device, nor the device itself, out of the fake mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(_of_device, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """In this block tensors on ``cuda`` have no numbers, the device has the capability of an H100, and flash attention
    checks its arguments as its kernel would."""
    from_numpy, operators = torch.from_numpy, torch.ops.torch_attn
    attend, differentiate = operators._varlen_attn, operators._varlen_attn_backward
    assert has_varlen()  # which reads what is replaced below

    def real(array: Any) -> torch.Tensor:  # no mode sees it
        with unset_fake_temporarily():
            return from_numpy(array)

    def checked(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *sizes: int, **options: Any) -> Any:
        flash.check(query, key, value, cu_q, cu_k, narrow=True)
        assert query.device == CUDA
        flash.CALLS["traced"] += 1
        return attend.default(query, key, value, cu_q, cu_k, *sizes, **options)

    def checked_backward(grad: Any, *arguments: Any) -> Any:
        query, key, value, out, lse, cu_q, cu_k = arguments[:7]
        flash.check(query, key, value, cu_q, cu_k, narrow=True)
        assert grad.dtype == out.dtype == query.dtype and grad.is_contiguous() and lse.dtype == torch.float32
        return differentiate.default(grad, *arguments)

    for replacement, operator in ((checked, attend), (checked_backward, differentiate)):
        vars(replacement)["default"] = operator.default  # torch looks it up by name, for modes
    flash.CALLS.clear()
    with (
        patch.object(torch, "from_numpy", real),
        patch.object(operators, "_varlen_attn", checked),
        patch.object(operators, "_varlen_attn_backward", checked_backward),
        patch.multiple(
            torch.cuda,
            get_device_capability=lambda device=None: (9, 0),
            get_rng_state_all=list,
            set_rng_state_all=lambda states: None,
        ),
        FakeTensorMode(allow_non_fake_inputs=True),
        _HostIsReal(),
    ):
        yield


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """In :func:`fake_cuda`: the model with its tensors on the device, tied ones still tied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None and id(x) not in memo:
                    there: Any = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
                    if isinstance(x, torch.nn.Parameter):
                        there = torch.nn.Parameter(there, requires_grad=x.requires_grad)
                    memo[id(x)] = there
                if x is not None:
                    held[name] = memo[id(x)]
    return model
