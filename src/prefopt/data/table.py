"""Groups of token ids in columns, so that a million of them need few Python objects.

>>> import numpy as np
>>> one = (np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1], bool))
>>> other = (np.array([1, 2, 9]), np.array([0, 0, 1], bool))
>>> table = GroupTable.of([Group.from_sequences([one, other], row=1)])
>>> len(table), table.tokens_G.tolist(), table.longest_G.tolist(), table[0].continuations[1].ids.tolist()
(1, [5], [4], [9])

A table has parts, one per tokenised file: arrays in memory, or mapped from the token cache. A :class:`Group` is made
when it is asked for, and its token ids are views into the part.
"""

from __future__ import annotations

import operator
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from prefopt.data.group import BoolArray, Continuation, Group, Pictures, Placed
from prefopt.data.picture_columns import picture_columns
from prefopt.records import Picture

KEY = np.dtype("S16")  # fixed width and padded with zero bytes, so that comparing as strings is comparing all 16

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]
IndexArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.bytes_]

COLUMNS: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
    # tokens T, group after group: the shared prefix, then what each response adds
    "ids_T": (np.dtype(np.int32), ()),
    "trained_T": (np.dtype(np.bool_), ()),
    # groups G
    "prefix_G": (np.dtype(np.int32), ()),  # tokens of the shared prefix
    "tokens_G": (np.dtype(np.int32), ()),  # tokens of the prefix and all responses: one shared forward pass
    "responses_G": (np.dtype(np.int32), ()),
    "pairs_G": (np.dtype(np.int32), ()),
    "row_G": (np.dtype(np.int64), ()),  # row of the source
    "prompt_cut_G": (np.dtype(np.int32), ()),  # tokens removed by truncation
    "prompt_key_G": (KEY, ()),  # Comparison.prompt_key
    "pictures_G": (np.dtype(np.int32), ()),  # pictures of the shared prefix
    # responses N
    "length_N": (np.dtype(np.int32), ()),  # tokens beyond the shared prefix, those of all steps
    "steps_N": (np.dtype(np.int32), ()),  # sequences that the response consists of, see Continuation
    "trained_N": (np.dtype(np.int32), ()),  # how many of them are trained
    "cut_N": (np.dtype(np.int32), ()),
    "key_N": (KEY, ()),  # Group.key
    "tier_N": (np.dtype(np.int32), ()),  # -1: in none
    "score_N": (np.dtype(np.float64), ()),  # NaN: none
    "label_N": (np.dtype(np.int8), ()),  # -1: none
    "pictures_N": (np.dtype(np.int32), ()),  # pictures beyond the shared prefix
    # steps S, response after response
    "length_S": (np.dtype(np.int32), ()),  # tokens beyond the shared prefix
    # pairs P
    "pair_P": (np.dtype(np.int32), (2,)),
    "weight_P": (np.dtype(np.float64), ()),  # NaN: none
    # pictures I, group after group: those of the prefix, then those of each response
    "digest_I": (KEY, ()),  # Picture.digest
    "size_I": (np.dtype(np.int32), (2,)),  # width and height
    "place_I": (np.dtype(np.int32), (2,)),  # tokens [start, stop) in the prefix or in what the response adds
    "path_I": (np.dtype(np.int32), ()),  # bytes of its path; 0: its file is held here
    "held_I": (np.dtype(np.int64), ()),  # bytes of its path or of its file
    # bytes B of paths and files of pictures
    "held_B": (np.dtype(np.uint8), ()),
}


