"""The key-value cache of a batch of samples, and the attention function that reads and extends it.

Every sample has a row of slots. Sequences are right-aligned, so that the tokens of one step go into the same slot of
every row, whatever their positions::

    slot     0  1  2  3 | 4  5 ...
    row 0    a  b  c  d | x  y          4 prompt tokens, position = slot
    row 1    .  .  e  f | z  w          2 prompt tokens, position = slot - 2
    row 1    .  .  .  .   g  h | v      its sample has ended: another prompt takes its place, position = slot - 4

Slots left of a sequence are masked. A step writes one slot and attends over all before it. The cache is copied only
when its slots are used up or rows are removed; then slots that no row uses any more are dropped. The host knows where
every row starts and how many slots are used: no step waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from prefopt.data.table import IndexArray
from prefopt.errors import ModelError
from prefopt.model.kernels.attention import refuse_foreign, shared_attention
from prefopt.model.packing import Segment

HOOK = "prefopt_slots"
"""Not among transformers' mask functions, so that models build no mask."""
GROWTH = 64
"""Slots added at least when they are used up."""
PARTS, PART_ROWS, PART_SAVES, PART_COST = 4, 8, 0.15, 256
"""Blocks of rows that attend separately: at most so many, of so many rows at least, where it saves this fraction, and
for each further block so many slots of all rows together, since its calls take time."""
LayerCall = tuple[int, int]
"""An attention module, and the number of its call within a forward pass (from 1): some run several times in one."""
KeysAndValues = tuple[torch.Tensor, torch.Tensor]
"""Of one attention layer, [rows, key heads, slots, D]."""


class StepCache(NamedTuple):
    """What one compiled layer reads and extends in a step: ``keys`` and ``values`` [rows, key heads, slots, D] with the
    step's slot, which is ``last`` [1]; ``start_R`` [rows] is each row's first slot. All are tensors, so that a graph
    depends on no number of them."""

    keys: torch.Tensor
    values: torch.Tensor
    start_R: torch.Tensor
    last: torch.Tensor


