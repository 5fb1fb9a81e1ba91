"""Attention over shared prefixes for any transformers model, through its attention hook.

The hook receives the packed row's queries, keys and values [1, heads, T, D] and the segments of
:mod:`prefopt.model.packing`. These kernels compute the same, with windows and sinks:

``flash-cpu``   tiles of torch's CPU flash attention merged by their log-sum-exp, without copying keys
``varlen``      variable-length flash attention on CUDA, keys and values gathered per segment, one call per layer
``flex``        FlexAttention on CUDA, where flash attention refuses: soft-caps, wider heads
``loop``        scaled dot-product attention or plain arithmetic, segment by segment: any device, soft-caps too. In a
                compiled layer, where segments are no constants, :mod:`prefopt.model.kernels.plain` takes its place
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from prefopt.data.table import ranges
from prefopt.errors import ModelError
from prefopt.model.kernels import flash_cpu, flex, plain, varlen
from prefopt.model.kernels.blocks import PictureBlocks, with_blocks
from prefopt.model.kernels.device import kind_of
from prefopt.model.kernels.gather import occurrences
from prefopt.model.kernels.plain import visible_keys
from prefopt.model.kernels.shared import KERNELS, How, Kernel, attention_by, compiled_attention
from prefopt.model.kernels.varlen import WIDEST, has_varlen, padded_width
from prefopt.model.packing import Segment
from prefopt.transfer import on_device

# An unregistered mask function makes transformers build no [T, T] mask at all; the name must not contain "flash".
HOOK = "prefopt_shared"

TRIAL = "trial"
"""In place of a kernel: only test whether a layer's attention is supported; see :class:`HookReached`."""

# Arguments of attention functions that do not change the result.
_HARMLESS = frozenset(
    "position_ids cache_position output_attentions output_hidden_states output_router_logits use_cache"
    " num_items_in_batch position_embeddings is_causal cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k"
    " layer_idx logits_to_keep".split()
)


class UnshareableError(ModelError):
    """A layer needs attention that shared prefixes do not support; separate scoring is exact."""


class NotCausalError(ModelError):
    """A layer lets tokens see what comes after them."""


class HookReached(Exception):
    """The hook supports the attention of a layer."""


