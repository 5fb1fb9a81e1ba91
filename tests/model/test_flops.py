"""Operations by formula against operations counted as they happen."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.architectures import HYBRIDS, SEPARATE, build
from model.dense import who_sees_whom
from model.oracle import groups_of_every_kind
from model.test_families import built
from prefopt.model import flops
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import attention_shapes
from prefopt.model.flops import FlopCount, active_weights, matmul_peak, visible_pairs
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer
from prefopt.train import budget
from prefopt.train.budget import Speed

GROUPS = groups_of_every_kind()[:6]


def counted(scorer: Scorer, batch: Any, trains: bool) -> int:
    """Operations of forward, and backward, as torch sees its matrix products; attention in plain ones."""

    def in_place(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
        return int(2 * a[0] * a[1] * b[1])

    in_place_products = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=in_place_products) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.set_grad_enabled(trains):
            logp = scorer(batch)
        if trains:
            logp.sum().backward()
    return int(counter.get_total_flops())


def expected(flops: FlopCount, batch: Any) -> float:
    """What plain products take: attention computes every pair of a segment and hides some."""
    (row,) = batch.passes
    pairs = sum((stop - start) * (prefix + stop - start) for start, stop, _, prefix in row.segments)
    layers = sum(n for _, n in flops.windows)
    return flops.per_token * batch.tokens + flops.per_scored * len(batch.target) + flops.per_pair * layers * pairs


@pytest.mark.parametrize("trains", [True, False], ids=["training", "scoring"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "qwen3_moe", "mixtral", "latent attention"])
def test_the_formula_is_what_happens(name: str, trains: bool) -> None:
    # Experts run one after the other here, so that each token's products are seen.
    model = build(name, hidden_size=64) if name != "gpt2" else build(name)
    scorer = Scorer(model, attention="loop")
    batch = pack(GROUPS, scorer.layout)
    flops = FlopCount.of(model, trains=trains)
    assert counted(scorer, batch, trains) == pytest.approx(expected(flops, batch), rel=0.02)


# Those whose attention and mixers are counted in full.
EXPERTS = [
    "afmoe",
    "aria_text",
    "cohere2_moe",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
]
EXPERTS += [
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jetmoe",
    "kolibri1",
    "longcat_flash",
    "minimax_m2",
    "olmoe",
    "phimoe",
]
EXPERTS += ["qwen2_moe", "solar_open"]
SOME = {"ernie4_5_moe", "gpt_oss", "jetmoe", "longcat_flash", "qwen2_moe"}


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in SOME else [pytest.mark.slow]) for f in EXPERTS])
def test_experts_count_as_far_as_a_token_meets_them(family: str) -> None:
    model = built(family, torch.float64)
    scorer = Scorer(model, attention="loop")
    batch = pack(GROUPS, scorer.layout)
    assert counted(scorer, batch, False) == pytest.approx(expected(FlopCount.of(model, trains=False), batch), rel=0.005)
    active, whole = active_weights(model)
    routed = [p.numel() for n, p in model.named_parameters() if "Experts" in type(_owner(model, n)).__name__]
    left = 1 - (1 / 3 if family == "longcat_flash" else 1 / 2)
    assert whole == sum(p.numel() for p in model.parameters())
    assert whole - active == pytest.approx(left * sum(routed), rel=0.002)  # JetMoE: a bias beside its experts


def test_dbrx_keeps_its_numbers_in_a_part_of_its_configuration() -> None:
    model = built("dbrx", torch.float64)
    scorer = Scorer(model, attention="loop")
    batch = pack(GROUPS, scorer.layout)  # torch cannot count its forward pass alone
    assert counted(scorer, batch, True) == pytest.approx(expected(FlopCount.of(model), batch), rel=0.005)


def _owner(model: torch.nn.Module, parameter: str) -> torch.nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_frozen_weights_cost_less(part: str) -> None:
    model = build("llama", num_hidden_layers=3)
    full = FlopCount.of(model)
    (model.lm_head if part == "head" else model.model.embed_tokens).requires_grad_(False)
    flops = FlopCount.of(model)
    assert flops.per_scored == full.per_scored * (2 / 3 if part == "head" else 1)
    # Nothing asks for the gradient of the first layer's input.
    assert (flops.per_token < full.per_token) == (part == "embedding")
    scorer = Scorer(model, attention="loop")
    batch = pack(GROUPS, scorer.layout)
    assert counted(scorer, batch, trains=True) == pytest.approx(expected(flops, batch), rel=0.03)


def test_adapters_cost_two_thirds() -> None:
    model = build("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=128)
    full = FlopCount.of(model)
    policy = new_lora(model, rank=2, alpha=4, dropout=0.0, targets=None).double()
    scorer = Scorer(policy, attention="loop")
    batch = pack(GROUPS, scorer.layout)
    flops = FlopCount.of(policy)
    assert 0.6 < flops.per_token / full.per_token < 0.85
    assert counted(scorer, batch, trains=True) == pytest.approx(expected(flops, batch), rel=0.04)


@pytest.mark.parametrize("window", [None, 1, 7, 8, 9, 500])
def test_pairs_are_those_that_attention_shows(window: int | None) -> None:
    (row,) = pack(GROUPS).passes
    assert visible_pairs(list(row.segments), window) == int(who_sees_whom(GROUPS, window).sum())


def test_windows_are_counted_by_layer() -> None:
    model = build("gemma3")
    flops = FlopCount.of(model)
    assert sorted(flops.windows, key=str) == [(8, 1), (None, 1)]
    batch = pack(GROUPS)
    pairs = sum(int(who_sees_whom(GROUPS, window).sum()) for window in (8, None))
    linear = flops.per_token * batch.tokens + flops.per_scored * len(batch.target)
    assert flops(batch) == linear + pairs * 3 * 2 * 2 * 4 * 8


@pytest.mark.parametrize("name", [*HYBRIDS, *SEPARATE])
def test_every_architecture_can_be_counted(name: str) -> None:
    model = build(name)
    body = sum(p.numel() for p in model.parameters())
    flops = FlopCount.of(model)
    assert 0 < flops.per_token <= 6 * body
    assert flops(pack(GROUPS, Scorer(model).layout)) > 0


def test_the_measured_peak_bounds_a_product() -> None:
    cpu = torch.device("cpu")
    began = time.perf_counter()
    peak = matmul_peak(cpu, torch.float32)
    assert time.perf_counter() - began < 5
    a = torch.randn(300, 300)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, a)
        rates.append(2 * 300**3 / (time.perf_counter() - began))
    assert 0.3 * max(rates) < peak < 1e14


def test_the_peak_is_that_of_the_sizes_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(size: int, *_: Any) -> float:
        if size > 512:
            raise RuntimeError("CUDA error: out of memory")
        return 1e-3

    monkeypatch.setattr(flops, "_best_seconds", small)
    assert matmul_peak(torch.device("cpu"), torch.float32) == 2 * 512**3 / 1e-3


def test_without_sharing_each_response_has_its_prompt() -> None:
    flops = FlopCount.of(build("gemma3"))
    apart = pack([replace(g, continuations=(c,), pairs=()) for g in GROUPS for c in g.continuations])
    assert flops.unshared(pack(GROUPS)) == pytest.approx(flops(apart))
    assert flops(apart) > flops(pack(GROUPS))


def test_a_measurement_that_cannot_be_had_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise AttributeError("this configuration has no such field\nat all")

    monkeypatch.setattr(budget, "matmul_peak", lambda *_: 1e10)
    monkeypatch.setattr(FlopCount, "of", failing)
    speed = Speed(build("llama"), torch.device("cpu"), torch.float32, "pairs")
    record = speed.record(speed.work([]), 2.0)
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
