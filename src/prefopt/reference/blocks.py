"""Files of the reference cache: blocks of values with their index, plans of what is scored together, and their checks.

A block is a safetensors file with

- ``keys`` uint8 [n, 16]: names of responses (``Group.key``);
- ``sums`` float64 [n]: log-probability of the response, natural logarithm, summed over its scored tokens;
- ``counts`` int32 [n]: number of these tokens;
- ``token_values`` float32 [sum of counts]: their log-probabilities, where a loss needs them.

It carries a SHA-256 over its contents and its space, is written once and never changed.

A plan lists the groups that are scored together, since the rounding of a value depends on its whole forward pass. It
is kept until all of it is done: an interrupted run continues with the batches that are left, and ends with the same
bits as an uninterrupted one. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from prefopt.core.cache_folder import Damaged, cache_errors, last_used, reference_entries, size_of, write_cached
from prefopt.data.table import KEY, Array, IndexArray, KeyArray, ranges

log = logging.getLogger(__name__)

Arrays = dict[str, Array]


def write_sealed(path: Path, arrays: Arrays, space: str) -> None:
    """Write a file of the cache as :func:`sealed`. Raises ``CacheError``."""
    write_cached(path, sealed(arrays, space))


def sealed(arrays: Arrays, space: str) -> bytes:
    """Named arrays with a checksum over names, types, shapes, bytes and ``space``."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(arrays, metadata={"sha256": _checksum(arrays, space)})