@dataclass(slots=True)
class Slots:
    """The cache of one batch: ``start`` [rows] is each row's first slot, ``length`` how many are used, ``shift`` [rows]
    how far positions are ahead of slots (a picture has more tokens than positions, so below 0 then). Rows that start
    near one another should stand side by side (:meth:`parts`)."""

    start: IndexArray
    device: torch.device
    length: int = 0
    layers: dict[LayerCall, KeysAndValues] = field(default_factory=dict)
    called: Counter[int] = field(default_factory=Counter)
    shift: IndexArray = field(init=False)
    _start: torch.Tensor | None = None
    _first: torch.Tensor | None = None
    _attentions: dict[int, LayerCall | None] = field(default_factory=dict)
    _bias: torch.Tensor | None = None
    _parts: list[tuple[slice, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shift = np.zeros(len(self.start), np.int64)

    @property
    def positions(self) -> torch.Tensor:
        """The position [rows] of the next token, on the device."""
        if self._start is None:
            self._start = torch.from_numpy(self.start - self.shift).to(self.device)
        return self.length - self._start

    def call_of(self, module: torch.nn.Module) -> LayerCall:
        """The key of this call of ``module``."""
        self.called[id(module)] += 1
        return id(module), self.called[id(module)]

    def place(self, rows: Sequence[int], lengths: IndexArray) -> None:
        """Sequences of these lengths take the place of what ``rows`` hold; :meth:`fill` brings their tokens, and
        :meth:`shifted` their positions where those are not 0, 1, 2, ..."""
        if (more := int(lengths.max()) - self.length) > 0:
            self.start += more
            self.length += more
            self._copy_layers(slice(None), 0, more)
        self.start[list(rows)] = self.length - lengths
        self.shift[list(rows)] = 0
        self._moved()

    def shifted(self, rows: Sequence[int], shift: int) -> None:
        """The next positions of placed sequences are their lengths plus ``shift``."""
        self.shift[list(rows)] = shift
        self._moved()

    def fill(
        self, layer: LayerCall, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, at: torch.Tensor
    ) -> None:
        """Write placed sequences into ``rows`` [n]: ``at`` [n, longest] selects the tokens of their last slots from
        keys and values [heads, T, D]."""
        if layer not in self.layers:
            room = self.length + GROWTH
            shapes = ((x, (len(self.start), len(x), room, x.shape[-1])) for x in (key, value))
            empty = (x.new_zeros(shape, dtype=cache_dtype(x.dtype, x.device)) for x, shape in shapes)
            self.layers[layer] = next(empty), next(empty)
        first = self.length - at.shape[1]
        for kept, new in zip(self.layers[layer], (key, value), strict=True):
            kept[rows, :, first : self.length] = new[:, at].transpose(0, 1).to(kept.dtype)

    def extend(self, layer: LayerCall, key: torch.Tensor, value: torch.Tensor) -> KeysAndValues:
        """Write the tokens of this step [rows, heads, D]; returns what they attend to [rows, heads, length + 1, D]."""
        keys, values = self.layers[layer]
        keys[:, :, self.length] = key
        values[:, :, self.length] = value
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def of_layer(self, layer: torch.nn.Module) -> StepCache | None:
        """What a compiled ``layer`` of the model needs in this step; None where it runs uncompiled: on other devices
        than the CPU, for one row (a graph of its own), and where a layer attends several times."""
        if self.device.type != "cpu" or len(self.start) < 2:
            return None
        if id(layer) not in self._attentions:
            inside = {id(module) for module in layer.modules()}
            calls = [call for call in self.layers if call[0] in inside]
            self._attentions[id(layer)] = calls[0] if len(calls) == 1 else None
        call = self._attentions[id(layer)]
        if call is None:
            return None
        if self._first is None:
            self._first = torch.from_numpy(self.start.copy())
        keys, values = (x[:, :, : self.length + 1] for x in self.layers[call])
        return StepCache(keys, values, self._first, torch.tensor([self.length]))

    def make_room(self) -> None:
        """Make sure of a free slot; sequences may move."""
        if self.layers and self.length >= next(iter(self.layers.values()))[0].shape[2]:
            self._drop_unused(slice(None))

    def retire(self, rows: IndexArray) -> None:
        """What ``rows`` hold has ended: they count as empty, and may be stepped until others take their place."""
        self.start[rows] = self.length
        self._moved()

    def keep(self, index: torch.Tensor) -> None:
        """Keep rows ``index`` (on the CPU), in that order; a row may occur several times."""
        self.start, self.shift = self.start[index.numpy()], self.shift[index.numpy()]
        self._drop_unused(index.to(self.device))

    def _drop_unused(self, index: torch.Tensor | slice) -> None:
        unused = min(int(self.start.min()), self.length)
        self._copy_layers(index, unused, 0)
        self.start = self.start - unused
        self.length -= unused
        self._moved()

    def _copy_layers(self, index: torch.Tensor | slice, first: int, before: int) -> None:
        """Rows ``index`` from slot ``first`` on, after ``before`` empty slots and followed by free ones."""
        used = self.length - before
        for layer, (key, value) in self.layers.items():
            moved = (_with_room(x[index, :, first:used], before) for x in (key, value))
            self.layers[layer] = next(moved), next(moved)

    def _moved(self) -> None:
        self._start = self._first = self._bias = None
        self._parts.clear()

    def parts(self) -> list[tuple[slice, int]]:
        """Blocks of rows with the first slot that any row of them uses: where long sequences stand beside short ones,
        the short ones need not be masked over the length of the long ones. On the CPU alone."""
        if not self._parts:
            rows = len(self.start)
            size = max(PART_ROWS, -(-rows // PARTS)) if self.device.type == "cpu" else rows
            blocks = [slice(n, min(n + size, rows)) for n in range(0, rows, size)]
            firsts = [min(int(self.start[block].min()), self.length) for block in blocks]
            saved = sum(firsts) / len(firsts) - min(firsts)
            least = max(PART_SAVES * (self.length + 1 - min(firsts)), PART_COST * (len(blocks) - 1) / rows)
            if saved < least:
                blocks, firsts = [slice(0, rows)], [min(firsts)]
            self._parts = list(zip(blocks, firsts, strict=True))
        return self._parts

    def hidden(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask [rows, 1, 1, length + 1] of slots before each row's start, to add to scores; None where all start
        at 0."""
        if not self.start.any():
            return None
        if self._bias is None or self._bias.shape[-1] <= self.length:
            before = np.arange(self.length + GROWTH) < self.start[:, None]
            bias = torch.from_numpy(np.where(before, -np.inf, 0.0)).to(self.device, dtype)
            self._bias = bias[:, None, None]
        return self._bias[..., : self.length + 1]


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of keys and values in slots. On the CPU at least float32: small batched products in bfloat16 take twice
    as long there, and round scores."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def _with_room(x: torch.Tensor, before: int) -> torch.Tensor:
    """Slots [rows, heads, used, D] between ``before`` empty ones and free ones."""
    rows, heads, used, width = x.shape
    larger = x.new_empty(rows, heads, before + used + max(GROWTH, used // 2), width)
    larger[:, :, :before] = 0  # a masked slot still counts 0 times its value, which must be a number
    larger[:, :, before : before + used] = x
    return larger


@dataclass(slots=True)
class Filling:
    """Arguments of a forward pass over prompts packed end to end: ``segments`` of the row, ``rows`` and ``at`` as in
    :meth:`Slots.fill`, ``gather`` for the scorer's variable-length kernel."""

    slots: Slots
    segments: tuple[Segment, ...]
    rows: torch.Tensor
    at: torch.Tensor
    kernel: str
    gather: dict[str, Any] | None


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    slots: Slots | StepCache | None = None,
    filling: Filling | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: fills slots with prompts, or steps every row by a token. query [1, heads, T or rows, D].

    Returns [1, T or rows, heads, D]. Raises :class:`ModelError` for arguments of a layer that are not supported.
    """
    if filling is not None:
        filling.slots.fill(filling.slots.call_of(module), key[0], value[0], filling.rows, filling.at)
        options |= {"prefix_segments": filling.segments, "prefix_kernel": filling.kernel}
        return shared_attention(module, query, key, value, attention_mask, prefix_gather=filling.gather, **options)
    if slots is None:
        raise ModelError(f"{type(module).__name__} does not pass its keyword arguments to its attention")
    if isinstance(slots, StepCache):
        return _compiled_attention(module, query, key, value, attention_mask, slots, **options), None
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
    keys, values = slots.extend(slots.call_of(module), key[0].transpose(0, 1), value[0].transpose(0, 1))
    bias = slots.hidden(keys.dtype)
    rows, heads = query.shape[2], query.shape[1]
    # Queries that share a key head become its rows: [rows, key heads, queries each, D].
    grouped = query[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1)).to(keys.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    parts = []
    for part, start in slots.parts():
        first = start if sliding_window is None else max(start, keys.shape[2] - sliding_window)
        seen, of = (part, slice(None), slice(first, None)), grouped[part]
        masked = None if bias is None else bias[seen[0], :, :, first:]
        if query.device.type == "cuda" and softcap is None and s_aux is None:
            parts.append(F.scaled_dot_product_attention(of, keys[seen], values[seen], masked, scale=scale))
        else:
            parts.append(_by_products(of, keys[seen], values[seen], masked, scale, softcap, s_aux))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(1, rows, heads, -1).to(query.dtype)


def _compiled_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: StepCache,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """The same as :func:`_step_attention` for the compiler, which fuses all but the two products. Blocks of rows would
    depend on numbers of the host, so all rows attend over all slots."""
    refuse_foreign(module, attention_mask, dropout, others)
    keys, values, start_R, last = cache
    for kept, new in ((keys, key), (values, value)):
        kept.index_copy_(2, last, new[0].transpose(0, 1)[:, :, None].to(kept.dtype))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    grouped = query[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1)).to(keys.dtype) * scale
    scores = torch.bmm(grouped.flatten(0, 1), keys.flatten(0, 1).transpose(-1, -2)).unflatten(0, keys.shape[:2])
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    slot = torch.arange(keys.shape[2], device=keys.device)
    first_R = start_R if sliding_window is None else torch.maximum(start_R, last + 1 - sliding_window)
    scores = scores.masked_fill(slot < first_R[:, None, None, None], float("-inf"))
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, scores.shape[1], scores.shape[2], 1).expand(len(scores), -1, -1, 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]]
    out = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))
    return out.view(1, len(keys), query.shape[1], -1).to(query.dtype)


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of query [rows, key heads, queries each, D] by two matrix products. For one token per row they beat the
    CPU's flash kernel, and they support caps and sinks."""
    if softcap is None:  # scale and mask within the product
        added = query.new_zeros(1, 1, 1) if bias is None else bias.expand(-1, key.shape[1], -1, -1).flatten(0, 1)
        flat = query.reshape(-1, *query.shape[2:])
        scores = torch.baddbmm(added, flat, key.flatten(0, 1).transpose(-1, -2), alpha=scale)
        scores = scores.unflatten(0, query.shape[:2])
    else:
        scores = torch.tanh((query * scale) @ key.transpose(-1, -2) / softcap) * softcap
        scores = scores if bias is None else scores + bias
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, scores.shape[1], scores.shape[2], 1).expand(len(scores), -1, -1, 1)
        scores = torch.cat([scores, sink], -1)
    return torch.softmax(scores, -1)[..., : key.shape[2]].to(value.dtype) @ value


AttentionInterface.register(HOOK, slot_attention)
