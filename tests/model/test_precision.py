"""bfloat16 computes; float32 remembers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.architectures import build
from model.families import config_of
from model.oracle import Draw, groups_of_every_kind, oracle_logprobs
from model.test_families import built
from prefopt.data.group import Group
from prefopt.losses.pairs import dpo
from prefopt.model.adapter import new_lora
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights, freeze_and_cast, made_current, resolve_device
from prefopt.model.scorer import Scorer, response_sums
from prefopt.parallel.gradients import clip_, grad_norm
from prefopt.train.optim import adamw

RATE, STEPS = 1e-6, 50


def rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())


@pytest.mark.parametrize(
    "name", ["llama", "gpt_oss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "gemma2", "qwen3"))]
)
def test_in_bfloat16_sharing_is_within_the_rounding_of_separate_runs(name: str) -> None:
    groups = groups_of_every_kind()
    differences = []
    for seed in range(4):
        low, wide = build(name, torch.bfloat16, seed=seed), build(name, torch.float32, seed=seed)
        rounded = build(name, torch.bfloat16, seed=seed).float()
        with torch.no_grad():
            apart, run, exact = (oracle_logprobs(model, groups) for model in (low, wide, rounded))
            scorer = Scorer(low)
            assert scorer.kernel == "flash-cpu"
            together = scorer(pack(groups, scorer.layout))
        differences.append(torch.stack([together - apart, apart - run, together - exact, apart - exact]))
    sharing, precision, shared_error, separate_error = map(rms, torch.cat(differences, 1))
    assert 0 < sharing <= precision  # the distance between a bfloat16 and a float32 run
    assert shared_error <= 1.1 * separate_error  # and neither is nearer to what bfloat16 weights should give


def small_pairs() -> list[Group]:
    draw = Draw()
    return [draw.group(8, 6, 9), draw.group(5, 12, 4), draw.group(10, 7, 7), draw.group(3, 5, 10)]


def train(scorer: Scorer, step: Callable[[], None], micro_batches: int = 1) -> None:
    """DPO on four pairs, all of them in every step."""
    pairs = small_pairs()
    size = len(pairs) // micro_batches
    batches = [pack(pairs[i : i + size], scorer.layout) for i in range(0, len(pairs), size)]
    with torch.no_grad():
        references = [response_sums(scorer(batch), batch) for batch in batches]
    for _ in range(STEPS):
        for batch, reference in zip(batches, references, strict=True):
            sums = response_sums(scorer(batch), batch)
            out = dpo(sums[::2], sums[1::2], reference[::2], reference[1::2], beta=0.1)
            (out.numerator_R.sum() / len(pairs)).backward()
        step()


def displacement(compute: torch.dtype, micro_batches: int = 1) -> torch.Tensor:
    """How far 50 steps move the master weights of a small Llama, all in one vector."""
    model = build("llama", torch.float32)
    masters = MasterWeights(model, compute)
    start = {n: w.clone() for n, w in masters.saved()}
    assert all(w.dtype == torch.float32 for w in start.values())
    assert all(p.dtype == compute for p in model.parameters())
    optimiser = adamw(masters.masters, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.0)

    def step() -> None:
        for group in optimiser.param_groups:
            group["lr"] = RATE
        clip_(masters.masters.values(), float(grad_norm(masters.masters.values())), 1.0)
        optimiser.step()
        masters.zero_grad()
        masters.publish()

    train(Scorer(model), step, micro_batches)
    moved = torch.cat([(w - start[n]).flatten() for n, w in masters.saved()])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters.masters[name].to(compute)), name
    return moved.double()


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return displacement(torch.float32)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def test_bfloat16_steps_move_the_weights_like_float32_steps(exact: torch.Tensor) -> None:
    low = displacement(torch.bfloat16)
    assert exact.norm() > 0.25 * RATE * STEPS * len(exact) ** 0.5  # of the way that 50 steps can go
    assert abs(float(low.norm() / exact.norm()) - 1) < 0.05
    assert cosine(low, exact) > 0.9
    # Micro-batches arrive in bfloat16 and are added in float32.
    halves = displacement(torch.bfloat16, micro_batches=2)
    assert abs(float(halves.norm() / exact.norm()) - 1) < 0.05
    assert cosine(halves, exact) > 0.9


def test_without_masters_bfloat16_weights_stay_where_they_are(exact: torch.Tensor) -> None:
    """What the masters are for; and that the test above can fail."""
    model = build("llama", torch.bfloat16)
    start = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> None:
        clip_(model.parameters(), float(grad_norm(model.parameters())), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    train(Scorer(model), step)
    moved = torch.cat(
        [(p.detach().float() - s.float()).flatten() for p, s in zip(model.parameters(), start, strict=True)]
    )
    assert float((moved != 0).double().mean()) < 0.05
    assert abs(float(moved.norm() / exact.norm()) - 1) > 0.05


def test_adapters_have_masters_and_the_frozen_model_has_none() -> None:
    torch.manual_seed(0)
    policy = new_lora(build("llama", torch.float32), rank=2, alpha=4, dropout=0.0, targets=None)
    masters = MasterWeights(policy, torch.bfloat16)
    assert masters.masters.keys() == {n for n, p in policy.named_parameters() if "lora_" in n}
    assert all(p.dtype == torch.bfloat16 for p in policy.parameters())
    scorer = Scorer(policy)
    batch = pack(small_pairs(), scorer.layout)
    scorer(batch).sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert any(bool(m.grad.any()) for m in masters.masters.values() if m.grad is not None)
    assert all(m.grad.dtype == torch.float32 for m in masters.masters.values() if m.grad is not None)
    masters.zero_grad()
    assert all(m.grad is None for m in masters.masters.values())


def test_masters_come_back_from_a_checkpoint() -> None:
    first, second = build("llama", torch.float32), build("llama", torch.float32, seed=1)
    saved = {n: w.clone() for n, w in MasterWeights(first, torch.bfloat16).saved()}
    masters = MasterWeights(second, torch.bfloat16)
    masters.load(saved)
    assert all(torch.equal(w, saved[n]) for n, w in masters.saved())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_float32_and_float64_runs_train_the_model_itself() -> None:
    for dtype in (torch.float32, torch.float64):
        model = build("llama", dtype)
        masters = MasterWeights(model, dtype)
        assert all(masters.masters[n] is p for n, p in model.named_parameters())
        assert all(p.dtype == dtype for p in model.parameters())


def test_what_must_stay_in_float32_stays() -> None:
    model = build("llama", torch.float32)
    model._keep_in_fp32_modules = {"norm"}
    MasterWeights(model, torch.bfloat16)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_buffers_are_what_they_are_in_a_model_that_was_built_in_this_precision() -> None:
    """Rotary tables stay in float32, MiniMax's decay does not."""
    for family in ("minimax", "llama", "gemma3"):
        model = built(family, torch.float32)
        MasterWeights(model, torch.bfloat16)
        config = config_of(family)
        native = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        wanted = {name: b.dtype for name, b in native.named_buffers()}
        assert {name: b.dtype for name, b in model.named_buffers()} == wanted
        assert torch.float32 in wanted.values()


def test_names_with_dots_are_kept_in_float32() -> None:
    model = built("ernie4_5_moe", torch.float32)
    MasterWeights(model, torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias",
    }


def test_a_frozen_model_computes_as_the_trained_one_does() -> None:
    """As a reference: a plain ``to`` would round rotary tables, and positions with them."""
    policy, reference = built("ernie4_5_moe", torch.float32), built("ernie4_5_moe", torch.float32)
    MasterWeights(policy, torch.bfloat16)
    freeze_and_cast(reference, torch.bfloat16)
    groups = groups_of_every_kind()
    values = []
    for model in (policy, reference):
        scorer = Scorer(model)
        with torch.no_grad():
            values.append(scorer(pack(groups, scorer.layout)))
    assert torch.equal(*values)
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_gpu_by_its_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    second = torch.device("cuda", 1)
    assert resolve_device("cuda:1") == second
    assert resolve_device("cuda") == torch.device("cuda")
    assert made_current(second) == second, "of a model given in Python"
    assert current == [second, second]
