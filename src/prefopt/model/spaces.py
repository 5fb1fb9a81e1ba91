"""The spaces of the reference cache from outside: list, verify, clear. No torch, no model."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from prefopt.data.table import KEY
from prefopt.disk.cache import Damaged, acquired, cache_errors, reference_folder, space_lock
from prefopt.errors import CacheError
from prefopt.model.blocks import Block, block_files, move_aside, read_sealed


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
class Problem:
    """A file of the cache that is not what was written."""

    space: str
    file: Path
    what: str


def list_spaces(root: Path | None = None) -> list[SpaceInfo]:
    """All spaces, last used first. Reads the names in the blocks, not the values; ``verify`` checks those."""
    spaces = [_info(folder) for folder in _folders(root)]
    return sorted(spaces, key=lambda s: s.last_used, reverse=True)


def verify(root: Path | None = None, *, repair: bool = False) -> list[Problem]:
    """Check every file of every space against its checksum.

    ``repair`` takes the damaged ones out of use: blocks are kept as ``*.damaged`` and what they held is scored again
    when it is next needed; a plan or description is made anew.
    """
    problems = []
    for folder in _folders(root):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with cache_errors(path):
                    if path.name.startswith("block-"):
                        Block.read(path, folder.name)
                    else:
                        read_sealed(path, folder.name)
            except Damaged as damage:
                problems.append(Problem(folder.name, path, str(damage)))
        if (folder / "about.json").exists() and not _about(folder):
            problems.append(Problem(folder.name, folder / "about.json", "unreadable"))
    if repair:
        for problem in problems:
            move_aside(problem.file)
    return problems


def clear(root: Path | None = None, ids: Collection[str] | None = None, *, older_than_days: float | None = None) -> int:
    """Remove spaces: all, those named, those not used for so long, or both conditions together. Gives bytes freed.

    Raises ``CacheError`` before removing anything where an id is unknown or a process is scoring into one of them.
    """
    folders = _folders(root)
    if ids is not None:
        if unknown := sorted(set(ids) - {folder.name for folder in folders}):
            raise CacheError(f"cache {reference_folder(root)}: no space {', '.join(unknown)}; see `prefopt cache list`")
        folders = [folder for folder in folders if folder.name in ids]
    if older_than_days is not None:
        before = time.time() - older_than_days * 86400
        folders = [folder for folder in folders if _last_used(folder) < before]
    freed = 0
    with ExitStack() as stack:
        for folder in folders:
            lock = space_lock(folder)
            if not acquired(lock):
                raise CacheError(f"cache space {folder.name} is in use: stop the process that is scoring, or wait")
            stack.callback(lock.release)
        for folder in folders:
            freed += _size(folder)
            with cache_errors(folder):
                # out of sight first: a reader sees the whole space or none of it
                gone = folder.with_name(folder.name + ".removed")
                shutil.rmtree(gone, ignore_errors=True)
                folder.rename(gone)
                shutil.rmtree(gone)
    return freed


def _folders(root: Path | None) -> list[Path]:
    parent = reference_folder(root)
    with cache_errors(parent):
        names = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in names if re.fullmatch("[0-9a-f]{12}", path.name) and path.is_dir()]


def _info(folder: Path) -> SpaceInfo:
    blocks = block_files(folder)
    keys = [_block_keys(path) for path in blocks]
    distinct = len(np.unique(np.concatenate(keys))) if keys else 0
    used = datetime.fromtimestamp(_last_used(folder), UTC)
    return SpaceInfo(folder.name, _about(folder), distinct, len(blocks), _size(folder), used)


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


def _last_used(folder: Path) -> float:
    about = folder / "about.json"
    return (about if about.exists() else folder).stat().st_mtime


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
