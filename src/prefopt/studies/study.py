"""A study: one SQLite file with prompts, their responses, and every event of the annotators who compared them.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp()) / "s.db"
>>> study = Study.create(file, StudySettings(title="Which is better?", overlap=2))
>>> study.settings.overlap, study.revision(), study.close()
(2, (0, 0), None)
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from prefopt import __version__
from prefopt.core.files import aside_of, making_room, sync_folder
from prefopt.errors import StudyError
from prefopt.studies.database import (
    APPLICATION_ID,
    COUNTER,
    SEALS,
    DamagedRow,
    check_row,
    check_version,
    decoding,
    insert,
    migrate,
    problems,
)

MAGIC = b"SQLite format 3\0"
BUSY_SECONDS = 20.0
"""How long a writer waits for another one before it gives up."""
BACKUP_PAGES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """Settings of a study, fixed when it is created.

    - ``overlap``: annotators per item.
    - ``gold_every``: one in so many items that an annotator sees is a gold item, while there are any.
    - ``lease``: seconds that an item stays reserved for the annotator it is shown to.
    - ``instructions``: markdown, shown with the first item.
    - ``seed``: determines the order in which responses are shown.
    """

    title: str = ""
    instructions: str = ""
    overlap: int = 1
    gold_every: int = 10
    lease: float = 1800.0
    tags: tuple[str, ...] = ()
    seed: str = field(default_factory=lambda: secrets.token_hex(16))
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    made_by: str = f"prefopt {__version__}"


class Study:
    """An open study. Any thread may use it: each transaction has its own connection, and writers take turns."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open a study; an older version is migrated unless ``read_only``.

        Raises :class:`StudyError` for a file that is not a study, is damaged, or was written by a newer version.
        """
        self.path, self.read_only = path, read_only
        self._turn = threading.Lock()
        check_file(path)
        with errors_of(path):
            self.connection = connect(path, read_only=read_only)
            self._all, self._idle = [self.connection], [self.connection]
            if not read_only:
                migrate(self.connection, str(path))
            self.version = check_version(self.connection, str(path))
            self.settings = self._settings()

    @classmethod
    def create(cls, path: Path, settings: StudySettings) -> Study:
        """Create an empty study. Raises :class:`StudyError` where ``path`` exists or cannot be written."""
        if path.exists():
            raise StudyError(f"{path}: exists; name another file, or add to it with prefopt collect import")
        with _new_file(path) as aside, errors_of(path):
            connection = sqlite3.connect(aside, isolation_level=None)
            migrate(connection, str(path))
            for name, value in asdict(settings).items():
                insert(connection, "setting", {"name": name, "value": json.dumps(value)})
            connection.close()
        return cls(path)

    @contextmanager
    def _borrowed(self) -> Iterator[sqlite3.Connection]:
        """A connection from the pool: threads come and go, and connections must not accumulate with them."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = connect(self.path, read_only=self.read_only)
            self._all.append(connection)
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._idle.append(connection)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read transaction: one consistent view. Raises :class:`StudyError` for errors of the file or the disk."""
        with errors_of(self.path), self._borrowed() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: on the disk when the block is left, rolled back where it raises."""
        with errors_of(self.path), self._turn, self._borrowed() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def revision(self) -> tuple[int, int]:
        """The number of the last event and the number of items: it changes whenever votes or items do."""
        query = "SELECT (SELECT coalesce(max(id), 0) FROM event), (SELECT count(*) FROM item)"
        with self.reading() as connection:
            event, items = connection.execute(query).fetchone()
        return event, items

    def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settings(self) -> StudySettings:
        found = {}
        for row in self.connection.execute("SELECT * FROM setting WHERE name != ?", (COUNTER,)):
            check_row("setting", row)
            with decoding("setting", row["name"]):
                found[row["name"]] = json.loads(row["value"])
        with decoding("setting", "tags"):
            found["tags"] = tuple(found.get("tags", ()))
        known = {f.name for f in fields(StudySettings)}
        if self.version >= SEALS and (missing := known - found.keys()):
            raise DamagedRow(f"setting {min(missing)} is gone")
        return StudySettings(**{k: v for k, v in found.items() if k in known})


