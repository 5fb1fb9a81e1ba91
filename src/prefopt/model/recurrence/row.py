"""Where a recurrence starts, continues and forks in a packed row.

The segments of :mod:`prefopt.model.packing` are cut into pieces: a shared prefix is a piece, and what follows it is one
piece per response, whose state starts from that at the end of the prefix. ``[P R1 R2]`` has three::

    Piece(0, P, -1)    Piece(P, P + R1, 0)    Piece(P + R1, P + R1 + R2, 0)

A recurrence computes chunks of equal size. Each piece starts a chunk of its own and fills up its last one with steps
that change nothing, so that the chunks of a row form a tree: a chunk starts with the state at the end of its parent.
Chunks of the same depth are computed together. A convolution instead sees a longer row, in which every piece that does
not stand behind its predecessor is preceded by a copy of the tokens it follows, or by zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from prefopt.data.table import IndexArray
from prefopt.model.kernels.gather import Sums, occurrences
from prefopt.model.packing import Segment
from prefopt.transfer import on_device

Segments = tuple[Segment, ...]


class Piece(NamedTuple):
    """Tokens [start, stop) of a row, and the index of the piece whose end they follow; -1: they start a sequence."""

    start: int
    stop: int
    parent: int


def pieces_of(segments: Segments) -> tuple[Piece, ...]:
    """The pieces of a row, in its order.

    >>> pieces_of(((0, 5, 0, 0), (5, 7, 0, 3)))
    (Piece(start=0, stop=3, parent=-1), Piece(start=3, stop=5, parent=0), Piece(start=5, stop=7, parent=0))
    """
    forks: dict[int, set[int]] = {}
    for _, _, origin, length in segments:
        if length:
            forks.setdefault(origin, set()).add(length)
    pieces: list[Piece] = []
    ends: dict[tuple[int, int], int] = {}  # of a prefix, by its origin and length
    for start, stop, origin, length in segments:
        parent, at = (ends[origin, length] if length else -1), start
        for cut in sorted(forks.get(start, ())):
            pieces.append(Piece(at, start + cut, parent))
            parent = ends[start, cut] = len(pieces) - 1
            at = start + cut
        if stop > at:
            pieces.append(Piece(at, stop, parent))
    return tuple(pieces)


class Level(NamedTuple):
    """Chunks [start, stop) of one depth; ``parent`` [stop - start] indexes the level before (None at the roots), and
    ``sums`` are the occurrences of each parent."""

    start: int
    stop: int
    parent: Tensor | None
    sums: Sums


@dataclass(frozen=True, slots=True, eq=False)
class ChunkTree:
    """The chunks of a row, sorted by depth. ``slot_T``: the place of each token among all chunks' places."""

    size: int
    slot_T: Tensor
    levels: tuple[Level, ...]

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self.levels[-1].stop

    def split(self, x: Tensor) -> Tensor:
        """[T, ...] to [chunks, size, ...]; zero where there is no token."""
        places = x.new_zeros(self.chunks * self.size, *x.shape[1:])
        return places.index_copy(0, self.slot_T, x).view(self.chunks, self.size, *x.shape[1:])

    def join(self, x: Tensor) -> Tensor:
        """[chunks, size, ...] to [T, ...]."""
        return x.flatten(0, 1).index_select(0, self.slot_T)


