"""Packing groups into batches: one flat row of tokens, nothing padded, nothing encoded twice.

A group of two responses is ``[P R1 R2]`` in the row. Positions of R2 continue from P. ``[P R1]`` is one segment of
ordinary causal attention; R2 is a second segment whose queries also see P::

    segments = ((0, P + R1, 0, 0), (P + R1, P + R1 + R2, 0, P))

A response of several steps (:class:`prefopt.data.group.Continuation`) has a segment for each: none sees another.

A log-probability is read at the token *before* the scored one: for the first token of every response that is the last
token of P, which is read K times and stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from prefopt.data.group import Group, Pictures, Placed
from prefopt.data.table import GroupTable, IndexArray
from prefopt.model.kernels.device import kind_of
from prefopt.model.kernels.gather import Sums, gathered, occurrences
from prefopt.transfer import on_device

Segment = tuple[int, int, int, int]
"""(start, stop, prefix start, prefix length): queries and own keys in [start, stop), and the prefix they all see."""


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """Inputs of one forward pass: ``ids`` and ``positions`` [T], and the segments of its attention. ``repeated``: how
    many of its first tokens a pass before it has encoded, too (the prompt of responses that are encoded apart).
    ``pictures``: by their tokens in the row, in order; a row with pictures has its ids on the host, too."""

    ids: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    repeated: int = 0
    pictures: Pictures = ()
    host_ids: IndexArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """G groups with N responses of which M tokens are scored.

    ``read`` [M] indexes the passes' hidden states laid end to end, ``target`` [M] are the scored token ids,
    ``owner`` [M] the response each belongs to, ``length`` [N] how many each response has, ``last`` [N] indexes the
    hidden state at the last scored token of each, where a reward is read (all int64). ``reads``: the occurrences of
    rows in ``read``, on CUDA alone.
    """

    groups: tuple[Group, ...]
    passes: tuple[ForwardPass, ...]
    read: torch.Tensor
    target: torch.Tensor
    owner: torch.Tensor
    length: torch.Tensor
    last: torch.Tensor
    reads: Sums | None = None

    @property
    def tokens(self) -> int:
        """Tokens the model encodes, T summed over the passes."""
        return sum(len(p.ids) for p in self.passes)

    def to(self, device: torch.device) -> PackedBatch:
        """The batch, packed on the CPU, with its tensors on ``device``."""
        if device.type == self.read.device.type:
            return self
        numbers = (self.read, self.target, self.owner, self.length, self.last)
        inputs = [x for p in self.passes for x in (p.ids, p.positions)]
        pairs = occurrences(self.read.numpy()) if kind_of(device) == "cuda" else []
        arrays = [x.numpy() for x in (*inputs, *numbers)] + [x for pair in pairs for x in pair]
        there = iter(on_device(arrays, device))
        passes = tuple(replace(p, ids=next(there), positions=next(there)) for p in self.passes)
        read, target, owner, length, last = (next(there) for _ in numbers)
        reads = tuple((next(there), next(there)) for _ in pairs) if pairs else None
        return PackedBatch(self.groups, passes, read, target, owner, length, last, reads)

    def read_from(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states [M, H] at ``read`` of those of all passes."""
        # The state at the end of a prompt is read once for each response to it.
        return hidden.index_select(0, self.read) if self.reads is None else gathered(hidden, self.read, self.reads)


@dataclass(frozen=True, slots=True)
class PackLayout:
    """How groups are packed for a model. ``share``: prefixes are encoded once and groups share a row. ``rope_limit``:
    rotary frequencies differ beyond this length (longrope), so that a row holds sequences of one side alone."""

    share: bool = True
    rope_limit: int | None = None

    def cost(self, group: Group) -> int:
        """Tokens that scoring ``group`` encodes."""
        apart = group.count - 1 if self.side(group) == "separate" else 0
        return group.tokens + apart * len(group.prefix)

    def costs(self, groups: GroupTable) -> IndexArray:
        """:meth:`cost` of all groups, [G]."""
        tokens: IndexArray = groups.tokens_G.astype(np.int64)
        if self.share and self.rope_limit is None:
            return tokens
        limit = self.rope_limit or 0
        separate = np.logical_and(groups.longest_G > limit, groups.shortest_G <= limit) if self.share else True
        tokens += groups.prefix_G * (groups.sequences_G - 1) * separate
        return tokens

    def side(self, group: Group) -> str:
        """``shared`` (the common row), ``long`` (the row beyond the limit) or ``separate`` (a row per response)."""
        if not self.share:
            return "separate"
        if self.rope_limit is None or group.longest <= self.rope_limit:
            return "shared"
        return "long" if group.shortest > self.rope_limit else "separate"


