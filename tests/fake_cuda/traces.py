"""Forward and backward passes of every architecture on a fake CUDA device; test_fake_cuda.py runs these.

By themselves: ``pytest tests/fake_cuda/traces.py``, in a process that has not imported torch.
"""

from __future__ import annotations

from fake_cuda.device import CUDA, FakeTensor, fake_cuda, moved  # isort: skip - before torch

from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen

from model import flash
from model.architectures import SEPARATE, SHARED, build
from model.oracle import groups_of_every_kind
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.kernels.head import head_of
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer

KINDS = ("full", "checkpointed", "lora")
QUICK = [("llama", "checkpointed"), ("mistral", "full"), ("gemma2", "full"), ("gpt_oss", "lora"), ("qwen3_moe", "full")]


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch is asked about the device; and flash attention checks its arguments as its kernel would."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: None)
    attend = torch_varlen.varlen_attn

    @wraps(attend)
    def checked(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *sizes: int, **options: Any) -> Any:
        flash.check(query, key, value, cu_q, cu_k, narrow=True)
        assert query.device == CUDA
        flash.CALLS["traced"] += 1
        return attend(query, key, value, cu_q, cu_k, *sizes, **options)

    monkeypatch.setattr(torch_varlen, "varlen_attn", checked)
    flash.CALLS.clear()
    yield


def scorer_of(name: str, kind: str) -> tuple[Scorer, MasterWeights]:
    """In :func:`fake_cuda`: a policy of the architecture in bfloat16, full or with an adapter."""
    model: Any = build(name, torch.float32)
    head = head_of(model)
    if kind == "lora":
        model = new_lora(model.requires_grad_(False), rank=4, alpha=8, dropout=0.0, targets=None)
    masters = MasterWeights(moved(model), torch.bfloat16)
    scorer = Scorer(model, head=head)
    if kind == "checkpointed":
        checkpoint_activations(model)
    scorer.train()
    return scorer, masters


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in SHARED for kind in KINDS])
def test_shared(name: str, kind: str) -> None:
    with fake_cuda():
        scorer, masters = scorer_of(name, kind)
        assert scorer.kernel == "varlen"
        logp_M = scorer(pack(groups_of_every_kind(), scorer.layout).to(CUDA))
        assert isinstance(logp_M, FakeTensor) and (logp_M.device, logp_M.dtype) == (CUDA, torch.float32)
        logp_M.sum().backward()
    for weight, master in masters.masters.items():
        assert master.grad is not None and master.grad.dtype == torch.float32, weight
        assert master.grad.device == CUDA, weight
    print(name, kind, flash.CALLS)


@pytest.mark.parametrize("name", SEPARATE)
def test_separate(name: str) -> None:
    with fake_cuda():
        scorer, masters = scorer_of(name, "full")
        logp_M = scorer(pack(groups_of_every_kind(), scorer.layout).to(CUDA))
        assert (logp_M.device, logp_M.dtype) == (CUDA, torch.float32)
        logp_M.sum().backward()
    assert all(master.grad is not None for master in masters.masters.values())
