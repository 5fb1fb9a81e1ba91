"""The path of variable-length flash attention, on the CPU: its kernel is stood in for by plain arithmetic.

What torch's kernel itself computes is for test_gpu.py; here it is what we hand to it and make of its gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import prefopt.generate.packed_linear  # noqa: F401  (its operator)
from model import flash
from model.architectures import SHARED, build
from model.oracle import Draw, assert_same, assert_same_gradients, gradients, groups_of_every_kind
from prefopt.errors import ModelError
from prefopt.model import scorer as scorer_module
from prefopt.model.check import check_scoring, tiny_clone
from prefopt.model.kernels import attention, flex, varlen
from prefopt.model.kernels.attention import gather_plan, shared_attention
from prefopt.model.kernels.gather import gathered, occurrences
from prefopt.model.kernels.shared import segments_tensor
from prefopt.model.kernels.varlen import WIDEST
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer

CPU = torch.device("cpu")
MODULE = torch.nn.Identity()
# A prompt with three responses, and a group of another one after it.
SEGMENTS = ((0, 7, 0, 0), (7, 12, 0, 7), (12, 21, 0, 7), (21, 24, 0, 7), (24, 28, 24, 0), (28, 31, 24, 4))
TOKENS = 31


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The CPU takes the way of CUDA."""
    flash.register()
    flash.CALLS.clear()
    monkeypatch.setattr(flex, "usable", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(
        scorer_module, "kernel_for", lambda device, dtype, wish="auto": "loop" if wish == "loop" else "varlen"
    )
    return monkeypatch


def drawn(heads: int, key_heads: int, width: int, value_width: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((heads, width), (key_heads, width), (key_heads, value_width or width))
    return [torch.randn(1, n, TOKENS, d, dtype=torch.float64, requires_grad=True) for n, d in shapes]


def attended(tensors: list[torch.Tensor], kernel: str, window: int | None = None) -> tuple[torch.Tensor, ...]:
    """Output and gradients."""
    gather = gather_plan(SEGMENTS, CPU) if kernel == "varlen" else None
    options: Any = {"prefix_segments": SEGMENTS, "prefix_kernel": kernel, "prefix_gather": gather}
    out, _ = shared_attention(MODULE, *tensors, None, sliding_window=window, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), tensors)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(
    "shape", [(4, 4, 8), (4, 2, 16), (6, 1, 8), (2, 2, 12), (2, 1, 250), (4, 4, 24, 16), (2, 2, 8, 20)], ids=str
)
def test_the_same_as_the_loop(stand_in: pytest.MonkeyPatch, shape: tuple[int, ...], window: int | None) -> None:
    """Grouped heads, and widths that flash attention takes only padded, with values of another width (latent)."""
    tensors = drawn(*shape)
    for found, wanted in zip(attended(tensors, "varlen", window), attended(tensors, "loop", window), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert flash.CALLS == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("name", SHARED)
def test_every_architecture_gives_the_same_as_by_the_loop(stand_in: pytest.MonkeyPatch, name: str) -> None:
    model = build(name, torch.float64)
    scorers = [Scorer(model, attention=kernel) for kernel in ("loop", "auto")]
    batch = pack(groups_of_every_kind(), scorers[0].layout)
    wanted, found = (scorer(batch) for scorer in scorers)
    assert_same(found, wanted, 1e-12)
    assert_same_gradients(gradients(found, model), gradients(wanted, model), 1e-11)
    layers = 0 if name == "gemma2" else model.config.num_hidden_layers  # which has soft-caps
    assert (flash.CALLS["forward"], flash.CALLS["backward"]) == (layers, layers)


@pytest.mark.parametrize("flag", [True, False])
def test_grouped_heads_are_flagged_where_the_version_of_torch_has_the_flag(
    stand_in: pytest.MonkeyPatch, flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = varlen._forward_arguments()
    asked: list[dict[str, Any]] = []

    def older(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return flash.forward(*arguments, **options)

    monkeypatch.setattr(varlen, "_forward_arguments", lambda: names if flag else names - {"enable_gqa"})
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", older)
    attended(drawn(4, 2, 8), "varlen")
    attended(drawn(4, 4, 8), "varlen")
    assert [options.get("enable_gqa") for options in asked] == ([True, False] if flag else [None, None])


def test_heads_wider_than_flash_attention_takes_go_to_the_loop(stand_in: pytest.MonkeyPatch) -> None:
    tensors = drawn(2, 2, WIDEST + 8)
    for found, wanted in zip(attended(tensors, "varlen"), attended(tensors, "loop"), strict=True):
        assert torch.equal(found, wanted)
    assert not flash.CALLS


@pytest.mark.parametrize("window", [None, 4])
def test_sinks_are_exact(stand_in: pytest.MonkeyPatch, window: int | None) -> None:
    """In float64, against a sink as a column of scores, and against differences of values."""
    sinks = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    tensors = [x.detach()[:, :, :12].clone().requires_grad_() for x in drawn(4, 2, 8)]
    segments = ((0, 5, 0, 0), (5, 9, 0, 3), (9, 12, 0, 3))

    def values(kernel: str, *leaves: torch.Tensor) -> torch.Tensor:
        gather = gather_plan(segments, CPU) if kernel == "varlen" else None
        more: Any = {"prefix_segments": segments, "prefix_kernel": kernel, "prefix_gather": gather}
        return shared_attention(MODULE, *leaves[:3], None, sliding_window=window, s_aux=leaves[3], **more)[0]

    leaves = (*tensors, sinks)
    found, wanted = values("varlen", *leaves), values("loop", *leaves)
    assert flash.CALLS
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: values("varlen", *x), leaves, fast_mode=True)


def test_operators_keep_their_contracts(stand_in: pytest.MonkeyPatch) -> None:
    """Shapes without numbers, schemas and gradients, as torch checks them: of the stand-in, and of all of our own."""
    query, key = (torch.randn(n, heads, 8, requires_grad=True) for n, heads in ((10, 4), (12, 2)))
    ends = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 10], [0, 4, 12])]
    row = [torch.randn(heads, 12, 8) for heads in (4, 2, 2)]
    sinks, out, lse = torch.randn(4), torch.randn(12, 4, 8), torch.full((4, 12), 3.0)
    asked = (segments_tensor(((0, 5, 0, 0), (5, 9, 0, 3), (9, 12, 0, 3))), "varlen", 0.5, 4, None)
    samples = {
        "torch_attn::_varlen_attn": (query, key, key.detach() * 2, *ends, 6, 8, True, 0.3, [-1, 0], True),
        "prefopt::attention": (*(x.clone().requires_grad_() for x in (*row, sinks)), *asked),
        "prefopt::attention_backward": (out * 2, *row, sinks, out, lse, *asked),
    }
    if torch.backends.mkldnn.is_available():
        # Not packed, since a packed weight has no storage that could be looked at; the product takes either.
        samples["prefopt::packed_linear"] = (torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), 6)
    own = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("prefopt::")}
    assert own <= samples.keys(), "an operator without a sample here"
    for name, arguments in samples.items():
        space, _, operator = name.partition("::")
        torch.library.opcheck(getattr(getattr(torch.ops, space), operator).default, arguments)