class Part:
    """Groups of one source: arrays by the names in ``COLUMNS``. ``max_id``: the largest token id, or -1."""

    def __init__(self, columns: Columns, *, max_id: int | None = None, source: int = 0) -> None:
        self.columns, self.source = columns, source
        self.max_id = int(columns["ids_T"].max(initial=-1)) if max_id is None else max_id
        self.token_starts = _starts(columns["tokens_G"])
        self.response_starts = _starts(columns["responses_G"])
        self.step_starts = _starts(columns["steps_N"])
        self.pair_starts = _starts(columns["pairs_G"])
        self._picture_starts: tuple[IndexArray, IndexArray] | None = None

    def __len__(self) -> int:
        return len(self.columns["row_G"])

    def group(self, g: int) -> Group:
        """Group g; its arrays are views."""
        c, start, prefix = self.columns, int(self.token_starts[g]), int(self.columns["prefix_G"][g])
        ids, trained = c["ids_T"], c["trained_T"]
        responses, pairs = slice(*self.response_starts[g : g + 2]), slice(*self.pair_starts[g : g + 2])
        cuts = accumulate(c["length_N"][responses].tolist(), initial=start + prefix)
        weights, scores = c["weight_P"][pairs].tolist(), c["score_N"][responses].tolist()
        labels, tier = c["label_N"][responses].tolist(), c["tier_N"][responses].tolist()
        shared, own = self._pictures(g, responses) if len(c["digest_I"]) else ((), [()] * len(labels))
        inner = [self._inner_starts(n) for n in range(responses.start, responses.stop)]
        added = zip(pairwise(cuts), inner, own, strict=True)
        return Group(
            ids[start : start + prefix],
            tuple(Continuation(ids[a:b], trained[a:b], s, p) for (a, b), s, p in added),
            int(c["row_G"][g]),
            tuple(map(tuple, c["pair_P"][pairs].tolist())),
            weights=tuple(weights) if weights and weights[0] == weights[0] else None,
            tiers=tuple(tuple(k for k, t in enumerate(tier) if t == best) for best in sorted({*tier} - {-1})),
            scores=tuple(scores) if scores and scores[0] == scores[0] else None,
            labels=tuple(map(bool, labels)) if labels and labels[0] >= 0 else None,
            pictures=shared,
        )

    def _pictures(self, g: int, responses: slice) -> tuple[Pictures, list[Pictures]]:
        """The pictures of the prefix of group g, and those of each of its responses."""
        c = self.columns
        if self._picture_starts is None:
            of_groups = c["pictures_G"] + _sums(c["pictures_N"], self.response_starts)
            self._picture_starts = _starts(of_groups), _starts(c["held_I"])
        counts = [int(c["pictures_G"][g]), *c["pictures_N"][responses].tolist()]
        cuts = accumulate(counts, initial=int(self._picture_starts[0][g]))
        found = [tuple(map(self._picture, range(a, b))) for a, b in pairwise(cuts)]
        return found[0], found[1:]

    def _picture(self, i: int) -> Placed:
        assert self._picture_starts is not None
        c, (first, last) = self.columns, self._picture_starts[1][i : i + 2].tolist()
        held, (width, height) = c["held_B"][first:last].tobytes(), c["size_I"][i].tolist()
        digest = bytes(c["digest_I"][i]).ljust(KEY.itemsize, b"\0")  # numpy drops zero bytes at the end
        source, data = (os.fsdecode(held), b"") if c["path_I"][i] else ("", held)
        start, stop = c["place_I"][i].tolist()
        return Placed(Picture(digest, width, height, source, data), start, stop)

    @property
    def picture_files(self) -> dict[str, bytes]:
        """The files of pictures that are not held here, and their digests."""
        c, ends = self.columns, _starts(self.columns["held_I"])
        found = {}
        for i in np.flatnonzero(c["path_I"]).tolist():
            path = os.fsdecode(c["held_B"][ends[i] : ends[i + 1]].tobytes())
            found[path] = bytes(c["digest_I"][i]).ljust(KEY.itemsize, b"\0")
        return found

    def _inner_starts(self, n: int) -> tuple[int, ...]:
        """Where the second step of response n and the later ones begin."""
        first, end = int(self.step_starts[n]), int(self.step_starts[n + 1])
        return tuple(np.cumsum(self.columns["length_S"][first : end - 1]).tolist()) if end - first > 1 else ()


class _Groups(Sequence[Group]):
    """Groups that are made by ``_at`` at each access, and not kept; a slice is a list."""

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(index)

    @abstractmethod
    def _at(self, index: int) -> Group: ...


