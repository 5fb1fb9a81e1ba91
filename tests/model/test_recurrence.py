"""Recurrences over packed rows against a loop over the tokens of one sequence at a time: values and gradients."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.oracle import Draw
from prefopt.model.packing import Segment, pack
from prefopt.model.recurrence import delta
from prefopt.model.recurrence import row as rows
from prefopt.model.recurrence.conv import packed_conv
from prefopt.model.recurrence.delta import CHANNEL_CHUNK, CHUNK, delta_rule
from prefopt.model.recurrence.operators import operators
from prefopt.model.recurrence.row import Piece, chunk_tree, pieces_of, tails_of
from prefopt.model.recurrence.ssm import STEPS, linear_recurrence, selective_scan, state_space_dual

Shape = tuple[int, tuple[int, ...]]
CPU = torch.device("cpu")


def segments_of(*groups: Shape) -> tuple[Segment, ...]:
    """Segments of a row of groups, by the lengths of their prompts and responses."""
    draw = Draw()
    return pack([draw.group(prefix, *responses) for prefix, responses in groups]).passes[0].segments


def edges(size: int) -> dict[str, tuple[Shape, ...]]:
    """Prompts of none, one, and around the end of a chunk, with responses likewise."""
    return {
        "none": ((0, (3, size + 1)),),
        "one": ((1, (1, 2, 3)),),
        "one short of a chunk": ((size - 1, (1, size, 2)),),
        "a chunk": ((size, (size - 1, 1)),),
        "one over a chunk": ((size + 1, (2, size + 1)),),
        "several": ((2 * size + 3, (size + 2, 3, 1, 5)), (4, (2,)), (0, (3, 2)), (3, (2, 2))),
    }


def sequences(segments: tuple[Segment, ...]) -> list[Tensor]:
    """Indices of every whole sequence in the row."""
    return [torch.cat([torch.arange(o, o + p), torch.arange(a, b)]) for a, b, o, p in segments]


def one_by_one(segments: tuple[Segment, ...], compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The oracle: ``compute`` of each sequence by itself. A token of a prompt is taken from the first that has it."""
    out: dict[int, Tensor] = {}
    for index in sequences(segments):
        found = compute(*(x[index] for x in inputs))
        for place, value in zip(index.tolist(), found, strict=True):
            out.setdefault(place, value)
    return torch.stack([out[n] for n in range(len(out))])


