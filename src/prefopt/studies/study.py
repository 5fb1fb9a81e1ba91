"""A study: one SQLite file with prompts, their responses, and every event of the people who compared them.

>>> import tempfile
>>> from pathlib import Path
>>> file = Path(tempfile.mkdtemp()) / "s.db"
>>> study = Study.create(file, Settings(title="Which is better?", overlap=2))
>>> study.settings.overlap, study.close()
(2, None)
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from prefopt import __version__
from prefopt.core.files import aside_of
from prefopt.errors import StudyError
from prefopt.studies.database import check_file, check_version, connect, errors_of, migrate, own_file, put_in_place
from prefopt.studies.digests import COUNTER, SEALS, Damaged, check, decoding, insert, problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a study is, fixed when it is made.

    ``overlap``: people who judge every item. ``gold_every``: one in so many items that a person sees is a gold item, as
    long as there are any. ``lease``: seconds that an item shown is kept for its annotator before another may have the
    place. ``instructions`` are markdown. ``seed`` decides on which side a response is shown.
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
    """An open study. Any thread may use it: each transaction has a connection to itself, and writers take turns."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open one, bringing a file of an older version up to date unless it is only read.

        Raises :class:`StudyError` for what is no study, is damaged, or was written by a newer version.
        """
        self.path, self.read_only = path, read_only
        self._all: list[sqlite3.Connection] = []
        self._idle: list[sqlite3.Connection] = []
        self._turn = threading.Lock()
        check_file(path)
        with errors_of(path):
            if not read_only:
                migrate(self.connection, str(path))
            self.version = check_version(self.connection, str(path))
            self.settings = self._settings()

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Study:
        """A new, empty study; a file that is there is never touched. Raises :class:`StudyError`."""
        if path.exists():
            raise StudyError(f"{path}: exists; name another file, or add to it with prefopt collect import")
        aside = aside_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)
            own_file(aside)
            with errors_of(path):
                connection = sqlite3.connect(aside, isolation_level=None)
                migrate(connection, str(path))
                for name, value in asdict(settings).items():
                    insert(connection, "setting", {"name": name, "value": json.dumps(value)})
                connection.close()
            put_in_place(aside, path)
        except FileExistsError:
            raise StudyError(f"{path}: exists; name another file") from None
        except OSError as error:
            raise StudyError(f"{path}: cannot be written ({error.strerror}); make room or name another file") from error
        finally:
            aside.unlink(missing_ok=True)
        return cls(path)

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection that this object was opened with, for reading from one thread."""
        if not self._all:
            self._all.append(connect(self.path, read_only=self.read_only))
            self._idle.append(self._all[0])
        return self._all[0]

    @contextmanager
    def _borrowed(self) -> Iterator[sqlite3.Connection]:
        """A connection of one's own for a while. Threads come and go, and connections must not pile up with them."""
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
        """A view of one moment. Raises :class:`StudyError` for what the file or the disk does."""
        with errors_of(self.path), self._borrowed() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on the disk when the block is left, or nothing where it raises."""
        with errors_of(self.path), self._turn, self._borrowed() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settings(self) -> Settings:
        found = {}
        for row in self.connection.execute("SELECT * FROM setting WHERE name != ?", (COUNTER,)):
            check("setting", row)
            with decoding("setting", row["name"]):
                found[row["name"]] = json.loads(row["value"])
        with decoding("setting", "tags"):
            found["tags"] = tuple(found.get("tags", ()))
        known = {f.name for f in fields(Settings)}
        if self.version >= SEALS and (gone := known - found.keys()):
            raise Damaged(f"setting {min(gone)} is gone")
        return Settings(**{k: v for k, v in found.items() if k in known})


def now() -> str:
    """The time in UTC, to the millisecond, as events keep it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


PAGES = 4096


def backup(path: Path, output: Path) -> int:
    """Copy the study as it is at one moment, also while it is served; the bytes written.

    The copy is made aside, checked and renamed. Raises :class:`StudyError` where ``output`` exists or cannot be
    written, and for a study that is damaged.
    """
    check_file(path)
    if output.exists():
        raise StudyError(f"{output}: exists; name another file")
    aside = aside_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        own_file(aside)
        with errors_of(path):
            source, copy = connect(path, read_only=True), sqlite3.connect(aside, isolation_level=None)
            try:
                with source:
                    source.execute("BEGIN")  # one moment for all pages, so that writers do not start it over
                    source.execute("SELECT count(*) FROM setting").fetchone()
                    source.backup(copy, pages=PAGES)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
                copy.row_factory = sqlite3.Row
                found = list(problems(copy))
            finally:
                copy.close()
                source.close()
        if found:
            raise StudyError(
                f"{path}: is damaged ({found[0]}); prefopt collect check {path} lists all of it; go back to an earlier"
                " backup"
            )
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        put_in_place(aside, output)
        return output.stat().st_size
    except FileExistsError:
        raise StudyError(f"{output}: exists; name another file") from None
    except OSError as error:
        raise StudyError(f"{output}: cannot be written ({error.strerror}); make room or name another file") from error
    finally:
        aside.unlink(missing_ok=True)


def check_study_file(path: Path) -> list[str]:
    """All that is wrong with a study, a line each; one that is served is checked as it is at one moment.

    Raises :class:`StudyError` for what is no study at all.
    """
    check_file(path)
    try:
        with errors_of(path):
            connection = connect(path, read_only=True)
            try:
                connection.execute("BEGIN")
                check_version(connection, str(path))
                return list(problems(connection))
            finally:
                connection.close()
    except StudyError as error:
        return [str(error).removeprefix(f"{path}: ")]
