"""The key-value cache of a batch of samples, and the attention function that reads and extends it.

Every sample has a row of slots. Prompts are right-aligned, so that the tokens of one step go into the same slot of
every row::

    slot     0  1  2  3 | 4  5 ...
    row 0    a  b  c  d | x  y          4 prompt tokens, position = slot
    row 1    .  .  e  f | z  w          2 prompt tokens, position = slot - 2

Slots left of a prompt are masked. A step writes one slot and attends over all before it; the cache is copied only when
its slots are used up or rows are removed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from prefopt.errors import ModelError
from prefopt.model.kernels.attention import refuse_foreign, shared_attention
from prefopt.model.packing import Segment

HOOK = "prefopt_slots"
"""Not among transformers' mask functions, so that models build no mask."""
GROWTH = 64
"""Slots added at least when they are used up."""
LayerCall = tuple[int, int]
"""An attention module, and the number of its call within a forward pass (from 1): some run several times in one."""
KeysAndValues = tuple[torch.Tensor, torch.Tensor]
"""Of one attention layer, [rows, key heads, slots, D]."""


@dataclass(slots=True)
class Slots:
    """The cache of one batch: ``start`` [rows] is each row's first slot, ``length`` how many are used."""

    start: torch.Tensor
    length: int
    layers: dict[LayerCall, KeysAndValues] = field(default_factory=dict)
    called: Counter[int] = field(default_factory=Counter)
    bias: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        """The position [rows] of the next token."""
        return self.length - self.start

    def call_of(self, module: torch.nn.Module) -> LayerCall:
        """The key of this call of ``module``."""
        self.called[id(module)] += 1
        return id(module), self.called[id(module)]

    def fill(self, layer: LayerCall, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> None:
        """Add prompts as rows: ``index`` [rows, length] selects them from keys and values [heads, T, D]."""
        key, value = key[:, index].transpose(0, 1), value[:, index].transpose(0, 1)
        if (before := self.layers.get(layer)) is not None:
            key, value = torch.cat([before[0], key]), torch.cat([before[1], value])
        self.layers[layer] = key, value

    def extend(self, layer: LayerCall, key: torch.Tensor, value: torch.Tensor) -> KeysAndValues:
        """Write the tokens of this step [rows, heads, D]; returns what they attend to [rows, heads, length + 1, D]."""
        # Nothing was filled in for prompts of one token.
        keys, values = self.layers.get(layer) or (key[:, :, None][:, :, :0], value[:, :, None][:, :, :0])
        if keys.shape[2] <= self.length:
            keys, values = (self._with_room(x[:, :, : self.length]) for x in (keys, values))
            self.layers[layer] = keys, values
        keys[:, :, self.length] = key
        values[:, :, self.length] = value
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def keep(self, index: torch.Tensor) -> None:
        """Keep rows ``index``, in that order; a row may occur several times. Slots that no row uses are dropped."""
        self.start = self.start[index]
        unused = int(self.start.min())
        for layer, kept in self.layers.items():
            key, value = (self._with_room(x[index, :, unused : self.length]) for x in kept)
            self.layers[layer] = key, value
        self.start = self.start - unused
        self.length -= unused
        self.bias = None

    @staticmethod
    def _with_room(x: torch.Tensor) -> torch.Tensor:
        """The same slots followed by free ones."""
        rows, heads, used, width = x.shape
        larger = x.new_empty(rows, heads, used + max(GROWTH, used // 2), width)
        larger[:, :, :used] = x
        return larger

    def hidden(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask [rows, 1, 1, length + 1] of slots before each row's start, to add to scores; None where all start
        at 0."""
        if self.bias is None or self.bias.shape[-1] <= self.length:
            slot = torch.arange(self.length + GROWTH, device=self.start.device)
            before = slot < self.start[:, None]
            zero = torch.zeros(before.shape, dtype=dtype, device=slot.device)
            self.bias = zero.masked_fill_(before, float("-inf"))[:, None, None] if bool(before.any()) else zero[:0]
        return self.bias[..., : self.length + 1] if len(self.bias) else None


@dataclass(slots=True)
class Filling:
    """Arguments of a forward pass over prompts packed end to end: ``segments`` of the row, ``index`` as in
    :meth:`Slots.fill`, ``gather`` for the scorer's variable-length kernel."""

    slots: Slots
    segments: tuple[Segment, ...]
    index: torch.Tensor
    kernel: str
    gather: dict[str, Any] | None


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    slots: Slots | None = None,
    filling: Filling | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: fills slots with prompts, or steps every row by a token. query [1, heads, T or rows, D].

    Returns [1, T or rows, heads, D]. Raises :class:`ModelError` for arguments of a layer that are not supported.
    """
    if filling is not None:
        filling.slots.fill(filling.slots.call_of(module), key[0], value[0], filling.index)
        options |= {"prefix_segments": filling.segments, "prefix_kernel": filling.kernel}
        return shared_attention(module, query, key, value, attention_mask, prefix_gather=filling.gather, **options)
    if slots is None:
        raise ModelError(f"{type(module).__name__} does not pass its keyword arguments to its attention")
    return _step_attention(module, query, key, value, attention_mask, slots, **options), None


def _step_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    slots: Slots,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    refuse_foreign(module, attention_mask, dropout, others)
    seen_key, seen_value = slots.extend(slots.call_of(module), key[0].transpose(0, 1), value[0].transpose(0, 1))
    bias = slots.hidden(query.dtype)
    if sliding_window is not None and seen_key.shape[2] > sliding_window:
        seen_key, seen_value = seen_key[:, :, -sliding_window:], seen_value[:, :, -sliding_window:]
        bias = None if bias is None else bias[..., -sliding_window:]
    rows, heads = query.shape[2], query.shape[1]
    # Queries that share a key head become its rows: [rows, key heads, queries each, D].
    grouped = query[0].transpose(0, 1).unflatten(1, (seen_key.shape[1], -1))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.device.type == "cuda" and softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(grouped, seen_key, seen_value, bias, scale=scale)
        return out.reshape(1, rows, heads, -1)
    # For one query per row, two matrix products beat the CPU's flash kernel. They support caps and sinks.
    scores = (grouped * scale) @ seen_key.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, scores.shape[1], scores.shape[2], 1).expand(len(scores), -1, -1, 1)
        scores = torch.cat([scores, sink], -1)
    chance = torch.softmax(scores, -1)[..., : seen_key.shape[2]].to(seen_value.dtype)
    return (chance @ seen_value).reshape(1, rows, heads, -1)


AttentionInterface.register(HOOK, slot_attention)
