"""Arrays laid end to end in one buffer come out as they were. That the copy waits for nothing: tests/fake_cuda."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prefopt import transfer

ARRAYS: list[Any] = [
    np.arange(5),
    np.array([], np.int64),
    np.arange(7, dtype=np.int32),
    np.array([True, False, True]),
    np.linspace(0, 1, 6).reshape(2, 3),
    np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1:],
    np.zeros((0, 3), np.int64),
]


@pytest.mark.parametrize("in_one_buffer", [False, True])
def test_arrays_come_out_as_they_were(in_one_buffer: bool) -> None:
    if in_one_buffer:  # as on CUDA
        arrays = [np.ascontiguousarray(a) for a in ARRAYS]
        starts = transfer._starts(arrays)
        buffer = torch.empty(starts[-1], dtype=torch.uint8)
        transfer._fill(buffer, arrays, starts)
        found = transfer._views(buffer, arrays, starts)
        assert len({x.untyped_storage().data_ptr() for x in found if x.numel()}) == 1
    else:
        found = transfer.on_device(ARRAYS, torch.device("cpu"))
    for x, array in zip(found, ARRAYS, strict=True):
        assert x.dtype == torch.from_numpy(array.copy()).dtype and x.is_contiguous()
        np.testing.assert_array_equal(x.numpy(), array)


def test_on_the_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    (x,) = transfer.on_device([array], torch.device("cpu"))
    array[0] = 7
    assert x[0] == 7
