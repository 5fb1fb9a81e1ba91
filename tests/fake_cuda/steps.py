"""Updates on a fake CUDA device: what the host waits for, and what is copied. test_fake_cuda.py runs these."""

from __future__ import annotations

from fake_cuda.device import CUDA, fake_cuda, moved  # isort: skip - before torch

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from fake_cuda.policy import scorer_of, trainer_of
from fake_cuda.traffic import Traffic
from model.architectures import build
from prefopt.config.ppo import PpoConfig
from prefopt.losses.declare import LOSSES
from prefopt.model.packing import PackLayout, split
from prefopt.model.precision import MasterWeights
from prefopt.model.routing import balancing_routers
from prefopt.model.scalar import ScalarScorer, scalar_from
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
from prefopt.rl.critic import Critic, HeadWeights
from prefopt.rl.objective import PpoObjective
from prefopt.train.batch import Batch
from prefopt.train.columns import mismatched
from prefopt.train.objective import PreferenceObjective
from prefopt.train.objectives import LikelihoodObjective, RewardObjective
from prefopt.train.routing import RoutedObjective, RouterLosses
from prefopt.train.step import InMemoryColumns
from prefopt.transfer import on_device
from train.ranked import columns_for, mixed, pairs_only, terms

BUDGET = 55
"""Tokens of a micro-batch, of which the batches here make several."""
QUICK = {"dpo", "plackett_luce"}
# Copies of a micro-batch: its tokens, the plan of its attention, its columns.
PER_MICRO_BATCH = 3
MORE = {
    "ld_dpo": 2,  # places of the first tokens, under policy and reference
    "plackett_luce": 2,  # places of tiers, for the loss and for metrics
    "tdpo": 1,  # the plan of the reference's pass
    "kto": 4,  # mismatched responses: tokens, plan, columns; and the second pass
    "bco_unpaired": 1,  # the plan of the second pass, as of all losses of a whole batch
    "aot": 1,
    "aot_unpaired": 1,
    "bco": 1,
    "beta_dpo": 1,
    "balanced": 2,  # tokens per response, and the second pass
    "ppo with a network": 1,  # the plan of the critic's pass
}


def passes(trainer: Any, batch: Batch, name: str) -> None:
    """An update waits once, for its metrics, and copies little, all of it from pinned memory."""
    with Traffic() as traffic:
        record, _ = trainer._update(batch)
    parts = len(list(split(range(len(batch)), [PackLayout().cost(g) for g in batch.groups], BUDGET)))
    assert parts > 1
    assert len(traffic.waits) == 1 and traffic.waits[0].startswith("train/batch.py"), traffic.waits
    assert not traffic.pageable
    more = MORE.get(name, 0)  # once more for the normaliser, of which the columns are those of the global batch
    assert 0 < traffic.pinned <= (PER_MICRO_BATCH + more) * parts + 1 + more, (traffic.pinned, parts)
    assert set(record) >= {"loss", "grad_norm"}


def zeros(batch: Batch, *names: str) -> dict[str, Any]:
    """Columns of zeros, by axis: of responses (``_N``) or tokens (``_M``)."""
    sizes = {"N": len(batch.length_N), "M": int(batch.length_N.sum())}
    return {name: np.zeros(sizes[name[-1]], np.float32 if name[-1] == "M" else np.float64) for name in names}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES])
def test_losses(name: str) -> None:
    chosen = terms(f"{name}:1")
    data = (pairs_only if chosen[0].loss.kind == "pairs" else mixed)(3)
    columns, compares = dict(columns_for(chosen)(data)), chosen[0].loss.needs_distributions
    reference = others = None
    if chosen[0].loss.needs_reference and not compares:
        columns |= zeros(Batch(list(data)), "ref_logp_N", "ref_logp_M")
    if chosen[0].loss.needs_mismatched:
        found = list(mismatched(data, 64)[0])
        others = Batch(found, zeros(Batch(found), "ref_logp_N"))
    with fake_cuda():
        scorer, weights = scorer_of("llama")
        if compares or others is not None:
            live = InMemoryReference(scorer, SwappedWeights(weights)) if compares else None
            reference = InMemoryColumns(live, compares=compares, tokens=False)
        objective = PreferenceObjective(chosen, device=CUDA)
        trainer = trainer_of(scorer, {"policy": weights}, objective, BUDGET, reference=reference)
        passes(trainer, Batch(list(data), columns, others), name)


