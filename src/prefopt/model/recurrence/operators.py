"""The functions by which transformers' recurrent layers mix tokens, for rows with shared prefixes.

Each has the name and the arguments of the function in transformers' files that it stands in for (there they are kernels
of causal-conv1d, flash-linear-attention and mamba-ssm, with the same in torch). States are float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.model.kernels.attention import UnshareableError
from prefopt.model.recurrence import delta
from prefopt.model.recurrence.conv import packed_conv
from prefopt.model.recurrence.row import Segments
from prefopt.model.recurrence.ssm import selective_scan, state_space_dual

Operator = Callable[..., Any]


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def operators(segments: Segments, own: dict[str, Any]) -> dict[str, Operator]:
    """The functions for a row, by name. ``own``: the globals of the file of the layer's class."""

    def causal_conv1d_fn(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **others: Any
    ) -> Tensor:
        _refuse_states(others)

        def conv(x: Tensor) -> Tensor:
            found: Tensor = own["causal_conv1d_fn"](x, weight, bias, activation=activation)
            return found

        return packed_conv(conv, hidden_states, weight.shape[-1], segments)

    def delta_like(name: str) -> Operator:
        return lambda *args, **options: _delta(own[name], segments, *args, **options)

    return {
        "causal_conv1d_fn": causal_conv1d_fn,
        "torch_chunk_gated_delta_rule": delta_like("torch_chunk_gated_delta_rule"),
        "chunk_kimi_delta_attention": delta_like("chunk_kimi_delta_attention"),
        "mamba2_chunk_scan": lambda *args, **options: _chunk_scan(segments, *args, **options),
        "mamba_selective_scan": lambda *args, **options: _selective_scan(segments, *args, **options),
        # Kernels of a whole layer, which know no states to start from: without them the layer goes step by step.
        "mamba2_split_conv1d_scan_combined": lambda *_, **__: None,
        "mamba_inner_fn": lambda *_, **__: None,
    }


def _delta(
    own: Operator,
    segments: Segments,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """Gated delta rules: queries and keys [1, T, Hk, K], values [1, T, H, V], beta [1, T, H] and the log of decays
    [1, T, H], or [1, T, H, K] for each channel, to [1, T, H, V]."""
    _refuse_states(others)
    if delta.has_kernels(query.device, query.dtype):
        norm = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return delta.delta_rule_by(own, (query, key, value, g, beta), segments, **norm), None
    repeat = value.shape[2] // key.shape[2]
    q, k = (wide(x[0]).repeat_interleave(repeat, 1) if repeat > 1 else wide(x[0]) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    v, decay, strength = (wide(x[0]) for x in (value, g, beta))
    found = delta.delta_rule(q * q.shape[-1] ** -0.5, k, v, decay, strength, segments)
    return found.to(query.dtype)[None], None


def _chunk_scan(
    segments: Segments,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> Tensor:
    """Mamba 2: x [1, T, H, P], dt [1, T, H], A [H], B and C [1, T, groups, N] to [1, T, H, P]."""
    _refuse_states(others)
    dt = dt + dt_bias.to(dt.dtype) if dt_bias is not None else dt
    dt = wide((F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit))[0]
    x, b, c = (wide(v[0]) for v in (hidden_states, B, C))
    y = state_space_dual(x * dt[..., None], dt * A, b, c, segments)
    return (y if D is None else y + D[:, None] * x)[None]


def _selective_scan(
    segments: Segments,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **others: Any,
) -> Tensor:
    """Mamba: x, dt and z [1, D, T], A [D, N], B and C [1, N, T] to [1, D, T]."""
    _refuse_states(others)
    dt = dt + delta_bias.to(dt.dtype)[:, None] if delta_bias is not None else dt
    dt = F.softplus(dt) if delta_softplus else dt
    x, steps, b, c = (wide(v[0]).transpose(0, 1) for v in (hidden_states, dt, B, C))
    y = selective_scan(x, steps, A, b, c, segments).transpose(0, 1)[None]
    y = y if D is None else y + hidden_states * D[:, None]
    return y if z is None else y * F.silu(z)


_STATES = "initial_state initial_states output_final_state return_final_states return_last_state seq_idx cu_seqlens z"


def _refuse_states(others: dict[str, Any]) -> None:
    """Raise :class:`UnshareableError` for arguments that would change the result and are not read."""
    for name in _STATES.split():
        if others.get(name) is not None and others[name] is not False:
            raise UnshareableError(f"a recurrent layer asks for '{name}', which shared prefixes do not support")
