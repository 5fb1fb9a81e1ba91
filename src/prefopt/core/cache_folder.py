"""The cache: its folders, locks and entries, and the remembered hashes of files.

Entries are reference log-probabilities (12 hex digits), tokenised data (16) and samples drawn for comparisons (20).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prefopt.core.files import FULL, expanded, replace_file
from prefopt.errors import CacheError, ModelError, UserError

log = logging.getLogger(__name__)


class Damaged(Exception):
    """A file of the cache is not what was written there."""


def cache_root() -> Path:
    """``PREFOPT_CACHE``, else ``$XDG_CACHE_HOME/prefopt``, else ``~/.cache/prefopt``; it need not exist yet."""
    if named := os.environ.get("PREFOPT_CACHE"):
        return expanded(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prefopt"


def reference_folder(root: Path | None = None) -> Path:
    return (root or cache_root()) / "reference"


def tokens_folder(root: Path | None = None) -> Path:
    return (root or cache_root()) / "tokens"


def samples_folder(root: Path | None = None) -> Path:
    return (root or cache_root()) / "samples"


def space_lock(folder: Path) -> FileLock:
    """The lock that a writer of an entry holds. It lies beside the folder of the entry and outlives it."""
    return FileLock(folder.with_name(folder.name + ".lock"))


def acquired(lock: FileLock, seconds: float = 0) -> bool:
    """Try to take a lock; the system frees it when its holder dies. Raises ``CacheError``."""
    path = Path(lock.lock_file)
    with cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            return False
    return True


@contextmanager
def space_locked(folder: Path, stop: Callable[[], None] | None = None) -> Iterator[None]:
    """In this block the caller alone writes the entry ``folder``. ``stop`` is called while it waits, and may raise."""
    lock = space_lock(folder)
    if not acquired(lock):
        log.warning("another process is scoring the same reference (space %s): waiting for it", folder.name)
        while not acquired(lock, seconds=0.5):
            if stop is not None:
                stop()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about ``path`` into a one-line ``CacheError`` with its remedy."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in FULL else "make it accessible"
        raise CacheError(
            f"cache {path}: {error.strerror or error}; existing entries are kept; {remedy} or set"
            " PREFOPT_CACHE to another folder"
        ) from error


def write_cached(path: Path, data: bytes) -> None:
    """Replace a file of the cache by ``data``, atomically. Raises ``CacheError``.

    The caller holds the lock of the folder: the temporary name is always the same, so that a killed process leaves at
    most one file, which the next writer overwrites.
    """
    with cache_errors(path):
        replace_file(path, data, aside="writing.tmp")


SAMPLES = "samples.jsonl"
USED = ("about.json", "manifest.json", f"{SAMPLES}.run.json")
"""Files whose modification time is the last use of an entry."""


def reference_entries(root: Path | None = None) -> list[Path]:
    """The entries of reference log-probabilities, sorted by id."""
    return _named(reference_folder(root), 12)


def token_entries(root: Path | None = None) -> list[Path]:
    return _named(tokens_folder(root), 16)


def sample_entries(root: Path | None = None) -> list[Path]:
    return _named(samples_folder(root), 20)


def model_of(folder: Path) -> str:
    """The name of the model that samples were drawn from."""
    try:
        return str(json.loads((folder / f"{SAMPLES}.run.json").read_text("utf-8"))["options"]["model"])
    except Exception:  # absent, or damaged in any way: the other entries are still listed
        return "description unreadable"


def used(folder: Path) -> None:
    """Record that an entry is used now."""
    for mark in (folder / name for name in USED):
        if mark.exists():
            mark.touch()


def _named(parent: Path, digits: int) -> list[Path]:
    with cache_errors(parent):
        names = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in names if re.fullmatch(f"[0-9a-f]{{{digits}}}", path.name) and path.is_dir()]


def last_used(folder: Path) -> float:
    """Time of the last use, in seconds since the epoch."""
    marks = [folder / name for name in USED]
    return next((mark for mark in marks if mark.exists()), folder).stat().st_mtime


def size_of(folder: Path) -> int:
    """Bytes of the files of an entry."""
    return sum(path.stat().st_size for path in folder.iterdir())


def clear(root: Path | None = None, ids: Collection[str] | None = None, *, older_than_days: float | None = None) -> int:
    """Remove entries that meet the given conditions; returns the bytes freed.

    Raises ``CacheError``, before removing anything, for an unknown id and for an entry that is being written.
    """
    folders = [*reference_entries(root), *token_entries(root), *sample_entries(root)]
    if ids is not None:
        if unknown := sorted(set(ids) - {folder.name for folder in folders}):
            place = root or cache_root()
            raise CacheError(f"cache {place}: no space {', '.join(unknown)}; see `prefopt cache list`")
        folders = [folder for folder in folders if folder.name in ids]
    if older_than_days is not None:
        before = time.time() - older_than_days * 86400
        folders = [folder for folder in folders if last_used(folder) < before]
    freed = 0
    with ExitStack() as stack:
        for folder in folders:
            lock = space_lock(folder)
            if not acquired(lock):
                raise CacheError(f"cache space {folder.name} is in use: stop the process that is writing it, or wait")
            stack.callback(lock.release)
        for folder in folders:
            freed += size_of(folder)
            remove(folder)
    return freed


def remove(folder: Path) -> None:
    """Remove an entry whose lock is held. Raises ``CacheError``."""
    with cache_errors(folder):
        # renamed first: a reader sees the whole entry or none of it
        gone = folder.with_name(folder.name + ".removed")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            folder.rename(gone)
            shutil.rmtree(gone)


# Two writes within one tick of a file system's clock leave the same times (FAT's tick is two seconds): the hash of a
# file that changed so recently is not remembered.
RACY_SECONDS = 2.5
LARGE_BYTES = 1 << 30

Signature = list[int]


def file_hashes(paths: Sequence[Path], root: Path | None = None, *, error: type[UserError] = ModelError) -> list[str]:
    """SHA-256 (hex) of each file's bytes, in the order of ``paths``.

    Remembered in ``hashes.json`` of the cache by real path, device, inode, size and times, among them the inode's
    change time, which a copy cannot set back. Raises ``error`` for an unreadable file, ``CacheError`` where the cache
    cannot be written.
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
    """The digest, and the signature to remember it by, None for a file that has just changed.

    The signature is from before reading, so that a write in the meantime is noticed next time.
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
    """The remembered hashes; none where they cannot be read: the files are hashed again."""
    try:
        entries = json.loads(path.read_text())["files"]
        return {name: ([int(n) for n in sign], str(digest)) for name, (sign, digest) in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(path: Path, new: dict[str, tuple[Signature, str]]) -> None:
    lock = FileLock(path.with_suffix(".lock"))
    while not acquired(lock, seconds=1):
        pass  # held only for one small write
    try:  # read again under the lock: another process may have added hashes
        entries = {name: entry for name, entry in _read_memo(path).items() if Path(name).exists()} | new
        write_cached(path, json.dumps({"files": entries}, indent=0).encode())
    finally:
        lock.release()
