"""Files of the reference cache: blocks of values, the index over the blocks of a space, and their checks.

A block is a safetensors file with

- ``keys`` uint8 [n, 16]: names of responses (``Group.key``);
- ``sums`` float64 [n]: log-probability of the response, natural logarithm, summed over its scored tokens;
- ``counts`` int32 [n]: number of these tokens;
- ``token_values`` float32 [sum of counts]: their log-probabilities, where a loss needs them.

It carries a SHA-256 over its contents and its space, is written once and never changed. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from prefopt.core.cache_folder import Damaged, cache_errors, last_used, reference_entries, size_of, write_cached
from prefopt.data.table import KEY, Array, IndexArray, KeyArray

log = logging.getLogger(__name__)

Arrays = dict[str, Array]


def write_sealed(path: Path, arrays: Arrays, space: str) -> None:
    """Write named arrays with a checksum over names, types, shapes, bytes and ``space``. Raises ``CacheError``."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_cached(path, safetensors.numpy.save(arrays, metadata={"sha256": _checksum(arrays, space)}))


def read_sealed(path: Path, space: str) -> Arrays:
    """Read what ``write_sealed`` wrote. Raises ``Damaged``, and ``OSError`` where the file cannot be read at all."""
    data = path.read_bytes()
    try:
        arrays: Arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        checksum = header["__metadata__"]["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise Damaged("truncated or unreadable") from error
    if checksum != _checksum(arrays, space):
        raise Damaged("its bytes do not give the checksum written with them")
    return arrays


def _checksum(arrays: Arrays, space: str) -> str:
    digest = hashlib.sha256(space.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_block(folder: Path, arrays: Arrays, space: str) -> None:
    """Commit the newest block of ``folder``, whose lock the caller holds. Raises ``CacheError``."""
    numbers = [int(path.name.split("-")[1]) for path in folder.glob("block-*")]
    # the number orders blocks, the random part tells a new block from a cleared one with the same number
    name = f"block-{max(numbers, default=0) + 1:06d}-{secrets.token_hex(4)}.safetensors"
    write_sealed(folder / name, arrays, space)


def read_block(path: Path, space: str) -> Arrays:
    """Read and check a block. Raises ``Damaged`` and ``OSError``."""
    arrays = read_sealed(path, space)
    if absent := {"keys", "sums", "counts"} - arrays.keys():
        raise Damaged(f"no {', '.join(sorted(absent))}")
    return arrays


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
    """Where each response's values are, over all blocks of one space. Where two blocks hold the same response (token
    values were requested later, say) its sum is that of the older block: a value once returned never changes."""

    def __init__(self, folder: Path, space: str) -> None:
        self.folder, self.space = folder, space
        self._read: set[str] = set()
        self.sums = np.empty(0, np.float64)
        self.counts = np.empty(0, np.int32)
        self.token_values = np.empty(0, np.float32)
        self.token_starts = np.empty(0, np.int64)  # into token_values, -1 where a row has none
        self._keys = np.empty(0, KEY)
        self._first = [self._first_rows(np.empty(0, np.int64))] * 2  # of all rows, and of those with token values

    def refresh(self) -> None:
        """Read new blocks. A damaged one is moved aside with a warning; its values are missing."""
        new = []
        for path in block_files(self.folder):
            if path.name in self._read:
                continue
            try:
                with cache_errors(path), suppress(FileNotFoundError):  # cleared since it was listed
                    new.append(read_block(path, self.space))
                    self._read.add(path.name)
            except Damaged as damage:
                _move_aside(path)
                log.warning("cache block %s is damaged (%s): moved aside, its responses are scored again", path, damage)
        if new:
            self._append(new)

    def find(self, keys: KeyArray, *, token_values: bool = False) -> IndexArray:
        """Rows of ``keys`` [N] into ``sums`` and ``counts``, or ``token_starts`` if ``token_values``; -1 if missing."""
        among, rows = self._first[token_values]
        at, found = find_sorted(keys, among)
        return np.where(found, rows[at], -1) if len(rows) else np.full(len(keys), -1, np.int64)

    def _append(self, blocks: list[Arrays]) -> None:
        starts = []
        total = len(self.token_values)
        for block in blocks:
            if "token_values" in block:
                ends = total + np.cumsum(block["counts"], dtype=np.int64)
                starts.append(ends - block["counts"])
                total += len(block["token_values"])
            else:
                starts.append(np.full(len(block["keys"]), -1, np.int64))
        tokens = [b["token_values"] for b in blocks if "token_values" in b]
        self._keys = np.concatenate([self._keys, *(b["keys"].reshape(-1).view(KEY) for b in blocks)])
        self.sums = np.concatenate([self.sums, *(b["sums"] for b in blocks)])
        self.counts = np.concatenate([self.counts, *(b["counts"] for b in blocks)])
        self.token_values = np.concatenate([self.token_values, *tokens])
        self.token_starts = np.concatenate([self.token_starts, *starts])
        with_tokens = np.flatnonzero(self.token_starts >= 0)
        self._first = [self._first_rows(np.arange(len(self._keys))), self._first_rows(with_tokens)]

    def _first_rows(self, rows: IndexArray) -> tuple[KeyArray, IndexArray]:
        """The distinct keys of ``rows``, sorted, and the first row of each."""
        keys, first = np.unique(self._keys[rows], return_index=True)
        return keys, rows[first]


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
        keys = [_keys_in(path) for path in block_files(folder)]
        distinct = len(np.unique(np.concatenate(keys))) if keys else 0
        used = datetime.fromtimestamp(last_used(folder), UTC)
        spaces.append(SpaceInfo(folder.name, _about(folder), distinct, len(keys), size_of(folder), used))
    return sorted(spaces, key=lambda s: s.last_used, reverse=True)


def verify(root: Path | None = None, *, repair: bool = False) -> list[tuple[Path, str]]:
    """Check every file of every space against its checksum; the damaged files, each with the reason.

    ``repair`` takes them out of use: blocks are kept as ``*.damaged`` and their responses are scored again when they
    are next needed; a plan or description is made anew.
    """
    damaged = []
    for folder in reference_entries(root):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with cache_errors(path):
                    (read_block if path.name.startswith("block-") else read_sealed)(path, folder.name)
            except Damaged as damage:
                damaged.append((path, str(damage)))
        if (folder / "about.json").exists() and not _about(folder):
            damaged.append((folder / "about.json", "unreadable"))
    for path, _ in damaged if repair else ():
        _move_aside(path)
    return damaged


def _move_aside(path: Path) -> None:
    with cache_errors(path), suppress(FileNotFoundError):  # another process may be first
        path.rename(path.with_name(path.name + ".damaged"))


def _keys_in(path: Path) -> KeyArray:
    try:
        with safe_open(path, framework="numpy") as file:
            keys = file.get_tensor("keys")
        return np.ascontiguousarray(keys).reshape(-1).view(KEY)
    except (SafetensorError, ValueError, OSError):
        return np.empty(0, KEY)  # `verify` reports it


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "about.json").read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