def test_values_wider_than_keys_are_not_cut() -> None:
    query, key, value = drawn(2, 2, 8)
    wide = torch.cat([value, value * 2], -1)
    out, _ = shared_attention(MODULE, query, key, wide, None, prefix_segments=SEGMENTS)
    half, _ = shared_attention(MODULE, query, key, value, None, prefix_segments=SEGMENTS)
    torch.testing.assert_close(out, torch.cat([half, half * 2], -1))


@pytest.mark.parametrize("responses", [2, 5])
def test_gradients_of_a_prefix_are_added_in_order_and_rounded_once(responses: int) -> None:
    index = torch.cat([torch.arange(6)] * (responses + 1))
    sums = tuple((torch.from_numpy(rows), torch.from_numpy(at)) for rows, at in occurrences(index.numpy()))
    wide = torch.randn(6, 3, requires_grad=True)
    upstream = torch.randn(len(index), 3)
    (plain,) = torch.autograd.grad(wide.index_select(0, index), wide, upstream)
    (ours,) = torch.autograd.grad(gathered(wide, index, sums), wide, upstream)
    assert torch.equal(ours, plain), "in float32 the bits are those of torch on the CPU"
    narrow = wide.detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(gathered(narrow, index, sums), narrow, upstream.bfloat16())
    truth = upstream.bfloat16().float().view(responses + 1, 6, 3).sum(0)
    assert torch.equal(found, truth.bfloat16())


