"""One autograd function around every attention kernel, and the operator through which compiled layers call it.

A kernel returns its output and the log-sum-exp of its scores, and its backward takes both. A sink is a key with score
s and value zero, so that any kernel has sinks::

    lse' = logaddexp(lse, s)        out' = out exp(lse - lse')        d s = -exp(s - lse') (grad_out . out')

Given ``out'`` and ``lse'``, the kernel's own backward is exact, since it recomputes probabilities as
``exp(score - lse')``. The log-sum-exp itself is never differentiated: the kernels would drop its gradient.

To the compiler the operator ``prefopt::attention`` is one opaque node. The row's segments reach it as a tensor: as
numbers they would be constants of the graph, and every batch would be recompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from prefopt.model.packing import Segment


class How(NamedTuple):
    """What a layer asks of its attention: the factor of the scores, the sliding window and the soft-cap of scores."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class Kernel(NamedTuple):
    """An attention kernel.

    ``forward(query, key, value, plan, how)``: query [Hq, T, D], key and value [Hk, T, D] to the output [T, Hq, D],
    contiguous, and the log-sum-exp [Hq, T] of scaled and capped scores, float32 or wider.

    ``backward(grad, query, key, value, out, lse, plan, how)``: gradients of query, key and value, given those of the
    output, [T, Hq, D]; ``out`` and ``lse`` may hold more than this kernel's keys.

    ``plan(segments, device)``: what forward and backward read about the row.
    """

    plan: Callable[[tuple[Segment, ...], torch.device], Any]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


KERNELS: dict[str, Kernel] = {}
"""By name; :mod:`prefopt.model.kernels.attention` fills it."""


def attention_by(
    kernel: str, plan: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, how: How
) -> Tensor:
    """Attention of a row with shared prefixes by a kernel of :data:`KERNELS`: query [Hq, T, D], key and value
    [Hk, T, D], sinks [Hq] or none, to [T, Hq, D], differentiable."""
    found = _SharedAttention.apply(query, key, value, sinks, KERNELS[kernel], plan, how)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def compiled_attention(
    kernel: str, segments: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, how: How
) -> Tensor:
    """The same in a compiled layer: ``segments`` are those of :func:`segments_tensor`."""
    out: Tensor = _attention(query, key, value, sinks, segments, kernel, *how)[0]
    return out


def segments_tensor(segments: tuple[Segment, ...]) -> Tensor:
    """Segments as a tensor on the CPU, [4 times their number]: at least four, since sizes of one are constants."""
    return torch.tensor(segments).flatten()


def _forward(
    kernel: Kernel, plan: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, how: How
) -> tuple[Tensor, Tensor]:
    out, lse = kernel.forward(query, key, value, plan, how)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        by_head = out.transpose(0, 1)
        by_head.copy_(by_head.to(lse.dtype) * torch.exp(lse - total)[..., None])
        lse = total
    return out, lse


def _sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    slope = (grad.transpose(0, 1).to(lse.dtype) * out.transpose(0, 1).to(lse.dtype)).sum(-1)
    return -(weight * slope).sum(-1).to(sinks.dtype)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        kernel: Kernel,
        plan: Any,
        how: How,
    ) -> Tensor:
        out, lse = _forward(kernel, plan, query, key, value, sinks, how)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.asked = (kernel, plan, how)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        kernel, plan, how = ctx.asked
        found = kernel.backward(grads[0], query, key, value, out, lse, plan, how)
        wanted = sinks is not None and ctx.needs_input_grad[3]
        return *found, _sink_gradient(grads[0], out, lse, sinks) if wanted else None, None, None, None


def _planned(kernel: str, segments: Tensor, query: Tensor) -> tuple[Kernel, Any]:
    numbers = segments.tolist()
    rows = tuple(zip(*(numbers[n::4] for n in range(4)), strict=True))
    return KERNELS[kernel], KERNELS[kernel].plan(rows, query.device)


_ARGUMENTS = "Tensor segments, str kernel, float scale, int? window, float? softcap"


@torch.library.custom_op(
    "prefopt::attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor? sinks, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    segments: Tensor,
    kernel: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return _forward(*_planned(kernel, segments, query), query, key, value, sinks, How(scale, window, softcap))


@_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    heads, tokens, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(tokens, heads, width), query.new_empty(heads, tokens, dtype=wide)


@torch.library.custom_op(
    "prefopt::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor out, Tensor lse,"
        f" {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    kernel: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by, plan = _planned(kernel, segments, query)
    found = by.backward(grad, query, key, value, out, lse, plan, How(scale, window, softcap))
    of_sinks = query.new_empty(0) if sinks is None else _sink_gradient(grad, out, lse, sinks)
    grad_q, grad_k, grad_v = (x.contiguous() for x in found)
    return grad_q, grad_k, grad_v, of_sinks


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), of_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.asked = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, segments, out, lse = ctx.saved_tensors
    found = _attention_backward(grad, query, key, value, sinks, out, lse, segments, *ctx.asked)
    return *found[:3], None if sinks is None else found[3], *(None,) * 5


_attention.register_autograd(_differentiate, setup_context=_save)