def compare(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], segments: Any, tolerance: float) -> None:
    """Values, and gradients of a random sum over what is read of every response."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(found)
    leaves = [x for x in inputs if x.requires_grad]
    pairs = zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    )
    for got, wanted in pairs:
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_dual(x: Tensor, decay: Tensor, key: Tensor, query: Tensor) -> Tensor:
    heads = x.shape[1] // key.shape[1]
    key, query = (v.repeat_interleave(heads, 1) for v in (key, query))
    state, out = x.new_zeros(x.shape[1], key.shape[2], x.shape[2]), []
    for t in range(len(x)):
        state = state * decay[t].exp()[:, None, None] + key[t][:, :, None] * x[t][:, None]
        out.append((query[t][:, :, None] * state).sum(1))
    return torch.stack(out)


def loop_scan(x: Tensor, dt: Tensor, key: Tensor, query: Tensor, *, a: Tensor) -> Tensor:
    state, out = x.new_zeros(x.shape[1], key.shape[1]), []
    for t in range(len(x)):
        state = (dt[t][:, None] * a).exp() * state + (dt[t] * x[t])[:, None] * key[t]
        out.append(state @ query[t])
    return torch.stack(out)


def loop_linear(gate: Tensor, x: Tensor) -> Tensor:
    state, out = x.new_zeros(x.shape[1]), []
    for t in range(len(x)):
        state = gate[t] * state + x[t]
        out.append(state)
    return torch.stack(out)


def loop_delta(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    state, out = query.new_zeros(query.shape[1], key.shape[2], value.shape[2]), []
    for t in range(len(query)):
        state = state * (decay[t] if decay.dim() == 3 else decay[t][:, None]).exp()[..., None]
        written = beta[t][:, None] * (value[t] - (key[t][..., None] * state).sum(1))
        state = state + key[t][..., None] * written[:, None]
        out.append((query[t][..., None] * state).sum(1))
    return torch.stack(out)


def leaves(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.requires_grad_() for x in given)


@pytest.mark.parametrize("edge", edges(64))
@pytest.mark.parametrize("groups", [1, 2])
def test_state_space_dual(groups: int, edge: str) -> None:
    segments = segments_of(*edges(64)[edge])
    tokens = max(s[1] for s in segments)
    inputs = leaves(
        normal(tokens, 4, 3, seed=0),
        -normal(tokens, 4, seed=1).abs() * 0.3,
        normal(tokens, groups, 2, seed=2),
        normal(tokens, groups, 2, seed=3),
    )
    found = state_space_dual(*inputs, segments)
    compare(found, one_by_one(segments, loop_dual, *inputs), inputs, segments, 1e-11)


@pytest.mark.parametrize("edge", edges(STEPS))
def test_selective_scan(edge: str) -> None:
    segments = segments_of(*edges(STEPS)[edge])
    tokens = max(s[1] for s in segments)
    (a,) = leaves(-normal(3, 2, seed=9).abs())
    inputs = leaves(
        normal(tokens, 3, seed=0),
        normal(tokens, 3, seed=1).abs() * 0.5,
        normal(tokens, 2, seed=2),
        normal(tokens, 2, seed=3),
    )
    x, dt, key, query = inputs
    found = selective_scan(x, dt, a, key, query, segments)
    expected = one_by_one(segments, lambda *given: loop_scan(*given, a=a), *inputs)
    compare(found, expected, (*inputs, a), segments, 1e-11)


@pytest.mark.parametrize("edge", edges(STEPS))
def test_linear_recurrence_with_gates_that_are_zero(edge: str) -> None:
    segments = segments_of(*edges(STEPS)[edge])
    tokens = max(s[1] for s in segments)
    gate = normal(tokens, 3, seed=0).sigmoid()
    gate[::5] = 0
    inputs = leaves(gate, normal(tokens, 3, seed=1))
    compare(linear_recurrence(*inputs, segments), one_by_one(segments, loop_linear, *inputs), inputs, segments, 1e-12)


@pytest.mark.parametrize("edge", edges(CHUNK))
@pytest.mark.parametrize("by_channel", [False, True], ids=["head", "channel"])
def test_delta_rule(by_channel: bool, edge: str) -> None:
    segments = segments_of(*edges(CHANNEL_CHUNK if by_channel else CHUNK)[edge])
    tokens = max(s[1] for s in segments)
    decay = -normal(*((tokens, 2, 3) if by_channel else (tokens, 2)), seed=3).abs() * 0.2
    inputs = leaves(
        normal(tokens, 2, 3, seed=0),
        torch.nn.functional.normalize(normal(tokens, 2, 3, seed=1), dim=-1),
        normal(tokens, 2, 4, seed=2),
        decay,
        normal(tokens, 2, seed=4).sigmoid(),
    )
    compare(delta_rule(*inputs, segments), one_by_one(segments, loop_delta, *inputs), inputs, segments, 1e-10)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution_sees_the_end_of_its_prompt(width: int, prefix: int) -> None:
    segments = segments_of((prefix, (4, 2, 3) if prefix == 0 else (4, 1, 2)), (5, (2, 3)), (0, (2, 3)))
    tokens = max(s[1] for s in segments)
    x, weight = leaves(normal(tokens, 3, seed=0), normal(3, width, seed=1))

    def conv(row: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(row, weight[:, None], padding=width - 1, groups=3)[..., : row.shape[-1]]

    found = packed_conv(conv, x.T[None], width, segments)[0].T
    expected = one_by_one(segments, lambda x: conv(x.T[None])[0].T, x)
    compare(found, expected, (x, weight), segments, 1e-12)


def test_a_row_of_one_sequence_is_convolved_as_it_is() -> None:
    assert tails_of(segments_of((3, (4,))), 4, CPU) is None
    assert tails_of(segments_of((3, (4, 2))), 4, CPU) is not None
    assert tails_of(segments_of((3, (4,)), (2, (1,))), 4, CPU) is not None


def test_prompts_are_computed_once_and_chunks_of_one_depth_together() -> None:
    segments = segments_of((70, (10, 65, 3)), (5, (2,)))
    assert pieces_of(segments) == (
        Piece(0, 70, -1),
        Piece(70, 80, 0),
        Piece(80, 145, 0),
        Piece(145, 148, 0),
        Piece(148, 155, -1),  # nothing forks from the second prompt
    )
    tree = chunk_tree(segments, 64, CPU)
    assert [level.stop - level.start for level in tree.levels] == [2, 1, 3, 1]
    assert len(tree.slot_T.unique()) == 155
    assert tree.levels[2].parent is not None
    assert tree.levels[2].parent.tolist() == [0, 0, 0], "three responses start from one state"


def test_prefixes_of_two_lengths_may_start_at_one_place() -> None:
    segments: tuple[Segment, ...] = ((0, 6, 0, 0), (6, 8, 0, 2), (8, 9, 0, 4))
    assert pieces_of(segments) == (Piece(0, 2, -1), Piece(2, 4, 0), Piece(4, 6, 1), Piece(6, 8, 0), Piece(8, 9, 1))
    inputs = leaves(normal(9, 3, seed=0).sigmoid(), normal(9, 3, seed=1))
    compare(linear_recurrence(*inputs, segments), one_by_one(segments, loop_linear, *inputs), inputs, segments, 1e-12)


def test_gradients_of_copied_tokens_are_rounded_once() -> None:
    """Five responses copy the last token of their prompt: in bfloat16, sums of their gradients would be rounded."""
    segments = segments_of((2, (1, 1, 1, 1, 1, 1)))
    tails = tails_of(segments, 2, CPU)
    assert tails is not None
    x = torch.zeros(max(s[1] for s in segments), 1, dtype=torch.bfloat16, requires_grad=True)
    longer = rows.repeat_tails(x, tails)
    grad = torch.full_like(longer, 0.00390625)
    grad[tails.keep_T[1]] = 1.0
    (found,) = torch.autograd.grad(longer, x, grad)
    assert float(found[1]) == float(torch.tensor(1 + 5 * 0.00390625).bfloat16())
    assert float(found[1]) > 1.0


@pytest.mark.parametrize("file", ["qwen3_next", "bailing_hybrid"])
def test_kernels_that_know_states_and_lengths_are_given_prompts_first(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for flash-linear-attention: transformers' own function in torch, sequence by sequence."""
    there = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    name = "torch_chunk_gated_delta_rule" if file == "qwen3_next" else "chunk_kimi_delta_attention"
    plain = inspect.unwrap(getattr(there, name))
    lengths: list[list[int]] = []

    def kernel(*qkv: Tensor, g: Tensor, beta: Tensor, initial_state: Any, cu_seqlens: Tensor, **options: Any) -> Any:
        assert cu_seqlens.dtype == torch.int32
        bounds = list(itertools.pairwise(cu_seqlens.tolist()))
        lengths.append([b - a for a, b in bounds])
        found = [
            plain(
                *(x[:, a:b] for x in qkv),
                g=g[:, a:b],
                beta=beta[:, a:b],
                initial_state=None if initial_state is None else initial_state[n : n + 1],
                **options,
            )
            for n, (a, b) in enumerate(bounds)
        ]
        states = torch.cat([s for _, s in found]) if options["output_final_state"] else None
        return torch.cat([y for y, _ in found], 1), states

    segments = segments_of((20, (5, 9, 3)), (4, (2,)), (0, (3, 2)), (17, (2, 6)))
    tokens, heads = max(s[1] for s in segments), 2
    decay = -normal(*((1, tokens, heads, 4) if file != "qwen3_next" else (1, tokens, heads)), seed=3).abs() * 0.2
    inputs = leaves(
        normal(1, tokens, heads, 4, seed=0),
        normal(1, tokens, heads, 4, seed=1),
        normal(1, tokens, heads, 3, seed=2),
        decay,
        normal(1, tokens, heads, seed=4).sigmoid(),
    )
    query, key, value, g, beta = inputs
    results = []
    for there_are in (True, False):
        monkeypatch.setattr(delta, "has_kernels", lambda *_, there_are=there_are: there_are)
        run = operators(segments, {name: kernel})[name]
        results.append(run(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0])
    assert lengths == [[20, 6, 3, 2, 17], [5, 9, 3, 2, 6]]
    compare(results[0], results[1], inputs, segments, 1e-5)  # transformers computes in float32
