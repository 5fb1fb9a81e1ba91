"""The one way to write a file: aside, flushed, renamed; and what is said when that fails."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from prefopt.errors import RunError

LEFT_SECONDS = 3600.0
"""How long nobody must have written what is taken for a leftover, where no lock says that nobody can."""
_ASIDE = re.compile(r"\.(\d{1,9})(?:-\w+)?$")  # SQLite adds -journal


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """A full or forbidden disk, in one line (``RunError``)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RunError(f"{path}: cannot be written ({reason}); make room or choose another --output") from error


def write_json(path: Path, value: Any) -> None:
    """A JSON file of a run's output, whole or not at all. Raises ``RunError``."""
    with output_errors(path):
        replace_file(path, json.dumps(value, indent=2).encode())


def replace_file(path: Path, data: bytes, *, aside: str | None = None) -> None:
    """Replace ``path`` by ``data``, whole or not at all, also across a power cut; an ``OSError`` leaves it as it was.

    ``aside`` names the file that is written first, beside it; without one each process takes its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    first = path.with_name(aside) if aside else aside_of(path)
    try:
        write_flushed(first, data)
        first.replace(path)
    except OSError:
        first.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # the rename itself becomes durable only with its folder


def aside_of(path: Path) -> Path:
    """Where this process makes what is to become ``path``: ``.NAME.PID`` beside it. What killed ones left goes."""
    if path.parent.is_dir():
        remove_leftovers(path.parent, path.name, seconds=LEFT_SECONDS)
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_leftovers(folder: Path, name: str | None = None, *, seconds: float = 0.0) -> None:
    """Remove what processes that were killed left aside in a folder, of the file ``name`` or of all: what is called as
    :func:`aside_of` has it, whose process is gone, and that nobody has written for ``seconds``.

    Whoever does not hold the folder's lock waits that long: on a disk that machines share, a number that is nobody's
    here may be that of a process elsewhere.
    """
    for left in folder.glob(f".{glob.escape(name) if name else '*'}.*"):
        found = _ASIDE.search(left.name)
        if found is None or int(found[1]) == os.getpid() or psutil.pid_exists(int(found[1])):
            continue
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime < seconds:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there: renamed aside first, so that a kill never leaves half of it under its name."""
    aside = aside_of(folder)
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def write_flushed(path: Path, data: bytes) -> None:
    """A file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; a system without folder handles does it by itself."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
