"""Blocks of reference values on disk, and the index over all blocks of one space.

A block is a safetensors file with

- ``keys`` uint8 [n, 16]: names of responses (``Group.key``);
- ``sums`` float64 [n]: log-probability of the response, natural logarithm, summed over its scored tokens;
- ``counts`` int32 [n]: how many tokens that are;
- ``token_values`` float32 [sum of counts], only where a loss asked for them: their log-probabilities.

It carries a SHA-256 over its contents and the space it belongs to, is written once and never changed.
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
from prefopt.data.table import KEY

log = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]


def write_sealed(path: Path, arrays: Arrays, space: str) -> None:
    """Write named arrays with a checksum over names, types, shapes, bytes and ``space``. Raises ``CacheError``."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_cached(path, safetensors.numpy.save(arrays, metadata={"sha256": _seal(arrays, space)}))


def read_sealed(path: Path, space: str) -> Arrays:
    """Read what ``write_sealed`` wrote. Raises ``Damaged``, and ``OSError`` where the file cannot be read at all."""
    data = path.read_bytes()
    try:
        arrays: Arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        sealed = header["__metadata__"]["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise Damaged("truncated or unreadable") from error
    if sealed != _seal(arrays, space):
        raise Damaged("its bytes do not give the checksum written with them")
    return arrays


def _seal(arrays: Arrays, space: str) -> str:
    digest = hashlib.sha256(space.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Values of n responses; see the module's docstring."""

    keys: npt.NDArray[np.uint8]
    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int32]
    token_values: npt.NDArray[np.float32] | None = None

    def write(self, folder: Path, space: str) -> Path:
        """Commit as the newest block of ``folder``, whose lock the caller holds. Raises ``CacheError``."""
        numbers = [int(path.name.split("-")[1]) for path in folder.glob("block-*")]
        # the number orders blocks, the random part tells a new block from a cleared one with the same number
        path = folder / f"block-{max(numbers, default=0) + 1:06d}-{secrets.token_hex(4)}.safetensors"
        arrays: Arrays = {"keys": self.keys, "sums": self.sums, "counts": self.counts}
        if self.token_values is not None:
            arrays["token_values"] = self.token_values
        write_sealed(path, arrays, space)
        return path

    @classmethod
    def read(cls, path: Path, space: str) -> Block:
        """Read and check a block. Raises ``Damaged`` and ``OSError``."""
        arrays = read_sealed(path, space)
        try:
            return cls(arrays["keys"], arrays["sums"], arrays["counts"], arrays.get("token_values"))
        except KeyError as error:
            raise Damaged(f"no {error}") from error


def block_files(folder: Path) -> list[Path]:
    """The blocks of a space, oldest first."""
    return sorted(folder.glob("block-*.safetensors"))


def move_aside(path: Path) -> None:
    """Take a damaged file out of use, keeping it for whoever wants to look."""
    with cache_errors(path), suppress(FileNotFoundError):  # another process may be first
        path.rename(path.with_name(path.name + ".damaged"))


class Index:
    """Where each response's values are, over all blocks of one space.

    Where two blocks hold the same response (token values were asked for later, say) its sum is the one of the older
    block: a value once given out never changes.
    """

    def __init__(self, folder: Path, space: str) -> None:
        self.folder, self.space = folder, space
        self._seen: set[str] = set()
        self.sums = np.empty(0, np.float64)
        self.counts = np.empty(0, np.int32)
        self.token_values = np.empty(0, np.float32)
        self.token_starts = np.empty(0, np.int64)  # into token_values, -1 where a row has none
        self._keys = np.empty(0, KEY)
        self._any, self._with_tokens = _Rows(self._keys, self._keys == b""), _Rows(self._keys, self._keys == b"")

    def refresh(self) -> None:
        """Take in the blocks that appeared since. A damaged one is moved aside and said; its values are missing."""
        new = []
        for path in block_files(self.folder):
            if path.name in self._seen:
                continue
            try:
                with cache_errors(path), suppress(FileNotFoundError):  # cleared since it was listed
                    new.append(Block.read(path, self.space))
                    self._seen.add(path.name)
            except Damaged as damage:
                move_aside(path)
                log.warning("cache block %s is damaged (%s): moved aside, its responses are scored again", path, damage)
        if new:
            self._append(new)

    def find(self, keys: npt.NDArray[np.bytes_], *, token_values: bool = False) -> npt.NDArray[np.int64]:
        """Rows of ``keys`` [N] into ``sums`` and ``counts``, or ``token_starts`` if ``token_values``; -1 if missing."""
        return (self._with_tokens if token_values else self._any).find(keys)

    def _append(self, blocks: list[Block]) -> None:
        starts = []
        total = len(self.token_values)
        for block in blocks:
            if block.token_values is None:
                starts.append(np.full(len(block.keys), -1, np.int64))
            else:
                ends = total + np.cumsum(block.counts, dtype=np.int64)
                starts.append(ends - block.counts)
                total += len(block.token_values)
        tokens = [b.token_values for b in blocks if b.token_values is not None]
        self._keys = np.concatenate([self._keys, *(b.keys.reshape(-1).view(KEY) for b in blocks)])
        self.sums = np.concatenate([self.sums, *(b.sums for b in blocks)])
        self.counts = np.concatenate([self.counts, *(b.counts for b in blocks)])
        self.token_values = np.concatenate([self.token_values, *tokens])
        self.token_starts = np.concatenate([self.token_starts, *starts])
        self._any = _Rows(self._keys, np.ones(len(self._keys), np.bool_))
        self._with_tokens = _Rows(self._keys, self.token_starts >= 0)


class _Rows:
    """First row of each key among the rows allowed."""

    def __init__(self, keys: npt.NDArray[np.bytes_], allowed: npt.NDArray[np.bool_]) -> None:
        rows = np.nonzero(allowed)[0]
        self._keys, first = np.unique(keys[rows], return_index=True)
        self._rows = rows[first]

    def find(self, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._rows[at], -1)


@dataclass(frozen=True, slots=True)
class SpaceInfo:
    """One space: ``about`` as written when it was made (empty if unreadable), distinct ``responses``, size on disk."""

    id: str
    about: dict[str, Any]
    responses: int
    blocks: int
    bytes: int
    last_used: datetime


@dataclass(frozen=True, slots=True)
class DamagedFile:
    """A file of the cache that is not what was written."""

    space: str
    file: Path
    what: str


def list_spaces(root: Path | None = None) -> list[SpaceInfo]:
    """All spaces, last used first. Reads the names in the blocks, not the values; ``verify`` checks those."""
    spaces = [_info(folder) for folder in reference_entries(root)]
    return sorted(spaces, key=lambda s: s.last_used, reverse=True)


def verify(root: Path | None = None, *, repair: bool = False) -> list[DamagedFile]:
    """Check every file of every space against its checksum.

    ``repair`` takes the damaged ones out of use: blocks are kept as ``*.damaged`` and what they held is scored again
    when it is next needed; a plan or description is made anew.
    """
    problems = []
    for folder in reference_entries(root):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with cache_errors(path):
                    if path.name.startswith("block-"):
                        Block.read(path, folder.name)
                    else:
                        read_sealed(path, folder.name)
            except Damaged as damage:
                problems.append(DamagedFile(folder.name, path, str(damage)))
        if (folder / "about.json").exists() and not _about(folder):
            problems.append(DamagedFile(folder.name, folder / "about.json", "unreadable"))
    if repair:
        for problem in problems:
            move_aside(problem.file)
    return problems


def _info(folder: Path) -> SpaceInfo:
    blocks = block_files(folder)
    keys = [_block_keys(path) for path in blocks]
    distinct = len(np.unique(np.concatenate(keys))) if keys else 0
    used = datetime.fromtimestamp(last_used(folder), UTC)
    return SpaceInfo(folder.name, _about(folder), distinct, len(blocks), size_of(folder), used)


def _block_keys(path: Path) -> np.ndarray[Any, np.dtype[np.bytes_]]:
    try:
        with safe_open(path, framework="numpy") as file:
            keys = file.get_tensor("keys")
        return np.ascontiguousarray(keys).reshape(-1).view(KEY)
    except (SafetensorError, ValueError, OSError):
        return np.empty(0, KEY)  # for `verify` to tell


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "about.json").read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