class GroupTable(_Groups):
    """G groups with N responses in all, in ``parts``; columns are attributes, see ``COLUMNS``."""

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(p) for p in self.parts], dtype=np.int64).tolist()

    @classmethod
    def of(cls, groups: Sequence[Group]) -> GroupTable:
        """The same groups in columns; a table is returned unchanged."""
        if isinstance(groups, GroupTable):
            return groups
        builder = TableBuilder()
        for group in groups:
            builder.add(group)
        return cls([Part(builder.columns())])

    def __add__(self, other: GroupTable) -> GroupTable:
        return GroupTable([*self.parts, *other.parts])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: int) -> Group:
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        p = bisect_right(self._ends, i)
        return self.parts[p].group(i - (self._ends[p - 1] if p else 0))

    def __getattr__(self, name: str) -> Array:
        """One of ``COLUMNS`` over all parts, concatenated at first use; a single part's own array."""
        if name not in COLUMNS:
            raise AttributeError(name)
        found = [part.columns[name] for part in self.parts]
        whole: Array = found[0] if len(found) == 1 else joined([part.columns for part in self.parts], [name])[name]
        self.__dict__[name] = whole
        return whole

    @cached_property
    def response_starts(self) -> IndexArray:
        """[G + 1] group g has responses ``response_starts[g]:response_starts[g + 1]``."""
        return _starts(self.responses_G)

    @cached_property
    def source_G(self) -> IndexArray:
        """[G] the source of each group."""
        return np.repeat(np.array([p.source for p in self.parts], np.int64), [len(p) for p in self.parts])

    @cached_property
    def longest_G(self) -> Array:
        """[G] tokens of the longest whole sequence."""
        return self._over_responses(np.maximum)

    @cached_property
    def shortest_G(self) -> Array:
        """[G] tokens of the shortest whole sequence."""
        return self._over_responses(np.minimum)

    @cached_property
    def sequences_G(self) -> IndexArray:
        """[G] the number of sequences: the steps of all responses."""
        starts = _starts(self.steps_N)[self.response_starts]
        found: IndexArray = np.diff(starts)
        return found

    @cached_property
    def truncated_G(self) -> BoolArray:
        """[G] whether prompt or a response was truncated."""
        found: BoolArray = self.prompt_cut_G > 0
        found[_owners(self.responses_G)[self.cut_N > 0]] = True
        return found

    @property
    def has_pictures(self) -> bool:
        """Whether any group has a picture."""
        return any(len(part.columns["digest_I"]) for part in self.parts)

    @property
    def max_id(self) -> int:
        """The largest token id, -1 without tokens."""
        return max((part.max_id for part in self.parts), default=-1)

    def _over_responses(self, best: np.ufunc) -> Array:
        found = self.prefix_G.astype(np.int64)
        has = self.responses_G > 0
        if has.any():
            first_S = _starts(self.steps_N)[self.response_starts[:-1][has]]
            found[has] += best.reduceat(self.length_S, first_S)
        return found


class Selection(_Groups):
    """The groups at ``indices``."""

    def __init__(self, groups: Sequence[Group], indices: Sequence[int]) -> None:
        self._groups, self._indices = groups, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _at(self, index: int) -> Group:
        return self._groups[self._indices[index]]