@lru_cache(maxsize=32)  # every layer asks for the same ones, forward and backward
def chunk_tree(segments: Segments, size: int, device: torch.device) -> ChunkTree:
    """The tree of a row's chunks of ``size`` tokens."""
    pieces = pieces_of(segments)
    depth: list[int] = []
    parent: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    for n, piece in enumerate(pieces):
        before = -1 if piece.parent < 0 else last[piece.parent]
        for _ in range(-(-(piece.stop - piece.start) // size)):
            depth.append(0 if before < 0 else depth[before] + 1)
            parent.append(before)
            owner.append(n)
            before = len(depth) - 1
        last.append(before)
    order = np.argsort(depth, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    slot = np.empty(max(p.stop for p in pieces), dtype=np.int64)
    first = np.searchsorted(owner, np.arange(len(pieces)))  # owners ascend
    for piece, chunk in zip(pieces, first, strict=True):
        within = np.arange(piece.stop - piece.start)
        slot[piece.start : piece.stop] = place[chunk + within // size] * size + within % size
    levels = tuple(_levels(np.asarray(depth)[order], np.asarray(parent)[order], place, device))
    return ChunkTree(size, on_device([slot], device)[0], levels)


def _levels(depth: Any, parent: Any, place: Any, device: torch.device) -> Iterator[Level]:
    bounds = np.searchsorted(depth, np.arange(depth[-1] + 2))
    for d, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if d == 0:
            yield Level(int(start), int(stop), None, ())
            continue
        index = place[parent[start:stop]] - bounds[d - 1]
        yield Level(int(start), int(stop), *_with_sums(index, device))


def _with_sums(index: IndexArray, device: torch.device) -> tuple[Tensor, Sums]:
    """``index`` and its occurrences on ``device``."""
    there = iter(on_device([index, *itertools.chain(*occurrences(index))], device))
    return next(there), tuple(zip(there, there, strict=True))


class PieceLevel(NamedTuple):
    """Whole pieces of one depth, for kernels that know lengths: ``tokens`` are the row's indices, piece after piece,
    and ``ends`` the cumulative lengths (int32, from 0). ``parent`` and ``sums`` as of :class:`Level`."""

    tokens: Tensor
    ends: Tensor
    parent: Tensor | None
    sums: Sums


@lru_cache(maxsize=32)
def piece_levels(segments: Segments, device: torch.device) -> tuple[PieceLevel, ...]:
    """The pieces of a row by depth: prompts and whole sequences first, then what follows them."""
    pieces = pieces_of(segments)
    depth: list[int] = []
    for piece in pieces:
        depth.append(0 if piece.parent < 0 else depth[piece.parent] + 1)
    levels: list[PieceLevel] = []
    before: list[int] = []
    for d in range(max(depth) + 1):
        here = [n for n, at in enumerate(depth) if at == d]
        tokens = torch.cat([torch.arange(pieces[n].start, pieces[n].stop) for n in here])
        ends = torch.tensor([0, *itertools.accumulate(pieces[n].stop - pieces[n].start for n in here)])
        index, sums = _with_sums(np.array([before.index(pieces[n].parent) for n in here]), device) if d else (None, ())
        levels.append(PieceLevel(tokens.to(device), ends.int().to(device), index, sums))
        before = here
    return tuple(levels)


class Tails(NamedTuple):
    """A row with the tokens before each piece repeated in front of it. ``source``: the token at each place, T for zero.
    ``keep_T``: the place of each token itself. ``copied``: the tokens that are repeated, with ``sums`` of the places
    that repeat them, by their index in ``copied``."""

    source: Tensor
    keep_T: Tensor
    copied: Tensor
    sums: Sums


@lru_cache(maxsize=32)
def tails_of(segments: Segments, width: int, device: torch.device) -> Tails | None:
    """The row that a causal convolution of ``width`` taps sees; None where it is the row itself."""
    pieces = pieces_of(segments)
    tokens = max(p.stop for p in pieces)
    index: list[int] = []
    keep = np.empty(tokens, dtype=np.int64)
    for n, piece in enumerate(pieces):
        if n and piece.parent != n - 1:
            index += _before(pieces, piece.parent, width - 1, tokens)
        keep[piece.start : piece.stop] = len(index) + np.arange(piece.stop - piece.start)
        index += range(piece.start, piece.stop)
    if len(index) == tokens:
        return None
    where = np.asarray(index)
    repeats = np.setdiff1d(np.arange(len(where)), keep)
    repeats = repeats[where[repeats] < tokens]
    copied, local = np.unique(where[repeats], return_inverse=True)
    placed = [(rows, repeats[places]) for rows, places in occurrences(local)]
    there = iter(on_device([where, keep, copied, *itertools.chain(*placed)], device))
    return Tails(next(there), next(there), next(there), tuple(zip(there, there, strict=True)))


def _before(pieces: tuple[Piece, ...], parent: int, count: int, zero: int) -> list[int]:
    """The last ``count`` tokens of a sequence up to the end of piece ``parent``, with ``zero`` before its start."""
    found: list[int] = []
    while parent >= 0 and len(found) < count:
        piece = pieces[parent]
        found = [*range(max(piece.start, piece.stop - (count - len(found))), piece.stop), *found]
        parent = piece.parent
    return [zero] * (count - len(found)) + found


def repeat_tails(x: Tensor, tails: Tails) -> Tensor:
    """[T, ...] to the longer row that a convolution sees, [len(tails.source), ...]."""
    return cast(Tensor, _RepeatTails.apply(x, tails))  # type: ignore[no-untyped-call]


class _RepeatTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tails: Tails) -> Tensor:
        ctx.tails = tails
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, tails.source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, tails = grads[0], ctx.tails
        own = grad.index_select(0, tails.keep_T)
        if len(tails.copied):
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = own.index_select(0, tails.copied).to(wide)  # rounded once
            for rows, places in tails.sums:
                total[rows] = total[rows] + grad.index_select(0, places).to(wide)
            own[tails.copied] = total.to(own.dtype)
        return own, None


def running_sum(x: Tensor, dim: int) -> Tensor:
    """The cumulative sum. Torch's own has no fixed order on CUDA, where it fails if kernels must be deterministic."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return torch.stack([*itertools.accumulate(x.unbind(dim))], dim)
    return x.cumsum(dim)
