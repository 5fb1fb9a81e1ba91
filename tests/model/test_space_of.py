"""What names a space of cached values."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from model.architectures import build
from prefopt.model.scorer import Scorer
from prefopt.reference.identity import Identity, space_of

WHOSE = Identity("weights", "config")


def test_values_of_float32_on_a_cpu_are_found_where_they_were() -> None:
    space = space_of(WHOSE, Scorer(build("llama", torch.float32)), torch.device("cpu"))
    parts = [WHOSE.digest, "float32", "shared", "flash-cpu", "cpu", 1]
    assert space.id == hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def test_narrow_types_have_a_version_of_their_own() -> None:
    space = space_of(WHOSE, Scorer(build("llama", torch.bfloat16)), torch.device("cpu"))
    assert (space.dtype, space.scorer_version) == ("bfloat16", 2)


def test_on_cuda_the_gpu_and_the_kernel_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, device = Scorer(build("llama", torch.float32)), torch.device("cuda")
    ids = set()
    for gpu in ("NVIDIA H100", "NVIDIA A100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, gpu=gpu: gpu)
        for flash in (None, "FA3"):
            monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda flash=flash: flash)
            ids.add(space_of(WHOSE, scorer, device).id)
    assert len(ids) == 4