class TableBuilder:
    """Builds columns in memory, group by group."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(
        self, group: Group, *, prompt_key: bytes = bytes(16), prompt_cut: int = 0, cuts: Sequence[int] | None = None
    ) -> None:
        """``prompt_cut``, ``cuts`` [K]: tokens that truncation removed from the prompt and from each response."""
        many, count = group.continuations, len(group.continuations)
        tier = {k: t for t, members in enumerate(group.tiers) for k in members}
        values: dict[str, Sequence[Any]] = {
            "ids_T": [group.prefix, *(c.ids for c in many)],
            "trained_T": [np.zeros(len(group.prefix), np.bool_), *(c.trained for c in many)],
            "prefix_G": [len(group.prefix)],
            "tokens_G": [group.tokens],
            "responses_G": [count],
            "pairs_G": [len(group.pairs)],
            "row_G": [group.row],
            "prompt_cut_G": [prompt_cut],
            "prompt_key_G": [prompt_key],
            "length_N": [len(c.ids) for c in many],
            "steps_N": [1 + len(c.starts) for c in many],
            "length_S": [len(ids) for c in many for ids, _ in c.steps],
            "trained_N": [int(c.trained.sum()) for c in many],
            "cut_N": [0] * count if cuts is None else cuts,
            "key_N": [group.key(k) for k in range(count)],
            "tier_N": [tier.get(k, -1) for k in range(count)],
            "score_N": [np.nan] * count if group.scores is None else group.scores,
            "label_N": [-1] * count if group.labels is None else group.labels,
            "pair_P": group.pairs,
            "weight_P": [np.nan] * len(group.pairs) if group.weights is None else group.weights,
            "pictures_G": [len(group.pictures)],
            "pictures_N": [len(c.pictures) for c in many],
            **(picture_columns(group) if group.has_pictures else {}),
        }
        for name, new in values.items():
            self._rows[name] += new

    def columns(self) -> dict[str, Array]:
        """All added groups, by the names in ``COLUMNS``."""
        found: dict[str, Array] = {}
        for name, values in self._rows.items():
            dtype, width = COLUMNS[name]
            if name.endswith(("_T", "_B")):
                found[name] = np.concatenate([np.empty(0, dtype), *values])
            elif dtype == KEY:
                found[name] = np.frombuffer(b"".join(values), KEY)
            else:
                found[name] = np.array(values, dtype).reshape(-1, *width)
        return found


def joined(chunks: Sequence[Columns], names: Iterable[str] = COLUMNS) -> dict[str, Array]:
    """Columns of consecutive chunks, concatenated."""
    empty = {name: np.empty((0, *COLUMNS[name][1]), COLUMNS[name][0]) for name in names}
    return {name: np.concatenate([none, *(chunk[name] for chunk in chunks)]) for name, none in empty.items()}


def ranges(first: IndexArray, many: IndexArray, some: IndexArray) -> IndexArray:
    """``first[i], first[i] + 1, ...``, ``many[i]`` of them, for every i of ``some``, end to end."""
    count, start = many[some], first[some]
    found: IndexArray = np.repeat(start + count - np.cumsum(count), count) + np.arange(int(count.sum()))
    return found


def _starts(counts: Array) -> IndexArray:
    starts: IndexArray = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return starts


def keep_responses(groups: GroupTable, keep_N: BoolArray) -> GroupTable:
    """Select responses [N], and the pairs of which both are selected; prefixes and annotations stay unchanged.

    The result is in memory, even where the parts are mapped from disk.
    """
    ends = np.cumsum([len(part.columns["length_N"]) for part in groups.parts], dtype=np.int64)
    return GroupTable(list(map(_fewer, groups.parts, np.split(keep_N, ends[:-1]))))


def _fewer(part: Part, keep_N: BoolArray) -> Part:
    c = part.columns
    group_N = _owners(c["responses_G"])
    columns: dict[str, Array] = {n: x[keep_N] if n.endswith("_N") else x for n, x in c.items()}
    columns["length_S"] = c["length_S"][np.repeat(keep_N, c["steps_N"])]
    columns["responses_G"] = _counts(group_N[keep_N], len(part), c["responses_G"])
    # A group's tokens are its prefix and its responses: runs that stay or go as a whole.
    starts = part.response_starts[:-1]
    stays = np.insert(keep_N, starts, True)
    lengths = np.insert(c["length_N"], starts, c["prefix_G"])
    group_run = np.insert(group_N, starts, np.arange(len(part)))
    keep_T = np.repeat(stays, lengths)
    columns["ids_T"], columns["trained_T"] = c["ids_T"][keep_T], c["trained_T"][keep_T]
    tokens = np.bincount(group_run[stays], lengths[stays], len(part))
    columns["tokens_G"] = tokens.astype(c["tokens_G"].dtype)
    # Pairs count responses from 0 within their group.
    group_P = _owners(c["pairs_G"])
    before_N: IndexArray = np.cumsum(keep_N) - keep_N
    at_P2 = c["pair_P"] + starts[group_P][:, None]
    keep_P = keep_N[at_P2].all(1)
    first_P = np.append(before_N, 0)[starts[group_P]]
    columns["pair_P"] = (before_N[at_P2] - first_P[:, None])[keep_P].astype(c["pair_P"].dtype)
    columns["weight_P"] = c["weight_P"][keep_P]
    columns["pairs_G"] = _counts(group_P[keep_P], len(part), c["pairs_G"])
    if len(c["digest_I"]):
        keep_I = np.repeat(stays, np.insert(c["pictures_N"], starts, c["pictures_G"]))
        columns |= {name: c[name][keep_I] for name in COLUMNS if name.endswith("_I")}
        columns["held_B"] = c["held_B"][np.repeat(keep_I, c["held_I"])]
    return Part(columns, max_id=part.max_id, source=part.source)


def _sums(values: Array, starts: IndexArray) -> IndexArray:
    """Sums of values[starts[g]:starts[g + 1]], [G]."""
    ends = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    found: IndexArray = ends[starts[1:]] - ends[starts[:-1]]
    return found


def _owners(count_G: Array) -> IndexArray:
    return np.repeat(np.arange(len(count_G)), count_G)


def _counts(owner: IndexArray, groups: int, like: Array) -> Array:
    return np.bincount(owner, minlength=groups).astype(like.dtype)