class _PackedRow:
    """A row under construction."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.pictures: list[Placed] = []
        self.length = 0
        self.repeated = 0

    def add(self, ids: np.ndarray, first_position: int, pictures: Pictures = ()) -> int:
        start = self.length
        self.pictures += [placed.moved(start) for placed in pictures]
        self.ids.append(ids)
        self.positions.append(np.arange(first_position, first_position + len(ids)))
        self.length += len(ids)
        return start

    def finish(self) -> ForwardPass:
        ids = torch.from_numpy(np.concatenate(self.ids).astype(np.int64))
        positions = torch.from_numpy(np.concatenate(self.positions))
        host = ids.numpy() if self.pictures else None
        return ForwardPass(ids, positions, tuple(self.segments), self.repeated, tuple(self.pictures), host)


@dataclass(slots=True)
class _Step:
    """The place of a step of response ``owner`` in a row: ``before`` is the row index of the last shared token, or
    -1."""

    owner: int
    row: _PackedRow
    start: int
    before: int
    ids: np.ndarray
    trained: np.ndarray


def pack(groups: Sequence[Group], layout: PackLayout | None = None) -> PackedBatch:
    """Pack groups for the scorer; responses keep the order of the groups."""
    layout = layout or PackLayout()
    common: dict[str, _PackedRow] = {}
    rows: list[_PackedRow] = []
    steps: list[_Step] = []
    count = 0
    for group in groups:
        side = layout.side(group)
        if side == "separate":
            steps += _apart(rows, group, count)
        else:
            if side not in common:
                rows.append(common.setdefault(side, _PackedRow()))
            steps += _add_shared(common[side], group, count)
        count += len(group.continuations)
    return _finish(groups, rows, steps, count)


def _apart(rows: list[_PackedRow], group: Group, first: int) -> list[_Step]:
    """A row for every sequence of the group, whose responses are counted from ``first``."""
    steps: list[_Step] = []
    for k in range(len(group.continuations)):
        for ids, trained in group.sequences(k):
            rows.append(row := _PackedRow())
            row.segments.append((0, len(ids), 0, 0))
            row.repeated = len(group.prefix) if steps else 0
            steps.append(_Step(first + k, row, row.add(ids, 0, group.placed(k)), -1, ids, trained))
    return steps


def _add_shared(row: _PackedRow, group: Group, first: int) -> list[_Step]:
    prefix = len(group.prefix)
    origin = row.add(group.prefix, 0, group.pictures)
    steps: list[_Step] = []
    for k, c in enumerate(group.continuations):
        for ids, trained in c.steps:
            start = row.add(ids, prefix, c.pictures)
            row.segments.append((start, row.length, origin, prefix) if steps else (origin, row.length, 0, 0))
            steps.append(_Step(first + k, row, start, origin + prefix - 1 if prefix else -1, ids, trained))
    return steps


def _finish(groups: Sequence[Group], rows: list[_PackedRow], steps: list[_Step], responses: int) -> PackedBatch:
    offsets = dict(zip(map(id, rows), np.cumsum([0, *(r.length for r in rows)]), strict=False))
    read, target, owner = [], [], []
    last = [np.empty(0, np.int64)] * responses
    for step in steps:
        where = np.nonzero(step.trained)[0]
        offset = offsets[id(step.row)]
        read.append(np.where(where > 0, step.start + where - 1, step.before) + offset)
        last[step.owner] = where[-1:] + step.start + offset
        target.append(step.ids[where])
        owner.append(np.full(len(where), step.owner))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    owner_M = tensor(owner)
    length = tensor([np.bincount(np.concatenate(owner), minlength=responses)])
    passes = tuple(row.finish() for row in rows)
    return PackedBatch(tuple(groups), passes, tensor(read), tensor(target), owner_M, length, tensor(last))


def split(items: Sequence[int], tokens: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Split items, in order, into batches of at most ``token_budget`` tokens; a larger item is a batch of its own."""
    batch: list[int] = []
    used = 0
    for item, size in zip(items, tokens, strict=True):
        if batch and used + size > token_budget:
            yield batch
            batch, used = [], 0
        batch.append(item)
        used += size
    if batch:
        yield batch


def packed_batches(
    groups: Sequence[Group], layout: PackLayout, token_budget: int, device: torch.device
) -> Iterator[PackedBatch]:
    """The groups in order, packed into batches of at most ``token_budget`` tokens, on ``device``."""
    for part in split(range(len(groups)), [layout.cost(group) for group in groups], token_budget):
        yield pack([groups[i] for i in part], layout).to(device)