def read_sealed(path: Path, space: str) -> Arrays:
    """Read a file that ``sealed`` gave. Raises ``Damaged``, and ``OSError`` where the file cannot be read at all."""
    data = path.read_bytes()
    try:
        arrays: Arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        checksum = header["__metadata__"]["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise Damaged("truncated or unreadable") from error
    if checksum != _checksum(arrays, space):
        raise Damaged("its checksum does not match its contents")
    return arrays


def _checksum(arrays: Arrays, space: str) -> str:
    digest = hashlib.sha256(space.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_block(folder: Path, arrays: Arrays, space: str) -> Path:
    """Commit the newest block of ``folder``, whose lock the caller holds, and return it. Raises ``CacheError``."""
    numbers = [int(path.name.split("-")[1]) for path in folder.glob("block-*")]
    # the number orders blocks, the random part tells a new block from a cleared one with the same number
    name = f"block-{max(numbers, default=0) + 1:06d}-{secrets.token_hex(4)}.safetensors"
    write_sealed(path := folder / name, arrays, space)
    return path


def block_files(folder: Path) -> list[Path]:
    """The blocks of a space, oldest first."""
    return sorted(folder.glob("block-*.safetensors"))


def find_sorted(keys: KeyArray, among: KeyArray) -> tuple[IndexArray, npt.NDArray[np.bool_]]:
    """The position of each key in the sorted array ``among``, and whether it is there."""
    if not len(among):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
    at = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    return at, among[at] == keys


class Index:
    """Positions of each response's values, over all blocks of one space. Where two blocks hold the same response, its
    sum is that of the older block: a value once returned never changes."""

    def __init__(self, folder: Path, space: str) -> None:
        self.folder, self.space = folder, space
        self._read: set[str] = set()
        self.sums = np.empty(0, np.float64)
        self.counts = np.empty(0, np.int32)
        self.token_values = np.empty(0, np.float32)
        self.token_starts = np.empty(0, np.int64)  # into token_values, -1 where a row has none
        self._keys = np.empty(0, KEY)
        # Distinct keys, sorted, with the first row of each: of all rows, and of those with token values.
        self._first = [(np.empty(0, KEY), np.empty(0, np.int64))] * 2

    def refresh(self) -> None:
        """Read new blocks. A damaged one is moved aside with a warning; its values are missing."""
        new = []
        for path in block_files(self.folder):
            if path.name in self._read:
                continue
            try:
                with cache_errors(path), suppress(FileNotFoundError):  # cleared since it was listed
                    new.append(read_sealed(path, self.space))
                    self._read.add(path.name)
            except Damaged as damage:
                move_aside(path)
                log.warning("cache block %s is damaged (%s): moved aside, its responses are scored again", path, damage)
        if new:
            self._append(new)

    def find(self, keys: KeyArray, *, token_values: bool = False) -> IndexArray:
        """Rows of ``keys`` [N] into ``sums`` and ``counts``, or ``token_starts`` if ``token_values``; -1 if missing."""
        among, rows = self._first[token_values]
        at, found = find_sorted(keys, among)
        return np.where(found, rows[at], -1) if len(rows) else np.full(len(keys), -1, np.int64)

    def _append(self, blocks: list[Arrays]) -> None:
        starts, tokens = [self.token_starts], [self.token_values]
        total = len(self.token_values)
        for block in blocks:
            if "token_values" in block:
                starts.append(total + np.cumsum(block["counts"], dtype=np.int64) - block["counts"])
                tokens.append(block["token_values"])
                total += len(block["token_values"])
            else:
                starts.append(np.full(len(block["keys"]), -1, np.int64))
        self._keys = np.concatenate([self._keys, *(b["keys"].reshape(-1).view(KEY) for b in blocks)])
        self.sums = np.concatenate([self.sums, *(b["sums"] for b in blocks)])
        self.counts = np.concatenate([self.counts, *(b["counts"] for b in blocks)])
        self.token_values, self.token_starts = np.concatenate(tokens), np.concatenate(starts)
        self._first = []
        for rows in (np.arange(len(self._keys)), np.flatnonzero(self.token_starts >= 0)):
            keys, first = np.unique(self._keys[rows], return_index=True)
            self._first.append((keys, rows[first]))


@dataclass(frozen=True, slots=True, eq=False)
class NamedGroups:
    """G groups by the keys of their N responses: group g has ``keys_N[starts[g]:starts[g + 1]]``, ``names_G`` [G]."""

    keys_N: KeyArray
    starts: IndexArray
    names_G: KeyArray

    @classmethod
    def of(cls, keys_N: KeyArray, starts: IndexArray) -> NamedGroups:
        """Name groups by a hash over the keys of their responses."""
        data = np.ascontiguousarray(keys_N).view(np.uint8).data
        names = bytearray()
        for first in range(0, len(starts) - 1, 1 << 14):  # in chunks: there may be millions
            bounds = (starts[first : first + (1 << 14) + 1] * KEY.itemsize).tolist()
            names += b"".join(hashlib.blake2b(data[a:b], digest_size=16).digest() for a, b in pairwise(bounds))
        return cls(keys_N, starts, np.frombuffer(bytes(names), KEY))

    def find(self, names: KeyArray) -> IndexArray:
        """Positions of the groups of these names; each must be there."""
        order = np.argsort(self.names_G, kind="stable")
        at: IndexArray = order[np.searchsorted(self.names_G[order], names)]
        assert (self.names_G[at] == names).all()
        return at

    def take(self, groups: IndexArray) -> NamedGroups:
        """Some of the groups, in the order given."""
        sizes = np.diff(self.starts)
        starts = np.concatenate([[0], np.cumsum(sizes[groups], dtype=np.int64)])
        return NamedGroups(self.keys_N[ranges(self.starts, sizes, groups)], starts, self.names_G[groups])


@dataclass(frozen=True, slots=True, eq=False)
class ScoringPlan:
    """Batches of groups: batch b has the groups ``batch_starts[b]:batch_starts[b + 1]``; it fits ``token_budget``. A
    group larger than the budget has a batch to itself."""

    token_budget: int
    groups: NamedGroups
    batch_starts: IndexArray

    @classmethod
    def make(cls, groups: NamedGroups, costs_G: IndexArray, wanted: KeyArray, token_budget: int) -> ScoringPlan:
        """Batches that cover the keys ``wanted`` (sorted); ``costs_G``: tokens of each group. Longest first, so that
        memory runs out at once or never. A group is planned if it is the first to hold a wanted response."""
        order = np.lexsort((groups.names_G, -costs_G))  # by name where costs are equal, whatever the data's order
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        at, needed_N = find_sorted(groups.keys_N, wanted)
        first = np.full(len(wanted), len(order))
        np.minimum.at(first, at[needed_N], np.repeat(rank, np.diff(groups.starts))[needed_N])
        needed = order[np.unique(first[first < len(order)])]
        starts: list[int] = []
        room = 0
        for g, cost in enumerate(costs_G[needed].tolist()):
            if not starts or cost > room:
                starts.append(g)
                room = token_budget
            room -= cost
        return cls(token_budget, groups.take(needed), np.array([*starts, len(needed)], np.int64))

    def work(self, wanted: KeyArray) -> Iterator[tuple[range, IndexArray]]:
        """The batches left for the keys ``wanted`` (sorted): their groups, and the responses whose values count, as
        numbered over the whole plan. One that several groups hold is taken from the first."""
        keys, starts = self.groups.keys_N, self.groups.starts
        take = np.zeros(len(keys), np.bool_)
        take[np.unique(keys, return_index=True)[1]] = True
        take &= find_sorted(keys, wanted)[1]
        for first, last in pairwise(self.batch_starts.tolist()):
            here: IndexArray = np.flatnonzero(take[starts[first] : starts[last]]) + starts[first]
            if len(here):
                yield range(first, last), here

    def covers(self, wanted: KeyArray) -> bool:
        """Whether all of ``wanted`` was planned (a block damaged since then was not)."""
        return bool(find_sorted(wanted, np.unique(self.groups.keys_N))[1].all())

    def write(self, path: Path, space: str) -> None:
        """Write the plan. Raises ``CacheError``."""
        arrays = {
            "keys": np.frombuffer(self.groups.keys_N.tobytes(), np.uint8),
            "group_sizes": np.diff(self.groups.starts),
            "batch_sizes": np.diff(self.batch_starts),
            "token_budget": np.array([self.token_budget], np.int64),
        }
        write_sealed(path, arrays, space)

    @classmethod
    def read(cls, path: Path, space: str) -> ScoringPlan | None:
        """The plan at ``path``; None where there is none or it is damaged, and a new one must be made."""
        try:
            with cache_errors(path):
                if not path.exists():
                    return None
                arrays = read_sealed(path, space)
        except Damaged as damage:
            log.warning("cache plan %s is damaged (%s): planning again what is missing", path, damage)
            return None
        keys = np.frombuffer(arrays["keys"].tobytes(), KEY)
        starts, batches = (
            np.concatenate([[0], np.cumsum(arrays[name], dtype=np.int64)]) for name in ("group_sizes", "batch_sizes")
        )
        return cls(int(arrays["token_budget"][0]), NamedGroups.of(keys, starts), batches)


def plan_file(folder: Path, groups: NamedGroups, token_values: bool) -> Path:
    """The file of the plan for a set of groups, in whatever order."""
    digest = hashlib.sha256(np.unique(groups.names_G).tobytes())
    return folder / f"plan-{'tokens' if token_values else 'sums'}-{digest.hexdigest()[:16]}.safetensors"


@dataclass(frozen=True, slots=True)
class SpaceInfo:
    """One space: its description ``about`` (empty if unreadable), number of distinct responses, size on disk."""

    id: str
    about: dict[str, Any]
    responses: int
    blocks: int
    bytes: int
    last_used: datetime


def list_spaces(root: Path | None = None) -> list[SpaceInfo]:
    """All spaces, last used first. Reads the keys in the blocks, not the values; ``verify`` checks those."""
    spaces = []
    for folder in reference_entries(root):
        blocks, keys = block_files(folder), [np.empty(0, KEY)]
        for path in blocks:
            with suppress(SafetensorError, ValueError, OSError), safe_open(path, framework="numpy") as file:
                keys.append(np.ascontiguousarray(file.get_tensor("keys")).reshape(-1).view(KEY))
        distinct, used = len(np.unique(np.concatenate(keys))), datetime.fromtimestamp(last_used(folder), UTC)
        spaces.append(SpaceInfo(folder.name, _about(folder), distinct, len(blocks), size_of(folder), used))
    return sorted(spaces, key=lambda s: s.last_used, reverse=True)


def verify(root: Path | None = None, *, repair: bool = False) -> list[tuple[Path, str]]:
    """Check every file of every space against its checksum; the damaged files, each with the reason. ``repair`` renames
    them to ``*.damaged``: their responses are scored again when they are next needed."""
    damaged = []
    for folder in reference_entries(root):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with cache_errors(path):
                    read_sealed(path, folder.name)
            except Damaged as damage:
                damaged.append((path, str(damage)))
        if (folder / "about.json").exists() and not _about(folder):
            damaged.append((folder / "about.json", "unreadable"))
    for path, _ in damaged if repair else ():
        move_aside(path)
    return damaged


def move_aside(path: Path) -> None:
    """Rename a damaged file, for people to look at."""
    with cache_errors(path), suppress(FileNotFoundError):  # another process may be first
        path.rename(path.with_name(path.name + ".damaged"))


def _about(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "about.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}