def kernel_for(device: torch.device, dtype: torch.dtype, preference: str = "auto") -> str:
    """The kernel for ``device`` and ``dtype``; ``preference`` ``loop`` forces the plain one."""
    if preference == "loop":
        return "loop"
    if kind_of(device) == "cpu":
        return "flash-cpu"
    if kind_of(device) != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "loop"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "loop"
    return "varlen" if has_varlen() else "flex"


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_segments: tuple[Segment, ...] | Tensor | None = None,
    prefix_kernel: str = "loop",
    prefix_gather: dict[str, Any] | None = None,
    prefix_blocks: PictureBlocks | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The hook. Returns [1, T, heads, D] and no weights. In a compiled layer ``prefix_segments`` is a tensor, see
    :func:`prefopt.model.kernels.shared.segments_tensor`. Tokens of a block of ``prefix_blocks`` see each other. Raises
    :class:`NotCausalError`, and :class:`UnshareableError` for arguments that would otherwise be ignored."""
    if prefix_segments is None:
        raise UnshareableError(f"{type(module).__name__} does not pass its keyword arguments to its attention")
    refuse_foreign(module, attention_mask, dropout, others)
    if prefix_kernel == TRIAL:
        raise HookReached
    width, scale = value.shape[-1], scaling if scaling is not None else query.shape[-1] ** -0.5
    both = max(width, key.shape[-1])  # multi-head latent attention: pad the narrower, cut the result
    if softcap is not None or (prefix_kernel == "varlen" and both > WIDEST):
        prefix_kernel = "flex" if prefix_kernel in ("varlen", "flex") else "loop"
    if prefix_kernel == "varlen":
        both = padded_width(both)
    query, key, value = (x if x.shape[-1] == both else F.pad(x, (0, both - x.shape[-1])) for x in (query, key, value))
    how, row = How(scale, sliding_window, softcap), (query[0], key[0], value[0], s_aux)
    out: Tensor | None = None
    if isinstance(prefix_segments, Tensor):
        kernel = "loop" if prefix_kernel == "flex" else prefix_kernel
        out = compiled_attention(kernel, prefix_segments, *row, how)[None]
    elif prefix_kernel == "flex" and query.is_meta:  # memory is counted; both kernels keep the same
        out = attention_by("loop", prefix_segments, *row, how)[None]
    elif prefix_kernel == "flex" and flex.usable():
        out = flex.attend(query, key, value, flex.flex_plan(prefix_segments, query.device), how, s_aux)
    elif prefix_kernel in ("varlen", "flash-cpu"):
        plan = prefix_gather if prefix_kernel == "varlen" else prefix_segments
        out = attention_by(prefix_kernel, plan, *row, how)[None]
    if out is None:
        assert not isinstance(prefix_segments, Tensor)
        out = _loop(query, key, value, prefix_segments, scale, sliding_window, softcap, s_aux)
    if prefix_blocks is not None:
        if s_aux is not None:
            raise UnshareableError(f"{type(module).__name__} has sinks, and image tokens that see each other")
        out = with_blocks(out, query, key, value, prefix_blocks, how)
    return out[..., :width].contiguous(), None  # AFMoE and JetMoE take views of it


AttentionInterface.register(HOOK, shared_attention)


def refuse_foreign(module: torch.nn.Module, mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    """Raise :class:`UnshareableError` for arguments of a layer that our kernels would ignore."""
    name = type(module).__name__
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise NotCausalError(f"{name} is not causal: tokens see what comes after them; prefopt takes causal models")
    if mask is not None:
        raise UnshareableError(f"{name} brings an attention mask of its own")
    if dropout:
        raise ModelError(f"{name} asks for attention dropout {dropout}; shared prefixes need it to be zero")
    for option, given in others.items():
        if given is not None and given is not False and option not in _HARMLESS:
            raise UnshareableError(f"{name} asks its attention for '{option}', which shared prefixes do not support")


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    dtype = query.dtype
    # Gradients of a prefix are summed over its segments in float32 and rounded once.
    key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (key, value))
    parts = []
    for start, stop, origin, prefix in segments:
        q = query[:, :, start:stop]
        k, v = (_keys(x, start, stop, origin, prefix).to(dtype).repeat_interleave(repeat, 1) for x in (key, value))
        rows, columns = stop - start, stop - start + prefix
        visible = visible_keys(rows, columns, window, q.device)
        if softcap is None and sinks is None:
            parts.append(F.scaled_dot_product_attention(q, k, v, visible, scale=scale))
            continue
        scores = (q @ k.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~visible, float("-inf")).to(torch.promote_types(q.dtype, torch.float32))
        if sinks is not None:
            column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, rows, 1)
            scores = torch.cat([scores, column], -1)
        parts.append(torch.softmax(scores, -1)[..., :columns].to(v.dtype) @ v)
    return torch.cat(parts, 2).transpose(1, 2)


def _keys(x: Tensor, start: int, stop: int, origin: int, prefix: int) -> Tensor:
    own = x[:, :, start:stop]
    return torch.cat([x[:, :, origin : origin + prefix], own], 2) if prefix else own


def gather_plan(segments: tuple[Segment, ...], device: torch.device) -> dict[str, Any]:
    """Arguments of ``varlen``, made once per pass: the row of every segment's keys, the sums of their gradients, and
    both cumulative lengths."""
    start, stop, origin, prefix = np.array(segments, np.int64).T
    queries, keys = stop - start, stop - start + prefix
    runs, lengths = (np.stack(pair, 1).ravel() for pair in ((origin, start), (prefix, queries)))
    index = ranges(runs, lengths, np.arange(len(runs)))
    ends = [np.concatenate([[0], np.cumsum(many)]).astype(np.int32) for many in (queries, keys)]
    sums = occurrences(index)
    moved, cu_q, cu_k, *pairs = on_device([index, *ends, *(x for pair in sums for x in pair)], device)
    return {
        "index": moved,
        "sums": tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        "cu_q": cu_q,
        "cu_k": cu_k,
        "max_q": int(queries.max()),
        "max_k": int(keys.max()),
    }


def _segments(segments: tuple[Segment, ...], _: torch.device) -> tuple[Segment, ...]:
    return segments


KERNELS["flash-cpu"] = Kernel(_segments, flash_cpu.forward, flash_cpu.backward)
KERNELS["loop"] = Kernel(_segments, plain.forward, plain.backward)
# Each layer of a compiled model asks for the same plan, forward and backward.
KERNELS["varlen"] = Kernel(lru_cache(maxsize=4)(gather_plan), varlen.forward, varlen.backward)