@pytest.mark.slow
def test_a_reference_that_moves() -> None:
    chosen, data = terms("dpo:1"), pairs_only(3)
    with fake_cuda():
        scorer, weights = scorer_of("llama", "checkpointed")
        live = InMemoryReference(scorer, SwappedWeights(weights, moves=True))
        reference = InMemoryColumns(live, compares=False, tokens=False)
        objective = PreferenceObjective(chosen, device=CUDA)
        trainer = trainer_of(scorer, {"policy": weights}, objective, BUDGET, reference=reference)
        passes(trainer, Batch(list(data), columns_for(chosen)(data)), "tdpo")


@pytest.mark.slow
def test_likelihood() -> None:
    with fake_cuda():
        scorer, weights = scorer_of("llama", "lora")
        trainer = trainer_of(scorer, {"policy": weights}, LikelihoodObjective("rows", device=CUDA), BUDGET)
        passes(trainer, Batch(list(mixed(3))), "nll")


def scalar_scorer() -> tuple[ScalarScorer, MasterWeights]:
    """A reward model or critic on the device."""
    tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1})()
    model = scalar_from(build("llama", torch.float32), tokenizer)
    weights = MasterWeights(moved(model), torch.bfloat16)
    return ScalarScorer(model).train(), weights


def test_reward() -> None:
    data = pairs_only(3)
    with fake_cuda():
        scorer, weights = scalar_scorer()
        trainer = trainer_of(scorer, {"policy": weights}, RewardObjective(device=CUDA, margin=0.5), BUDGET)
        passes(trainer, Batch(list(data), columns_for(terms("dpo:1"))(data)), "reward")


@pytest.mark.parametrize(
    "critic", ["head", pytest.param("network", marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_ppo(critic: str | None) -> None:
    made: dict[str, Any] = {"model": "m", "prompts": ["p.txt"], "reward": "length", "output": "none"}
    groups = Batch(list(mixed(3)))
    names = ("old_logp_M", "advantage_M", "return_M", "old_value_M") if critic else ("old_logp_M", "advantage_N")
    config = PpoConfig(**made, algorithm="ppo" if critic else "rloo")
    with fake_cuda():
        scorer, weights = scorer_of("llama", "lora")
        networks, judge = {"policy": weights}, None
        if critic == "head":
            judge = Critic("a head", HeadWeights(torch.nn.Parameter(torch.zeros(32, device=CUDA))))
        elif critic == "network":
            other, held = scalar_scorer()
            judge = Critic("a network", held, other)
        if judge is not None:
            networks["critic"] = judge.weights
        trainer = trainer_of(scorer, networks, PpoObjective(config, judge, device=CUDA), BUDGET)
        passes(trainer, Batch(groups.groups, zeros(groups, *names)), f"ppo with a {critic}")


@pytest.mark.slow
def test_balanced_experts() -> None:
    chosen, data = terms("dpo:1"), pairs_only(3)
    columns = columns_for(chosen)(data) | zeros(Batch(list(data)), "ref_logp_N")
    with fake_cuda():
        scorer, weights = scorer_of("qwen3_moe")
        inner = PreferenceObjective(chosen, device=CUDA)
        objective = RoutedObjective(inner, balancing_routers(scorer.model), RouterLosses(balance=0.01, z=0.001))
        trainer = trainer_of(scorer, {"policy": weights}, objective, BUDGET)
        passes(trainer, Batch(list(data), columns), "balanced")


def test_the_detector_sees_waits_and_copies() -> None:
    waits: list[Any] = [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu().numpy(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.repeat_interleave(x, x.long()),
    ]
    pageable: list[Any] = [
        lambda x: torch.ones(3).to(CUDA, non_blocking=True),
        lambda x: x.copy_(torch.ones(4), non_blocking=True),
        lambda x: torch.tensor(3.0, device=CUDA),
        lambda x: x.new_tensor([1.0]),
    ]
    with fake_cuda():
        x = torch.ones(4, device=CUDA)
        for calls, expected in ((waits, (1, 0, 0)), (pageable, (0, 1, 0))):
            for number, call in enumerate(calls):
                with Traffic() as traffic, suppress(DynamicOutputShapeException):
                    call(x)
                assert (len(traffic.waits), len(traffic.pageable), traffic.pinned) == expected, number
        with Traffic() as traffic:
            on_device([np.ones(3), np.arange(2)], CUDA)
            x.new_full((), 2.0).add_(x.sum())
        assert (len(traffic.waits), len(traffic.pageable), traffic.pinned) == (0, 0, 1)
