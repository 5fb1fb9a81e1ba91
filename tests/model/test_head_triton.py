"""The fused head, run by Triton's interpreter, against the plain one: values and gradients."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from prefopt.model.kernels.head import token_logprobs
from prefopt.model.kernels.head_device import aligned, fused_error

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def fused() -> Any:
    """The module with its kernels: interpreted, unless there is a GPU."""
    return importlib.import_module("prefopt.model.kernels.head_triton")


def drawn(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, *, bias: bool, frozen: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    weight = normal(vocabulary, width).requires_grad_(not frozen)
    b = normal(vocabulary).requires_grad_(not frozen) if bias else None
    return (
        normal(rows, width).requires_grad_(),
        weight,
        b,
        torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE),
    )


CASES = {
    "ragged in every direction": {"shape": (37, 61, 45)},
    "tiles filled exactly": {"shape": (32, 64, 32)},
    "one row": {"shape": (1, 50, 24)},
    "a bias": {"shape": (20, 45, 24), "bias": True},
    "a cap and a scale": {"shape": (20, 45, 24), "softcap": 3.0, "scale": 0.5},
    "a frozen head": {"shape": (37, 61, 45), "frozen": True},
    "a frozen head with all": {"shape": (17, 40, 24), "frozen": True, "bias": True, "softcap": 3.0, "scale": 2.0},
    # The interpreter's products take no bfloat16.
    "float16": {"shape": (37, 61, 48), "dtype": torch.float16},
    "float16 and frozen": {"shape": (37, 61, 48), "dtype": torch.float16, "frozen": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_fused_head_is_the_plain_one(fused: Any, case: dict[str, Any]) -> None:
    dtype = case.get("dtype", torch.float32)
    hidden, weight, bias, target = drawn(
        *case["shape"], dtype, bias=case.get("bias", False), frozen=case.get("frozen", False)
    )
    options = {"scale": case.get("scale", 1.0), "softcap": case.get("softcap")}
    upstream = torch.linspace(-1, 1, len(target), device=DEVICE)

    def results(found: tuple[torch.Tensor, torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        return [found[0], found[1], *torch.autograd.grad(found[0], leaves, upstream)]

    # On the CPU a plain head rounds its logits to float16, which the fused one never does.
    wide = [None if x is None else x.detach().float().requires_grad_(x.requires_grad) for x in (hidden, weight, bias)]
    right = token_logprobs(wide[0], wide[1], target, bias=wide[2], squares=True, **options)  # type: ignore[arg-type]
    wanted = results(right, [x for x in wide if x is not None and x.requires_grad])
    head = fused.FusedHead(weight, bias, *options.values(), blocks=fused.Blocks(16, 32, 16))
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    found = results(fused.fused_logprobs(hidden, head, target, squares=True), leaves)
    rounding = 1e-5 if dtype == torch.float32 else 2e-3
    assert [x.dtype for x in found] == [torch.float32, torch.float32, *(x.dtype for x in leaves)]
    for ours, exact in zip(found, wanted, strict=True):
        atol = rounding * max(1.0, float(exact.detach().abs().max()))
        torch.testing.assert_close(ours.float(), exact, rtol=0, atol=atol)


def test_confident_tokens_keep_their_gradient(fused: Any) -> None:
    """Where p is near 1, 1 - p of a rounded p would be rounding alone."""
    hidden, weight, _, target = drawn(16, 40, 16, torch.float16, bias=False, frozen=False)
    with torch.no_grad():
        hidden.copy_(weight[target])
    upstream = torch.ones(len(target), device=DEVICE)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    z = exact[0] @ exact[1].t()
    logp = z.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    assert float(logp.detach().exp().median()) > 0.9
    (right,) = torch.autograd.grad(logp, exact[:1], upstream.double())
    head = fused.FusedHead(weight, None, 1.0, None, blocks=fused.Blocks(16, 32, 16))
    (found,) = torch.autograd.grad(fused.fused_logprobs(hidden, head, target)[0], [hidden], upstream)
    error = (found.double() - right).norm(dim=-1) / right.norm(dim=-1)
    assert float(error.median()) < 0.003


@pytest.mark.parametrize("softcap", [False, True])
def test_the_trial_on_the_device_takes_what_is_right_and_sees_what_is_not(
    fused: Any, softcap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused.FusedHead.__new__, "__defaults__", (fused.Blocks(32, 256, 64),))
    assert fused_error(DEVICE, torch.float16, bias=True, softcap=softcap) < 0.002
    slopes = fused.FusedHead.slopes
    monkeypatch.setattr(fused.FusedHead, "slopes", lambda *given: slopes(*given) * 1.05)
    assert fused_error(DEVICE, torch.float16, bias=True, softcap=softcap) > 0.02


def test_rows_begin_at_multiples_of_eight() -> None:
    assert aligned(3, 61, torch.bfloat16, DEVICE).stride() == (64, 1)