def now() -> str:
    """The time in UTC to the millisecond, as events store it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def backup(path: Path, output: Path) -> int:
    """Copy a study to a single file, also while it is served; returns the size in bytes. Raises :class:`StudyError`
    where ``output`` exists or cannot be written, and for a study that is damaged."""
    check_file(path)
    if output.exists():
        raise StudyError(f"{output}: exists; name another file")
    with _new_file(output) as aside:
        with errors_of(path), closing(sqlite3.connect(aside, isolation_level=None)) as copy:
            with closing(connect(path, read_only=True)) as source:
                source.execute("BEGIN")  # one snapshot for all pages, so that writers do not restart the copy
                source.execute("SELECT count(*) FROM setting").fetchone()
                source.backup(copy, pages=BACKUP_PAGES)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
            copy.row_factory = sqlite3.Row
            found = list(problems(copy))
        if found:
            remedy = f"list all damage with prefopt collect check {path}; restore an earlier backup"
            raise StudyError(f"{path}: is damaged ({found[0]}); {remedy}")
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
    return output.stat().st_size


def check_study_file(path: Path) -> list[str]:
    """Everything wrong with a study, a line each. Raises :class:`StudyError` for a file that is not a study."""
    check_file(path)
    try:
        with errors_of(path), closing(connect(path, read_only=True)) as connection:
            connection.execute("BEGIN")
            check_version(connection, str(path))
            return list(problems(connection))
    except StudyError as error:
        return [str(error).removeprefix(f"{path}: ")]


# -- files ---------------------------------------------------------------------------------------------------------


def is_study(path: Path) -> bool:
    """Whether :func:`check_file` accepts a path."""
    with suppress(StudyError):
        check_file(path)
        return True
    return False


def check_file(path: Path) -> None:
    """Raises :class:`StudyError` for a path that is not a study, by its header: SQLite's and our application id."""
    try:
        if not path.exists():
            raise StudyError(f"{path}: no such study; make one with prefopt collect new {path}")
        if not path.is_file():  # opening a pipe would wait for its writer
            raise StudyError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}; name the study's file")
        with path.open("rb") as file:
            header = file.read(72)
    except OSError as error:
        raise StudyError(f"{path}: cannot be opened ({error.strerror})") from error
    if not header.startswith(MAGIC):
        what = "is not an SQLite file" if header else "is empty"
    elif header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
        what = "is an SQLite file, but not a study"
    else:
        return
    raise StudyError(f"{path}: {what}; name a study made by prefopt collect new")


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection without implicit transactions; a commit returns when its changes are on the disk."""
    mode = "ro" if read_only else "rw"
    log = path.with_name(path.name + "-wal")
    if read_only and not (log.exists() and log.stat().st_size) and not os.access(path.parent, os.W_OK):
        mode = "ro&immutable=1"  # SQLite cannot make its log there, and nobody can be writing
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
    """Turn SQLite errors and damaged rows into a :class:`StudyError` of one line that names the remedy."""
    try:
        yield
    except DamagedRow as error:
        remedy = f"list all damage with prefopt collect check {path}; restore a copy made by prefopt collect backup"
        raise StudyError(f"{path}: is damaged: {error}; {remedy}") from error
    except sqlite3.Error as error:
        code, message = getattr(error, "sqlite_errorname", "") or "", str(error)
        if code.startswith("SQLITE_FULL") or "full" in message:
            what = "the disk is full, so nothing was stored; free some space and try again"
        elif code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            what = f"another process has been writing for {BUSY_SECONDS:.0f} seconds; try again"
        elif code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            what = f"cannot be written ({message}); check the permissions of the file and of its folder"
        elif code.startswith("SQLITE_IOERR"):
            what = f"the disk failed ({message}), so nothing was stored; check the disk and try again"
        elif isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # a bug, not damage
        else:
            what = f"is damaged ({message}); restore a copy made by prefopt collect backup"
        raise StudyError(f"{path}: {what}") from error


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Write a file beside ``path`` that only its owner can read, then give it its name, never replacing another file.

    SQLite gives its log the permissions of the file. Raises :class:`StudyError`.
    """
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield aside
        try:
            os.link(aside, path)
        except OSError as error:  # it exists, or the disk has no hard links
            if path.exists():
                raise FileExistsError(path) from error
            aside.rename(path)
        sync_folder(path.parent)
    except FileExistsError:
        raise StudyError(f"{path}: exists; name another file") from None
    except OSError as error:
        raise StudyError(
            f"{path}: cannot be written ({error.strerror}); {making_room(error)}name another file"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
