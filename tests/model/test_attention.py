"""Attention kernels against attention by definition, and what the hook refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import flash
from model.dense import dense_attention, random_heads, who_sees_whom
from model.oracle import Draw, groups_of_every_kind
from prefopt.data.group import Group
from prefopt.errors import ModelError
from prefopt.model.kernels import flash_cpu
from prefopt.model.kernels.attention import gather_plan, kernel_for, shared_attention
from prefopt.model.kernels.shared import segments_tensor
from prefopt.model.packing import pack

MODULE = torch.nn.Module()
flash.register()
SHAPES = [(3, 3, 64), (6, 2, 80), (5, 1, 96), (4, 2, 128), (2, 2, 256), (7, 7, 8)]


def attend(kernel: str, groups: Sequence[Group], heads: Any, *, compiled: bool = False, **options: Any) -> torch.Tensor:
    """The hook, called as a layer calls it."""
    (row,) = pack(groups).passes
    query, key, value, sinks = heads
    gather = gather_plan(row.segments, query.device) if kernel == "varlen" else None
    more = {"s_aux": sinks} if sinks is not None else {}
    out, weights = shared_attention(
        MODULE,
        query,
        key,
        value,
        None,
        prefix_segments=segments_tensor(row.segments) if compiled else row.segments,
        prefix_kernel=kernel,
        prefix_gather=gather,
        **more,
        **options,
    )
    assert weights is None
    return out


def compare(
    kernel: str, groups: Sequence[Group], heads: Any, *, window: int | None, rtol: float = 1e-11, **options: Any
) -> None:
    """Values, and gradients of everything."""
    query, key, value, sinks = heads
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    visible = who_sees_whom(groups, window)
    expected = dense_attention(query, key, value, visible, scale=scale, softcap=options.get("softcap"), sinks=sinks)
    found = attend(kernel, groups, heads, sliding_window=window, **options)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    leaves = [x for x in heads if x is not None]
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol)
    for got, wanted in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=rtol * max(1.0, float(wanted.abs().max())))


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows cut rows every 5 queries, so that short responses have several tiles too."""
    monkeypatch.setattr(flash_cpu, "WINDOW_ROWS", 5)


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("window", [None, 8], ids=["full", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["flash-cpu", "loop"])
def test_kernels_compute_attention(kernel: str, shape: tuple[int, int, int], window: int | None) -> None:
    groups = groups_of_every_kind()
    heads = random_heads(sum(g.tokens for g in groups), *shape)
    compare(kernel, groups, heads, window=window)


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("kernel", ["flash-cpu", "loop"])
@pytest.mark.parametrize("options", [{"scaling": 0.7}, {"softcap": 1.5}, {"scaling": 0.7, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 8])
def test_kernels_take_what_layers_ask_for(
    kernel: str, options: dict[str, Any], sinks: bool, window: int | None
) -> None:
    groups = groups_of_every_kind()
    heads = random_heads(sum(g.tokens for g in groups), 4, 2, 16, sinks=sinks)
    compare(kernel, groups, heads, window=window, **options)


@pytest.mark.usefixtures("short_tiles")
@settings(max_examples=60)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.integers(2, 20), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    window=st.one_of(st.none(), st.integers(1, 40)),
    sinks=st.booleans(),
)
def test_any_groups_and_any_window(lengths: Any, window: int | None, sinks: bool) -> None:
    draw = Draw()
    groups = [draw.group(prefix, *responses) for prefix, responses in lengths]
    heads = random_heads(sum(g.tokens for g in groups), 4, 2, 8, sinks=sinks)
    compare("flash-cpu", groups, heads, window=window)


@pytest.mark.parametrize("window", [200, 256, 300, 700])
def test_long_rows_cross_the_tiles_as_they_are(window: int) -> None:
    groups = [Draw().group(400, 300, 10), Draw(1).group(20, 600)]
    compare("flash-cpu", groups, random_heads(sum(g.tokens for g in groups), 2, 1, 8), window=window, rtol=1e-10)


@pytest.mark.parametrize("kernel", ["flash-cpu", "loop"])
def test_bfloat16_stays_near_float64(kernel: str) -> None:
    groups = groups_of_every_kind()
    tokens = sum(g.tokens for g in groups)
    low = random_heads(tokens, 6, 2, 32, sinks=True, dtype=torch.bfloat16)
    high = tuple(x.detach().double().requires_grad_() for x in low if x is not None)
    expected = dense_attention(*high[:3], who_sees_whom(groups, 8), scale=32**-0.5, sinks=high[3])
    found = attend(kernel, groups, low, sliding_window=8)
    assert found.dtype == torch.bfloat16
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert float((found - expected).detach().abs().max()) < 0.03
    grads = torch.autograd.grad(found, [x for x in low if x is not None], upstream.bfloat16())
    for got, wanted in zip(grads, torch.autograd.grad(expected, high, upstream), strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("shape", [(4, 4, 8), (6, 2, 8)], ids=str)
def test_variable_length_attention_is_called_as_it_is_documented(
    shape: tuple[int, int, int], sinks: bool, window: int | None
) -> None:
    """The real one needs a GPU (test_gpu.py); this one does what its documentation says, anywhere."""
    groups = groups_of_every_kind()
    heads = random_heads(sum(g.tokens for g in groups), *shape, sinks=sinks)
    before = flash.CALLS["forward"]
    compare("varlen", groups, heads, window=window, scaling=0.3)
    assert flash.CALLS["forward"] == before + 1


@pytest.mark.parametrize("options", [{}, {"scaling": 0.7, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("kernel", ["flash-cpu", "varlen", "loop"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 8])
def test_segments_in_a_tensor_as_compiled_layers_hand_them_over(
    kernel: str, options: dict[str, Any], sinks: bool, window: int | None
) -> None:
    groups = groups_of_every_kind()
    heads = random_heads(sum(g.tokens for g in groups), 4, 2, 16, sinks=sinks)
    compare(kernel, groups, heads, window=window, compiled=True, **options)


@pytest.mark.parametrize("kernel", ["flash-cpu", "varlen", "loop"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_the_operator_is_what_the_compiler_expects(kernel: str, sinks: bool) -> None:
    """Shapes, strides, aliases and gradients as declared, also for symbolic sizes."""
    query, key, value, s_aux = random_heads(12, 4, 2, 8, sinks=sinks)
    row = [x.detach()[0].requires_grad_() for x in (query, key, value)]
    segments = segments_tensor(((0, 5, 0, 0), (5, 9, 0, 3), (9, 12, 0, 3)))
    asked = (*row, s_aux, segments, kernel, 0.5, 4, 2.0 if kernel == "loop" else None)
    torch.library.opcheck(torch.ops.prefopt.attention, asked)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"position_bias": torch.zeros(1)}, "'position_bias'"),
        ({"head_mask": torch.ones(2)}, "'head_mask'"),
        ({"something_new": 3}, "'something_new'"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "mask of its own"),
        ({"is_causal": False}, "not causal"),
        ({"prefix_segments": None}, "does not pass its keyword arguments"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_it_cannot_do_is_refused(given: dict[str, Any], word: str) -> None:
    q, k, v, _ = random_heads(5, 2, 2, 8)
    call = {"attention_mask": None, "prefix_segments": ((0, 5, 0, 0),), "is_causal": True, "position_ids": None}
    shared_attention(MODULE, q, k, v, **call, position_bias=None, use_cache=False)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=word):
        shared_attention(MODULE, q, k, v, **{**call, **given})


def test_a_module_that_is_not_causal_is_refused() -> None:
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    q, k, v, _ = random_heads(5, 2, 2, 8)
    with pytest.raises(ModelError, match="not causal"):
        shared_attention(module, q, k, v, None, prefix_segments=((0, 5, 0, 0),))


def test_the_kernel_is_chosen_by_device() -> None:
    cpu = torch.device("cpu")
    assert kernel_for(cpu, torch.float32) == kernel_for(cpu, torch.bfloat16) == "flash-cpu"
    assert kernel_for(cpu, torch.float32, "loop") == "loop"
    assert kernel_for(torch.device("mps"), torch.float32) == "loop"
    assert kernel_for(torch.device("cuda"), torch.float32) == "loop"
