"""The cache's folder: where it is, who may write into it, and what is said when that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from prefopt.disk.write import replace_file
from prefopt.errors import CacheError


class Damaged(Exception):
    """A file of the cache is not what was written."""


def cache_root() -> Path:
    """``PREFOPT_CACHE``, else ``$XDG_CACHE_HOME/prefopt``, else ``~/.cache/prefopt``; it need not exist yet."""
    if named := os.environ.get("PREFOPT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prefopt"


def reference_folder(root: Path | None = None) -> Path:
    """Where the spaces of reference values are."""
    return (root or cache_root()) / "reference"


def tokens_folder(root: Path | None = None) -> Path:
    """Where tokenised data are."""
    return (root or cache_root()) / "tokens"


def samples_folder(root: Path | None = None) -> Path:
    """Where samples that were drawn to be compared are."""
    return (root or cache_root()) / "samples"


def space_lock(folder: Path) -> FileLock:
    """The lock of an entry of the cache, held by whoever writes into it. It lies beside the folder and outlives it."""
    return FileLock(folder.with_name(folder.name + ".lock"))


def acquired(lock: FileLock, seconds: float = 0) -> bool:
    """Try to take a lock for so long; the system frees it when its holder dies. Raises ``CacheError``."""
    path = Path(lock.lock_file)
    with cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            return False
    return True


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about ``path`` into a one-line ``CacheError`` with its remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make it accessible"
        raise CacheError(
            f"cache {path}: {error.strerror or error}; what was stored before is kept; "
            f"{remedy} or set PREFOPT_CACHE to another folder"
        ) from error


def write_cached(path: Path, data: bytes) -> None:
    """Replace a file of the cache by ``data``, as :func:`replace_file` does. Raises ``CacheError``.

    The caller holds the lock of the folder: the name written aside is always the same, so that a killed process
    leaves at most one stray file, which the next writer overwrites.
    """
    with cache_errors(path):
        replace_file(path, data, aside="writing.tmp")
