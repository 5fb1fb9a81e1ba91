"""The spaces of the reference cache from outside: list and verify. No torch, no model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from prefopt.core.cache_folder import Damaged, cache_errors, last_used, reference_entries, size_of
from prefopt.data.table import KEY
from prefopt.reference.blocks import Block, block_files, move_aside, read_sealed


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
    spaces = [_info(folder) for folder in reference_entries(root)]
    return sorted(spaces, key=lambda s: s.last_used, reverse=True)


def verify(root: Path | None = None, *, repair: bool = False) -> list[Problem]:
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
                problems.append(Problem(folder.name, path, str(damage)))
        if (folder / "about.json").exists() and not _about(folder):
            problems.append(Problem(folder.name, folder / "about.json", "unreadable"))
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
