"""Offloaded activations and gradients are the same bits, and what is offloaded does not stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.oracle import groups_of_every_kind
from model.test_memory import peak_of_allocator
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.memory import Blueprint
from prefopt.model.offload import HostActivations, _Block
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer, response_sums
from prefopt.train.optim import adamw
from train.small import tiny_llama

GROUPS = groups_of_every_kind()


def scorer_of(dtype: torch.dtype, *, lora: bool, checkpointed: bool, on_host: bool = False, **changes: Any) -> Any:
    model: Any = tiny_llama(**changes)
    if lora:
        torch.manual_seed(1)
        model = new_lora(model.requires_grad_(False), rank=2, alpha=4, dropout=0.0, targets=None)
    weights = MasterWeights(model, dtype, on_host=on_host)
    scorer = Scorer(model)
    if checkpointed:
        checkpoint_activations(model)
    return scorer.train(), weights


def trained(scorer: Scorer, weights: MasterWeights, steps: int = 3) -> dict[str, torch.Tensor]:
    """The masters after a few steps of two micro-batches each."""
    optimizer = adamw(weights.masters, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)
    half = len(GROUPS) // 2
    for _ in range(steps):
        for some in (GROUPS[:half], GROUPS[half:]):
            batch = pack(some, scorer.layout)
            response_sums(scorer(batch), batch).square().mean().backward()
        weights.settle()
        optimizer.step()
        weights.publish()
        weights.zero_grad()
    weights.release()
    return {name: value.clone() for name, value in weights.saved()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lora", "checkpointed"),
    [(False, False), (True, True), *(pytest.param(x, not x, marks=pytest.mark.slow) for x in (False, True))],
)
def test_training_ends_with_the_same_bits(dtype: torch.dtype, lora: bool, checkpointed: bool) -> None:
    expected = trained(*scorer_of(dtype, lora=lora, checkpointed=checkpointed))
    for what in ("optimizer", "activations"):
        scorer, weights = scorer_of(dtype, lora=lora, checkpointed=checkpointed, on_host=what == "optimizer")
        if what == "activations":
            scorer.offload = HostActivations(scorer, smallest=64)
        found = trained(scorer, weights)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), what


def test_masters_on_the_host_are_memory_of_their_own() -> None:
    scorer, weights = scorer_of(torch.float32, lora=False, checkpointed=False, on_host=True)
    own = dict(scorer.model.named_parameters())
    assert all(master.data_ptr() != own[name].data_ptr() for name, master in weights.masters.items())
    scorer(pack(GROUPS, scorer.layout)).sum().backward()
    weights.settle()
    assert all(p.grad is None for p in own.values()) and all(m.grad is not None for m in weights.masters.values())
    weights.release()


def test_blocks_are_moved_once_and_weights_never() -> None:
    scorer, _ = scorer_of(torch.float32, lora=False, checkpointed=False)
    scorer.offload = HostActivations(scorer, smallest=64)
    moved: list[int] = []
    move = scorer.offload._moved
    scorer.offload._moved = lambda index, storage: moved.append(storage._cdata) or move(index, storage)  # type: ignore
    scorer(pack(GROUPS, scorer.layout))
    weights = {p.untyped_storage()._cdata for p in scorer.parameters()}
    assert moved and len(moved) == len(set(moved)) and not weights & set(moved)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_device_holds_little_of_what_is_offloaded(checkpointed: bool) -> None:
    scorer, _ = scorer_of(torch.float32, lora=False, checkpointed=checkpointed, num_hidden_layers=12)
    here = Blueprint.of(scorer).count(GROUPS)
    scorer.offload = HostActivations(scorer, smallest=1024)
    away = Blueprint.of(scorer).count(GROUPS)
    assert away.kept < 0.5 * here.kept and away.peak < here.peak


class _Elsewhere(HostActivations):
    """Blocks of the CPU in memory of numpy, which torch's allocator does not count."""

    def _moved(self, index: int, storage: torch.UntypedStorage) -> _Block:
        if storage.device.type == "meta":
            return super()._moved(index, storage)
        block = _Block(index, storage.device, storage.nbytes(), None)
        block.host = np.array(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())  # type: ignore[assignment]
        return block

    def _fetch(self, block: _Block) -> None:
        super()._fetch(block) if block.host is None else _fill(block)


def _fill(block: _Block) -> None:
    block.loaded = torch.empty(block.size, dtype=torch.uint8)
    block.loaded.numpy()[:] = block.host


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_left_on_the_device_is_what_was_counted(checkpointed: bool) -> None:
    scorer, _ = scorer_of(torch.float32, lora=False, checkpointed=checkpointed, num_hidden_layers=12)
    scorer.offload = _Elsewhere(scorer, smallest=1024)
    states = 12 * torch.get_rng_state().nbytes if checkpointed else 0  # kept for each layer, of the host by itself
    counted = Blueprint.of(scorer).count(GROUPS)
    assert counted.peak == pytest.approx(peak_of_allocator(scorer, GROUPS) - states, rel=0.02)