def test_states_read_by_many_responses_get_their_gradients_in_order(stand_in: pytest.MonkeyPatch) -> None:
    """On CUDA. The state at the end of a prompt is read by each of 40 responses; their sum is rounded once."""
    batch = pack([Draw().group(3, *[2] * 40)])
    sums = tuple((torch.from_numpy(rows), torch.from_numpy(at)) for rows, at in occurrences(batch.read.numpy()))
    assert len(sums) == 40
    hidden = torch.randn(batch.tokens, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    upstream = torch.randn(len(batch.read), 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = replace(batch, reads=sums).read_from(hidden)
    assert torch.equal(found, batch.read_from(hidden))
    truth = torch.zeros(batch.tokens, 16).index_add(0, batch.read, upstream.float()).bfloat16()
    assert torch.equal(torch.autograd.grad(found, hidden, upstream)[0], truth)


def test_the_loop_rounds_the_gradient_of_a_prefix_once() -> None:
    """Forty short responses: in bfloat16 a running sum would lose the last of them."""
    segments = ((0, 4, 0, 0), *((n, n + 1, 0, 4) for n in range(4, 44)))
    torch.manual_seed(1)
    tensors = [torch.randn(1, 2, 44, 8).bfloat16().requires_grad_() for _ in range(3)]

    def values(leaves: list[torch.Tensor]) -> torch.Tensor:
        out, _ = shared_attention(MODULE, *leaves, None, prefix_segments=segments)
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
        assert flash.CALLS["backward"]

    def test_stops_a_window_that_is_off(self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(flash.FAULTS, "window", 3)
        with pytest.raises(ModelError, match=r"small copy"):
            check_scoring(scorer, groups_of_every_kind())

    def test_stops_gradients_that_are_wrong_in_narrow_types_alone(
        self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(flash.FAULTS, "gradients", 1.5)
        with pytest.raises(ModelError, match=r"gradients by the fast attention kernel .* give --attention loop"):
            check_scoring(scorer, groups_of_every_kind())

    def test_the_twin_has_a_window_shorter_than_its_rows(self, scorer: Scorer) -> None:
        twin = tiny_clone(scorer.model.config)  # type: ignore[arg-type]
        assert twin is not None
        assert twin.config.sliding_window == 8


def test_a_plan_is_the_same_as_written_segment_by_segment() -> None:
    plan = gather_plan(SEGMENTS, CPU)
    rows = [[*range(o, o + p), *range(a, b)] for a, b, o, p in SEGMENTS]
    assert plan["index"].tolist() == [row for keys in rows for row in keys]
    assert plan["cu_k"].tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    assert plan["cu_q"].tolist() == np.cumsum([0, *(b - a for a, b, _, _ in SEGMENTS)]).tolist()
    assert (plan["max_q"], plan["max_k"]) == (9, 16)


def test_the_capability_asked_for_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda d=None: (7, 5) if d is None or d.index == 0 else (9, 0)
    )
    kernels = [attention.kernel_for(torch.device("cuda", n), torch.bfloat16) for n in (0, 1)]
    assert kernels == ["loop", "varlen"]
