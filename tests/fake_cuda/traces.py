"""Forward and backward passes of every architecture on a fake CUDA device; test_fake_cuda.py runs these."""

from __future__ import annotations

from fake_cuda.device import CUDA, FakeTensor, fake_cuda  # isort: skip - before torch

from typing import Any

import pytest
import torch

from fake_cuda.policy import scorer_of
from model import flash
from model.architectures import SEPARATE, SHARED
from model.oracle import Draw, groups_of_every_kind
from prefopt.model.packing import pack

KINDS = ("full", "checkpointed", "lora")
QUICK = {("llama", "checkpointed")}
SOFT_CAPPED = {"gemma2"}
"""These do not take flash attention."""


def quickly(cases: Any) -> list[Any]:
    """The cases, all but the quick ones marked as slow."""
    return [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "kind"), quickly((name, kind) for name in SHARED for kind in KINDS))
def test_shared(name: str, kind: str) -> None:
    with fake_cuda():
        scorer, masters = scorer_of(name, kind)
        assert scorer.kernel == "varlen"
        logp_M = scorer(pack(groups_of_every_kind(), scorer.layout).to(CUDA))
        assert isinstance(logp_M, FakeTensor) and (logp_M.device, logp_M.dtype) == (CUDA, torch.float32)
        logp_M.sum().backward()
        layers: int = scorer.model.config.num_hidden_layers  # type: ignore[assignment, union-attr]
        passes = 2 if kind == "checkpointed" else 1
        assert flash.CALLS["traced"] == (0 if name in SOFT_CAPPED else passes * layers)
    for weight, master in masters.masters.items():
        assert master.grad is not None and (master.grad.device, master.grad.dtype) == (CUDA, torch.float32), weight


@pytest.mark.slow
@pytest.mark.parametrize("name", SEPARATE)
def test_separate(name: str) -> None:
    with fake_cuda():
        scorer, masters = scorer_of(name)
        logp_M = scorer(pack([Draw().group(5, 3, 4)], scorer.layout).to(CUDA))
        assert isinstance(logp_M, FakeTensor) and (logp_M.device, logp_M.dtype) == (CUDA, torch.float32)
        logp_M.sum().backward()
    assert all(master.grad is not None for master in masters.masters.values())
