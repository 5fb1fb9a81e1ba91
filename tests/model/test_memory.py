"""Out of memory by every name it comes under; a measurement ends no run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.architectures import build
from model.test_families import built
from prefopt.model import flops
from prefopt.model.architectures import attention_shapes
from prefopt.model.costs import out_of_memory
from prefopt.model.flops import FlopCount, matmul_peak
from prefopt.train import budget
from prefopt.train.budget import measure_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        MemoryError(),
    ],
    ids=lambda e: str(e)[:20],
)
def test_out_of_memory_is_recognised(error: BaseException) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")], ids=str)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not out_of_memory(error)


def test_the_peak_is_that_of_the_sizes_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(size: int, *_: Any) -> float:
        if size > 512:
            raise RuntimeError("CUDA error: out of memory")
        return 1e-3

    monkeypatch.setattr(flops, "_best_seconds", small)
    assert matmul_peak(CPU, torch.float32) == 2 * 512**3 / 1e-3


def test_a_measurement_that_cannot_be_had_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise AttributeError("this configuration has no such field\nat all")

    monkeypatch.setattr(budget, "matmul_peak", lambda *_: 1e10)
    monkeypatch.setattr(FlopCount, "of", failing)
    record = measure_of(build("llama"), CPU, torch.float32, "pairs")([], 2.0)
    assert "utilisation" not in record
    assert record["step_seconds"] == 2.0
    assert caplog.messages == ["utilisation is not measured: this configuration has no such field"]


def test_layers_of_different_widths() -> None:
    """Gemma 4: a sliding layer with heads of 8 and a full one with heads of 16, and one of 2 keys each."""
    model = built("gemma4", torch.float32)
    shapes = attention_shapes(model.config)
    assert [(s.key_width, s.window) for s in shapes] == [(8, 8), (16, None)]
    counted = FlopCount.of(model, trains=False)
    assert counted.per_pair == 2.0 * 4 * 2 * 8
    assert dict(counted.windows) == {8: 1, None: 2.0}, "the wide layer counts as two of the first"
