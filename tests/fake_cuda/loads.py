"""Loading onto a fake CUDA device; test_fake_cuda.py runs this."""

from __future__ import annotations

from fake_cuda.device import CUDA, FakeTensor, fake_cuda  # isort: skip - before torch

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import PreTrainedModel

from fake_cuda.traffic import Traffic
from prefopt.model.load import load_model
from train.small import write_model

FREE = {
    "mem_get_info": lambda device=None: (2**40, 2**40),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
}


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_weights_go_to_the_device_one_by_one(
    tied: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host never holds the model: when it is moved as a whole, nothing is left to move."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # modes are of one thread
    folder = write_model(tmp_path / "m", tie_word_embeddings=tied)
    here: Any = load_model(folder, dtype=dtype, device=torch.device("cpu"))
    left: list[str] = []

    def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        left.extend(name for name, tensor in tensors if tensor.device != device)
        assert device == CUDA
        return model

    with fake_cuda(), patch.multiple(torch.cuda, **FREE), patch.object(PreTrainedModel, "to", moved):
        with Traffic() as traffic:
            there: Any = load_model(folder, dtype=dtype, device=CUDA)
        assert not left and len(traffic.pageable) >= len(list(here.parameters()))
        assert (there.lm_head.weight is there.model.embed_tokens.weight) is tied
        for (name, one), (other_name, other) in zip(
            [*here.named_parameters(), *here.named_buffers()],
            [*there.named_parameters(), *there.named_buffers()],
            strict=True,
        ):
            assert isinstance(other, FakeTensor) or isinstance(other.data, FakeTensor)
            assert (name, one.dtype, one.shape) == (other_name, other.dtype, other.shape)
