"""Hashes of files, remembered for as long as the file is certainly the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from prefopt.core.cache_folder import acquired, cache_root, write_cached
from prefopt.errors import ModelError, UserError

log = logging.getLogger(__name__)

# Two writes within one tick of a file system's clock leave the same times behind (FAT's tick is two seconds), so a
# file touched so recently may change again unseen: it is hashed again each time until it has come to rest.
RACY_SECONDS = 2.5
LARGE_BYTES = 1 << 30

Signature = list[int]


def file_hashes(paths: Sequence[Path], root: Path | None = None, *, error: type[UserError] = ModelError) -> list[str]:
    """SHA-256 (hex) of each file's bytes, in the order of ``paths``.

    Remembered in ``hashes.json`` of the cache by real path, device, inode, size and times. The time of the last
    change of the inode is among them, because a copy can set a file's modification time back, but not that one.
    Raises ``error`` where a file cannot be read, ``CacheError`` where the memory cannot be written.
    """
    memo_path = (root or cache_root()) / "hashes.json"
    real = [Path(os.path.realpath(p)) for p in paths]
    memo = _read_memo(memo_path)
    known: dict[Path, str] = {}
    for path in set(real):
        entry = memo.get(str(path))
        if entry is not None and entry[0] == _signature(path, error):
            known[path] = entry[1]
    todo = sorted(set(real) - set(known))
    size = sum(_signature(path, error)[2] for path in todo)
    if size > LARGE_BYTES:
        log.warning("hashing %.1f GB (remembered until they change)", size / 1e9)
    with ThreadPoolExecutor(min(4, len(todo) or 1)) as pool:
        results = list(pool.map(lambda path: _hash(path, error), todo))
    known |= {path: digest for path, (digest, _) in zip(todo, results, strict=True)}
    at_rest = {str(p): (sign, digest) for p, (digest, sign) in zip(todo, results, strict=True) if sign is not None}
    if at_rest:
        _remember(memo_path, at_rest)
    return [known[path] for path in real]


def _hash(path: Path, error: type[UserError]) -> tuple[str, Signature | None]:
    """The digest and the signature to remember it by: None where the file has only just changed.

    The signature is from before reading, so that of a file written meanwhile differs at the next look.
    """
    before, started = _signature(path, error), time.time_ns()
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as failure:
        raise error(f"{path}: {failure.strerror}; make the file readable") from failure
    newest = max(before[3], before[4])
    return digest, before if started - newest > RACY_SECONDS * 1e9 else None


def _signature(path: Path, error: type[UserError]) -> Signature:
    try:
        stat = path.stat()
    except OSError as failure:
        raise error(f"{path}: {failure.strerror}; download or copy it again") from failure
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_memo(path: Path) -> dict[str, tuple[Signature, str]]:
    """What is remembered. A memory that cannot be read is only a memory lost: the files are hashed again."""
    try:
        entries = json.loads(path.read_text())["files"]
        return {name: ([int(n) for n in sign], str(digest)) for name, (sign, digest) in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(path: Path, new: dict[str, tuple[Signature, str]]) -> None:
    lock = FileLock(path.with_suffix(".lock"))
    while not acquired(lock, seconds=1):
        pass  # held for the moment of one small write
    try:  # read again under the lock: another process may have added its own
        entries = {name: entry for name, entry in _read_memo(path).items() if Path(name).exists()} | new
        write_cached(path, json.dumps({"files": entries}, indent=0).encode())
    finally:
        lock.release()
