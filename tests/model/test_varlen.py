"""The path of variable-length flash attention, on the CPU: its kernel is stood in for by plain arithmetic.

What torch's kernel itself computes is for test_gpu.py; here it is what we hand to it and make of its gradients.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F

from model.architectures import build
from model.oracle import groups_of_every_kind
from prefopt.errors import ModelError
from prefopt.model import scorer as scorer_module
from prefopt.model.check import check_scoring, tiny_clone
from prefopt.model.kernels import attention
from prefopt.model.kernels.attention import WIDEST, gather_plan, shared_attention
from prefopt.model.kernels.flash_cpu import gathered, occurrences
from prefopt.model.scorer import Scorer

CPU = torch.device("cpu")
# A prompt with three responses, and a group of another one after it.
SEGMENTS = ((0, 7, 0, 0), (7, 12, 0, 7), (12, 21, 0, 7), (21, 24, 0, 7), (24, 28, 24, 0), (28, 31, 24, 4))
TOKENS = 31
_WINDOW_ERROR = {"extra": 0}


def plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """Flash attention of one sequence after the other, with the shapes it takes; of torch 2.11, which has no flag."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q[-1]) == len(query)
    assert int(cu_k[-1]) == len(key)
    assert query.shape[-1] <= WIDEST
    assert query.shape[-1] % 8 == 0
    repeat, out = query.shape[1] // key.shape[1], []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        k, v = (x.repeat_interleave(repeat, 0) for x in (k, v))
        at, left = torch.arange(d - c - (b - a), d - c)[:, None], window_size[0] + _WINDOW_ERROR["extra"]
        seen = (torch.arange(d - c)[None] <= at) & ((window_size[0] < 0) | (at - torch.arange(d - c)[None] <= left))
        out.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The CPU takes the way of CUDA."""
    monkeypatch.setattr(torch_varlen, "varlen_attn", plainly)
    monkeypatch.setattr(
        scorer_module, "kernel_for", lambda device, dtype, wish="auto": "loop" if wish == "loop" else "varlen"
    )
    return monkeypatch


def drawn(heads: int, key_heads: int, width: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, n, TOKENS, width, dtype=dtype, requires_grad=True) for n in (heads, key_heads, key_heads)]


def attended(tensors: list[torch.Tensor], kernel: str, window: int | None = None) -> tuple[torch.Tensor, ...]:
    """Output and gradients."""
    gather = gather_plan(SEGMENTS, CPU) if kernel == "varlen" else None
    options: Any = {"prefix_segments": SEGMENTS, "prefix_kernel": kernel, "prefix_gather": gather}
    out, _ = shared_attention(torch.nn.Identity(), *tensors, None, sliding_window=window, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), tensors)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 8), (4, 2, 16), (6, 1, 8)])
def test_the_same_as_the_loop(
    stand_in: pytest.MonkeyPatch, heads: int, key_heads: int, width: int, window: int | None
) -> None:
    tensors = drawn(heads, key_heads, width)
    for found, wanted in zip(attended(tensors, "varlen", window), attended(tensors, "loop", window), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_grouped_heads_are_flagged_where_the_version_of_torch_has_the_flag(stand_in: pytest.MonkeyPatch) -> None:
    flags = []

    def newer(*arguments: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool = False) -> torch.Tensor:
        flags.append(enable_gqa)
        return plainly(*arguments, scale=scale, window_size=window_size)

    attended(drawn(4, 2, 8), "varlen")  # without the flag
    stand_in.setattr(torch_varlen, "varlen_attn", newer)
    attended(drawn(4, 2, 8), "varlen")
    attended(drawn(4, 4, 8), "varlen")
    assert flags == [True, False]


@pytest.mark.parametrize("width", [12, WIDEST + 8])
def test_head_widths_that_flash_attention_refuses_take_the_loop(stand_in: pytest.MonkeyPatch, width: int) -> None:
    def refusing(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("flash attention was asked")

    stand_in.setattr(torch_varlen, "varlen_attn", refusing)
    tensors = drawn(2, 2, width)
    for found, wanted in zip(attended(tensors, "varlen"), attended(tensors, "loop"), strict=True):
        assert torch.equal(found, wanted)


def test_values_wider_than_keys_are_not_cut() -> None:
    query, key, value = drawn(2, 2, 8)
    wide = torch.cat([value, value * 2], -1)
    out, _ = shared_attention(torch.nn.Identity(), query, key, wide, None, prefix_segments=SEGMENTS)
    half, _ = shared_attention(torch.nn.Identity(), query, key, value, None, prefix_segments=SEGMENTS)
    torch.testing.assert_close(out, torch.cat([half, half * 2], -1))


@pytest.mark.parametrize("responses", [2, 5])
def test_gradients_of_a_prefix_are_added_in_order_and_rounded_once(responses: int) -> None:
    index = torch.cat([torch.arange(6)] * (responses + 1))
    wide = torch.randn(6, 3, requires_grad=True)
    upstream = torch.randn(len(index), 3)
    (plain,) = torch.autograd.grad(wide.index_select(0, index), wide, upstream)
    (ours,) = torch.autograd.grad(gathered(wide, index, occurrences(index)), wide, upstream)
    assert torch.equal(ours, plain), "in float32 the bits are those of torch on the CPU"
    narrow = wide.detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(gathered(narrow, index, occurrences(index)), narrow, upstream.bfloat16())
    truth = upstream.bfloat16().float().view(responses + 1, 6, 3).sum(0)
    assert torch.equal(found, truth.bfloat16())


def test_the_loop_rounds_the_gradient_of_a_prefix_once() -> None:
    """Forty short responses: in bfloat16 a running sum would lose the last of them."""
    segments = ((0, 4, 0, 0), *((n, n + 1, 0, 4) for n in range(4, 44)))
    torch.manual_seed(1)
    tensors = [torch.randn(1, 2, 44, 8).bfloat16().requires_grad_() for _ in range(3)]

    def values(leaves: list[torch.Tensor]) -> torch.Tensor:
        out, _ = shared_attention(torch.nn.Identity(), *leaves, None, prefix_segments=segments)
        (grad,) = torch.autograd.grad(out.sum(), leaves[2])
        return grad[:, :, :4].double()

    truth = values([x.detach().double().requires_grad_() for x in tensors])
    error = (values(tensors) - truth).norm() / truth.norm()
    assert error < 3e-3  # half a unit in the last place is 2e-3


class TestTheLoadCheck:
    """On CUDA it looks at the fast kernel in the run's own precision."""

    @pytest.fixture
    def scorer(self, stand_in: pytest.MonkeyPatch) -> Scorer:
        return Scorer(build("mistral", torch.bfloat16))

    def test_passes_what_is_right(self, scorer: Scorer) -> None:
        assert scorer.kernel == "varlen"
        check_scoring(scorer, groups_of_every_kind())

    def test_stops_a_window_that_is_off(self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(_WINDOW_ERROR, "extra", 3)
        with pytest.raises(ModelError, match=r"small copy"):
            check_scoring(scorer, groups_of_every_kind())

    def test_stops_gradients_that_are_wrong_in_narrow_types_alone(
        self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Louder(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
                return grads[0] * (1.5 if grads[0].dtype == torch.bfloat16 else 1.0)

        def louder(*arguments: Any, **options: Any) -> torch.Tensor:
            return Louder.apply(plainly(*arguments, **options))  # type: ignore[no-any-return,no-untyped-call]

        monkeypatch.setattr(torch_varlen, "varlen_attn", louder)
        with pytest.raises(ModelError, match=r"gradients by the fast attention kernel .* give --attention loop"):
            check_scoring(scorer, groups_of_every_kind())

    def test_the_twin_has_a_window_shorter_than_its_rows(self, scorer: Scorer) -> None:
        twin = tiny_clone(scorer.model.config)  # type: ignore[arg-type]
        assert twin is not None
        assert twin.config.sliding_window == 8


def test_the_capability_asked_for_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda d=None: (7, 5) if d is None or d.index == 0 else (9, 0)
    )
    kernels = [attention.kernel_for(torch.device("cuda", n), torch.bfloat16) for n in (0, 1)]
    assert kernels == ["loop", "varlen"]
