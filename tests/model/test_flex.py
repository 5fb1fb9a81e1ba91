"""FlexAttention for shared prefixes. The CPU has its eager arithmetic, and its compiled forward pass."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from model.dense import dense_attention, random_heads, who_sees_whom
from model.oracle import Draw, groups_of_every_kind
from prefopt.data.group import Group
from prefopt.model.kernels import flex
from prefopt.model.kernels.attention import shared_attention
from prefopt.model.packing import pack

GROUPS = [Draw(3).group(300, 280, 90), Draw(4).group(1, 257, 130, 64), *groups_of_every_kind()]
"""Whole blocks of prompts and of responses, and rows that end within a block."""

TOGETHER = [(None, None, False), (8, 1.5, True), (200, None, True)]
"""Each window, and each of soft-caps and sinks with and without the other."""


@pytest.fixture(autouse=True)
def _unfailed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has failed once in a process it is not asked again: on a CPU it fails wherever gradients are wanted."""
    monkeypatch.setattr(flex, "_failure", [])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, with gradients, which torch offers on no CPU."""
    monkeypatch.setattr(flex, "_attention", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def attended(groups: list[Group], heads: Any, kernel: str, **options: Any) -> torch.Tensor:
    (row,) = pack(groups).passes
    query, key, value, sinks = heads
    more = {} if sinks is None else {"s_aux": sinks}
    out, _ = shared_attention(
        torch.nn.Module(), query, key, value, None,
        prefix_segments=row.segments, prefix_kernel=kernel, **more, **options,
    )  # fmt: skip
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [
        pytest.param(*given, marks=() if given in TOGETHER else pytest.mark.slow)
        for given in itertools.product((None, 8, 200), (None, 1.5), (False, True))
    ],
)
def test_values_and_gradients(window: int | None, softcap: float | None, sinks: bool) -> None:
    heads = random_heads(sum(g.tokens for g in GROUPS), 4, 2, 12, sinks=sinks)
    expected = dense_attention(*heads[:3], who_sees_whom(GROUPS, window), scale=0.4, softcap=softcap, sinks=heads[3])
    found = attended(GROUPS, heads, "flex", sliding_window=window, softcap=softcap, scaling=0.4)
    assert flex.usable()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    leaves = [x for x in heads if x is not None]
    got, wanted = (torch.autograd.grad(out, leaves, upstream) for out in (found, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("window", [None, 8, 200])
def test_blocks_are_those_of_the_mask(window: int | None) -> None:
    """Every visible pair is in a block that is seen, and a block seen whole hides none."""
    (row,) = pack(GROUPS).passes
    visible = who_sees_whom(GROUPS, window)
    size = -(-len(visible) // flex.BLOCK) * flex.BLOCK
    padded = torch.eye(size, dtype=torch.bool)
    padded[: len(visible), : len(visible)] = visible
    blocks = padded.unflatten(0, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK)).transpose(1, 2).flatten(2)
    part, whole = (torch.from_numpy(x) for x in flex.visible_blocks(row.segments, window))
    assert not (part & whole).any()
    assert not (blocks.any(-1) & ~(part | whole)).any()
    assert not (whole & ~blocks.all(-1)).any()
    if window is None:
        assert whole.sum() > 5
        assert torch.equal(part | whole, blocks.any(-1))


def test_it_takes_what_flash_attention_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Size] = []
    monkeypatch.setattr(flex, "attend", lambda query, *_: asked.append(query.shape))
    heads = random_heads(sum(g.tokens for g in GROUPS), 2, 2, 264)  # narrower ones are padded: test_varlen.py
    found = attended(GROUPS, heads, "varlen")
    assert len(asked) == 1
    assert torch.equal(found, attended(GROUPS, heads, "loop"))


def test_a_compiler_that_fails_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(flex, "_attention", lambda: failing)
    heads = random_heads(sum(g.tokens for g in GROUPS), 2, 2, 8)
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        found = [attended(GROUPS, heads, "flex", softcap=2.0) for _ in range(2)]
    assert all(torch.equal(out, attended(GROUPS, heads, "loop", softcap=2.0)) for out in found)
    assert [r.getMessage() for r in caplog.records] == [
        "attention: FlexAttention is not used, plain arithmetic takes its place: no kernel"
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by the compiler itself
def test_compiled_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By inductor. On a CPU it lowers fixed shapes alone; on CUDA one kernel is to serve all rows."""
    import torch._dynamo

    torch._dynamo.reset()
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False)
    monkeypatch.setattr(flex, "_attention", lambda: compiled)
    for groups in (GROUPS, [Draw(7).group(130, 200, 90)]):
        drawn = random_heads(sum(g.tokens for g in groups), 4, 2, 16, dtype=torch.float32)
        heads = [x.detach() for x in drawn[:3] if x is not None]
        found = attended(groups, (*heads, None), "flex", sliding_window=100, softcap=1.5)
        expected = dense_attention(heads[0], heads[1], heads[2], who_sees_whom(groups, 100), scale=0.25, softcap=1.5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert flex.usable()
