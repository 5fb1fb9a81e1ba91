"""What is kept in the cache, entry by entry: folders with an id for a name, a lock beside them, and a time of last use.

Entries are the spaces of reference values (12 hex digits), tokenised data (16) and samples that were drawn to be
compared (20).
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from pathlib import Path

from prefopt.disk.cache import (
    acquired,
    cache_errors,
    cache_root,
    reference_folder,
    samples_folder,
    space_lock,
    tokens_folder,
)
from prefopt.errors import CacheError

SAMPLES = "samples.jsonl"
USED = ("about.json", "manifest.json", f"{SAMPLES}.run.json")
"""The files whose modification time notes the last use of an entry."""


def reference_entries(root: Path | None = None) -> list[Path]:
    """The spaces of reference values, by id."""
    return _named(reference_folder(root), 12)


def token_entries(root: Path | None = None) -> list[Path]:
    """The folders of tokenised data, by id."""
    return _named(tokens_folder(root), 16)


def sample_entries(root: Path | None = None) -> list[Path]:
    """The folders of samples, by id."""
    return _named(samples_folder(root), 20)


def model_of(folder: Path) -> str:
    """The model that samples were drawn from, as it was named then."""
    try:
        return str(json.loads((folder / f"{SAMPLES}.run.json").read_text("utf-8"))["options"]["model"])
    except Exception:
        return "description unreadable"


def used(folder: Path) -> None:
    """Note that an entry was used now."""
    for mark in (folder / name for name in USED):
        if mark.exists():
            mark.touch()


def _named(parent: Path, digits: int) -> list[Path]:
    with cache_errors(parent):
        names = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in names if re.fullmatch(f"[0-9a-f]{{{digits}}}", path.name) and path.is_dir()]


def last_used(folder: Path) -> float:
    """Seconds since the epoch."""
    marks = [folder / name for name in USED]
    return next((mark for mark in marks if mark.exists()), folder).stat().st_mtime


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def clear(root: Path | None = None, ids: Collection[str] | None = None, *, older_than_days: float | None = None) -> int:
    """Remove entries: all, those named, those not used for so long, or both conditions together. Gives bytes freed.

    Raises ``CacheError`` before removing anything where an id is unknown or a process is writing into one of them.
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
        # out of sight first: a reader sees the whole entry or none of it
        gone = folder.with_name(folder.name + ".removed")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            folder.rename(gone)
            shutil.rmtree(gone)
