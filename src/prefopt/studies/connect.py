"""Connections to study files: every one with the same care, and its failures in one line."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.disk.write import sync_folder
from prefopt.errors import StudyError
from prefopt.studies.schema import APPLICATION_ID, MAGIC
from prefopt.studies.seal import Damaged

BUSY_SECONDS = 20.0
"""How long a writer waits for another one before it gives up."""


def is_study(path: Path) -> bool:
    """Whether a file is a study, told from its header: SQLite's mark, and ours behind it."""
    try:
        if not path.is_file():  # opening a pipe waits for whoever writes into it
            return False
        with path.open("rb") as file:
            head = file.read(72)
    except (OSError, ValueError):
        return False
    return head.startswith(MAGIC) and head[68:72] == APPLICATION_ID.to_bytes(4, "big")


def own_file(path: Path) -> None:
    """Make an empty file that nobody but its owner can read; SQLite gives its log the same rights."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def check_file(path: Path) -> None:
    """Refuse what is no study file. Raises :class:`StudyError`."""
    if not path.exists():
        raise StudyError(f"{path}: no such study; make one with prefopt collect new {path}")
    if path.is_dir():
        raise StudyError(f"{path}: is a folder; name the study's file")
    try:
        with path.open("rb") as file:
            head = file.read(72)
    except OSError as error:
        raise StudyError(f"{path}: cannot be opened ({error.strerror})") from error
    if not head.startswith(MAGIC):
        what = "is empty" if not head else "is no SQLite file"
        raise StudyError(f"{path}: {what}, so it is no study; name one that prefopt collect new made")
    if not is_study(path):
        raise StudyError(f"{path}: is an SQLite file of something else; name a study that prefopt collect new made")


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection without implicit transactions; writers find what they commit on the disk when it returns."""
    mode = "ro" if read_only else "rw"
    if read_only and not _has_log(path) and not _can_write(path.parent):
        mode = "ro&immutable=1"  # nobody can be writing there
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """What SQLite raises, and damage to rows, as a :class:`StudyError` in one line that says what to do."""
    try:
        yield
    except Damaged as error:
        raise StudyError(
            f"{path}: is damaged: {error}; prefopt collect check {path} lists all of it; go back to a copy that"
            " prefopt collect backup made"
        ) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        said = str(error)
        if code.startswith("SQLITE_FULL") or "full" in said:
            what = "the disk is full, so nothing was stored; make room and try again"
        elif code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            what = f"another process has been writing for {BUSY_SECONDS:.0f} seconds; try again"
        elif code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            what = f"cannot be written ({said}); check the rights of the file and of its folder"
        elif code.startswith("SQLITE_IOERR"):
            what = f"the disk failed ({said}), so nothing was stored; check the disk and try again"
        elif isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # our own mistake
        else:  # a page, or text or structure that is not what this program wrote
            what = f"is damaged ({said}); go back to a copy that prefopt collect backup made"
        raise StudyError(f"{path}: {what}") from error


def put_in_place(aside: Path, path: Path) -> None:
    """Give a finished file its name, never in the place of another. Raises ``FileExistsError``."""
    try:
        os.link(aside, path)
    except FileExistsError:
        raise
    except OSError as error:  # a disk without hard links
        if path.exists():
            raise FileExistsError(path) from error
        aside.rename(path)
    sync_folder(path.parent)


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def _can_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK)
