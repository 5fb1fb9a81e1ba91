"""What only a CUDA device can show: variable-length flash attention, and scores that equal the CPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.architectures import build
from model.dense import dense_attention, random_heads, who_sees_whom
from model.oracle import Draw, assert_same, assert_same_gradients, gradients, groups_of_every_kind, oracle_logprobs
from prefopt.model.check import check_scoring
from prefopt.model.flops import matmul_peak
from prefopt.model.kernels import flex
from prefopt.model.kernels.attention import gather_plan, kernel_for, shared_attention
from prefopt.model.kernels.head_device import fused_error
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch
from prefopt.train.objective import PreferenceObjective
from prefopt.train.step import Differentiator
from train.ranked import columns_for, mixed, pairs_only, terms

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
GROUPS = [*groups_of_every_kind(), Draw(3).group(150, 300, 90), Draw(4).group(1, 257, 130, 64)]


def attend(kernel: str, heads: Any, **options: Any) -> torch.Tensor:
    (row,) = pack(GROUPS).passes
    query, key, value, sinks = heads
    gather = gather_plan(row.segments, query.device) if kernel == "varlen" else None
    more = {} if sinks is None else {"s_aux": sinks}
    out, _ = shared_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        prefix_segments=row.segments,
        prefix_kernel=kernel,
        prefix_gather=gather,
        **more,
        **options,
    )
    return out


@pytest.mark.parametrize("window", [None, 8, 100], ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 64), (6, 2, 128), (5, 1, 64), (3, 3, 96), (2, 2, 256)], ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("kernel", ["varlen", "flex", "loop"])
def test_bfloat16_kernels_stay_near_float64(
    kernel: str, sinks: bool, shape: tuple[int, int, int], window: int | None
) -> None:
    tokens = sum(g.tokens for g in GROUPS)
    low = random_heads(tokens, *shape, sinks=sinks, dtype=torch.bfloat16, device=CUDA)
    leaves = [x for x in low if x is not None]
    high = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(1, tokens, shape[0], shape[2], generator=torch.Generator().manual_seed(9)).to(CUDA)
    expected = dense_attention(
        *high[:3], who_sees_whom(GROUPS, window), scale=shape[2] ** -0.5, sinks=high[3] if sinks else None
    )
    found = attend(kernel, low, sliding_window=window)
    assert float((found - expected).detach().abs().max()) < 0.03
    grads = torch.autograd.grad(found, leaves, upstream.bfloat16())
    for got, wanted in zip(grads, torch.autograd.grad(expected, high, upstream.double()), strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 0.015


@pytest.mark.parametrize("window", [None, 8, 100], ids=str)
def test_float32_takes_the_loop_and_is_exact(window: int | None) -> None:
    assert kernel_for(CUDA, torch.float32) == "loop"
    tokens = sum(g.tokens for g in GROUPS)
    heads = random_heads(tokens, 6, 2, 64, dtype=torch.float64, device=CUDA)
    expected = dense_attention(*heads[:3], who_sees_whom(GROUPS, window), scale=0.125)
    found = attend("loop", heads, sliding_window=window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "qwen3_moe"])
def test_scores_and_gradients_equal_the_cpus(name: str) -> None:
    groups = groups_of_every_kind()
    model = build(name)
    scorer = Scorer(model)
    expected = scorer(pack(groups, scorer.layout))
    expected_gradients = gradients(expected, model)
    model.to(CUDA)
    assert scorer.kernel == "loop"
    found = scorer(pack(groups, scorer.layout).to(CUDA))
    assert_same(found.cpu(), expected, 1e-6)
    moved = {n: g.cpu() for n, g in gradients_on_device(found, model).items()}
    assert_same_gradients(moved, expected_gradients, 1e-5)


def gradients_on_device(logp: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    upstream = torch.randn(len(logp), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(logp)
    (logp * upstream).sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3", "gpt_oss"])
def test_in_bfloat16_sharing_is_within_the_rounding_of_separate_runs(name: str) -> None:
    groups = groups_of_every_kind()
    differences = []
    for seed in range(3):
        low, wide = build(name, torch.bfloat16, seed=seed), build(name, torch.float32, seed=seed)
        low.to(CUDA)
        with torch.no_grad():
            run = oracle_logprobs(wide, groups)
            scorer = Scorer(low)
            assert scorer.kernel == "varlen"
            together = scorer(pack(groups, scorer.layout).to(CUDA)).cpu()
            plain = Scorer(low, share=False)
            scorer.detach_hook()
            apart = plain(pack(groups, plain.layout).to(CUDA)).cpu()
        differences.append(torch.stack([together - apart, apart - run]))
    sharing, precision = (float(x.square().mean().sqrt()) for x in torch.cat(differences, 1))
    assert sharing <= precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_load_check_passes_on_the_device(dtype: torch.dtype) -> None:
    scorer = Scorer(build("mistral", dtype).to(CUDA))
    assert check_scoring(scorer, groups_of_every_kind()).clone_error is not None


@pytest.mark.parametrize("name", ["dpo", "ld_dpo", "plackett_luce"])
def test_gradients_of_a_batch_are_computed_without_a_wait_for_the_device(name: str) -> None:
    """From packing to backward, with several micro-batches. tests/fake_cuda has all losses, without a GPU."""
    chosen = terms(f"{name}:1")
    groups = list((pairs_only if chosen[0].loss.kind == "pairs" else mixed)(6))
    sizes = Batch(groups)
    zeros = {"ref_logp_N": np.zeros(len(sizes.length_N)), "ref_logp_M": np.zeros(int(sizes.length_N.sum()), np.float32)}
    model = build("llama", torch.float32).to(CUDA)
    masters = MasterWeights(model, torch.bfloat16)
    objective = PreferenceObjective(chosen, device=CUDA)
    differentiator = Differentiator(Scorer(model), objective)
    columns = {**columns_for(chosen)(groups), **zeros}
    differentiator.gradients(Batch(groups, columns), 60)  # what is allocated once
    first = {weight: master.grad.clone() for weight, master in masters.masters.items() if master.grad is not None}
    masters.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiator.gradients(Batch(groups, columns), 60)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first.keys() == masters.masters.keys()
    for weight, grad in first.items():
        torch.testing.assert_close(masters.masters[weight].grad, grad)


def test_a_batch_arrives_as_it_was_packed() -> None:
    here = pack(GROUPS)
    there = here.to(CUDA)
    for field in ("read", "target", "owner", "length", "last"):
        assert torch.equal(getattr(there, field).cpu(), getattr(here, field)), field
    for before, after in zip(here.passes, there.passes, strict=True):
        assert torch.equal(after.ids.cpu(), before.ids) and torch.equal(after.positions.cpu(), before.positions)
    states = torch.randn(here.tokens, 8, dtype=torch.bfloat16)
    assert torch.equal(there.read_from(states.to(CUDA)).cpu(), here.read_from(states))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 100], ids=str)
@pytest.mark.parametrize("width", [128, 320])
def test_flex_attention_takes_caps_and_wide_heads(width: int, window: int | None, softcap: float | None) -> None:
    tokens = sum(g.tokens for g in GROUPS)
    low = random_heads(tokens, 4, 2, width, dtype=torch.bfloat16, device=CUDA)[:3]
    high = [x.detach().double().requires_grad_() for x in low]
    expected = dense_attention(*high, who_sees_whom(GROUPS, window), scale=width**-0.5, softcap=softcap)
    found = attend("flex", (*low, None), sliding_window=window, softcap=softcap)
    assert flex.usable()
    assert float((found - expected).detach().abs().max()) < 0.03
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(CUDA)
    grads = torch.autograd.grad(found, low, upstream.bfloat16())
    for got, wanted in zip(grads, torch.autograd.grad(expected, high, upstream.double()), strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 0.015


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_fused_head_serves_this_device(dtype: torch.dtype, options: dict[str, bool]) -> None:
    assert fused_error(CUDA, dtype, **{"bias": False, "softcap": False, **options}) < 0.01


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "qwen3_moe"])
def test_compiled_layers_give_the_same_on_the_device(name: str) -> None:
    model = build(name, torch.float32).to(CUDA)
    MasterWeights(model, torch.bfloat16)
    scorer = Scorer(model.train())
    rows = [pack(GROUPS[:n], scorer.layout).to(CUDA) for n in (3, 7, 11)]
    wanted = [scorer(row).detach() for row in rows]
    scorer.compile_layers()
    for row, right in zip(rows, wanted, strict=True):
        found = scorer(row)
        found.sum().backward()
        assert float((found - right).detach().square().mean().sqrt()) < 0.05
    assert scorer.compiled is not None
    assert scorer.compiled.failure is None
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_the_peak_of_the_device_is_plausible() -> None:
    assert matmul_peak(CUDA, torch.bfloat16) > 1e13
