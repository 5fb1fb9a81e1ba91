"""Connections to study files: every one with the same care, and its failures in one line.

Facts are appended and never changed: items, and the events of people (an item was shown, a vote, a skip, an undo).
``assignment`` and ``queue`` are what follows from the events, kept up in the same transaction so that the next item
and the vote in force are found by an index; :func:`rebuild` makes them from the events alone.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.core.files import sync_folder
from prefopt.errors import StudyError
from prefopt.studies.digests import COUNTER, SEALED, Damaged, seal_all

APPLICATION_ID = 0x70724673
"""Bytes 68 to 71 of the file: tells a study from any other SQLite database."""

MAGIC = b"SQLite format 3\0"

_FIRST = """
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sampling (id INTEGER PRIMARY KEY, settings TEXT NOT NULL UNIQUE);
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    prompt_key BLOB NOT NULL,
    row TEXT NOT NULL,
    count INTEGER NOT NULL,
    origins TEXT NOT NULL,
    gold TEXT,
    file TEXT NOT NULL,
    file_row INTEGER NOT NULL,
    at TEXT NOT NULL
);
CREATE INDEX item_gold ON item (id) WHERE gold IS NOT NULL;
CREATE TABLE annotator (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    pseudonym TEXT NOT NULL UNIQUE,
    lead INTEGER NOT NULL DEFAULT 0,
    at TEXT NOT NULL
);
CREATE TABLE invitation (
    digest BLOB PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    at REAL NOT NULL,
    until REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE session (
    digest BLOB PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    at REAL NOT NULL,
    until REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    item INTEGER NOT NULL REFERENCES item (id),
    kind TEXT NOT NULL CHECK (kind IN ('shown', 'vote', 'skip', 'undo')),
    ticket TEXT NOT NULL,
    undoes INTEGER REFERENCES event (id),
    body TEXT NOT NULL
);
CREATE UNIQUE INDEX event_once ON event (ticket) WHERE kind IN ('vote', 'skip');
CREATE UNIQUE INDEX event_undone_once ON event (undoes) WHERE undoes IS NOT NULL;
CREATE INDEX event_of ON event (annotator, id);
CREATE TRIGGER event_stays BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE TRIGGER event_kept BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are never removed'); END;
CREATE TABLE assignment (
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    item INTEGER NOT NULL REFERENCES item (id),
    state TEXT NOT NULL CHECK (state IN ('pending', 'lapsed', 'voted', 'skipped')),
    ticket TEXT NOT NULL,
    shown TEXT NOT NULL,
    since REAL NOT NULL,
    until REAL NOT NULL,
    event INTEGER REFERENCES event (id),
    PRIMARY KEY (annotator, item)
) WITHOUT ROWID;
CREATE INDEX assignment_waiting ON assignment (until) WHERE state = 'pending';
CREATE INDEX assignment_open ON assignment (annotator, since) WHERE state IN ('pending', 'lapsed');
CREATE INDEX assignment_in_force ON assignment (item) WHERE state IN ('voted', 'skipped');
"""

# The second version finds the next item through a queue instead of counting votes.
_QUEUE = """
CREATE TABLE queue (
    item INTEGER PRIMARY KEY REFERENCES item (id),
    taken INTEGER NOT NULL DEFAULT 0,
    votes INTEGER NOT NULL DEFAULT 0,
    fresh INTEGER NOT NULL DEFAULT 1,
    place INTEGER
);
CREATE INDEX queue_fresh ON queue (item) WHERE fresh = 1;
CREATE INDEX queue_waiting ON queue (place) WHERE place IS NOT NULL;
ALTER TABLE annotator ADD COLUMN cursor INTEGER NOT NULL DEFAULT 0;
ALTER TABLE annotator ADD COLUMN seen INTEGER NOT NULL DEFAULT 0;
CREATE UNIQUE INDEX assignment_ticket ON assignment (ticket);
CREATE INDEX assignment_latest ON assignment (annotator, event) WHERE event IS NOT NULL;
"""
# The third has a digest in every row that exports depend on, and finds the events of an item.
_SEALS = "".join(f"ALTER TABLE {table} ADD COLUMN seal BLOB;\n" for table in SEALED)
_SEALS += "CREATE INDEX event_on ON event (item);\n"
MIGRATIONS = (_FIRST, _QUEUE, _SEALS)
VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, file: str) -> None:
    """Bring a database, empty or of an older version, to today's: all of it or nothing. Raises :class:`StudyError`."""
    version = check_version(connection, file)
    if version == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]  # another process may have been first
        for number in range(version, VERSION):
            for statement in _statements(MIGRATIONS[number]):
                connection.execute(statement)
        if 0 < version < VERSION:
            rebuild(connection)
            seal_all(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def check_version(connection: sqlite3.Connection, file: str) -> int:
    """The version of a study; one of a newer prefopt is refused. Raises :class:`StudyError`."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise StudyError(
            f"{file}: is a study of version {version}, and this prefopt knows versions up to {VERSION}; update prefopt"
        )
    return version


def rebuild(connection: sqlite3.Connection) -> None:
    """Make assignments and queue anew from items and events, inside of the caller's transaction.

    What was shown and not answered is taken up again, its lease run out, when its annotator comes back.
    """
    connection.execute("DELETE FROM assignment")
    connection.execute("DELETE FROM queue")
    connection.execute("DELETE FROM setting WHERE name = ?", (COUNTER,))
    connection.execute("UPDATE annotator SET cursor = 0, seen = 0")
    columns = "id, annotator, item, kind, ticket, body, CAST(strftime('%s', at) AS REAL)"
    for id, annotator, item, kind, ticket, body, at in connection.execute(f"SELECT {columns} FROM event ORDER BY id"):
        if kind == "shown":
            connection.execute(
                "INSERT INTO assignment VALUES (?, ?, 'lapsed', ?, ?, ?, ?, NULL)"
                " ON CONFLICT (annotator, item) DO NOTHING",
                (annotator, item, ticket, json.dumps(json.loads(body)["order"]), at, at),
            )
            continue
        state = {"vote": "voted", "skip": "skipped", "undo": "lapsed"}[kind]
        connection.execute(
            "UPDATE assignment SET state = ?, ticket = ?, event = ?, since = ? WHERE annotator = ? AND item = ?",
            (state, ticket, None if kind == "undo" else id, at, annotator, item),
        )
    connection.execute(
        "UPDATE annotator SET seen = (SELECT count(*) FROM assignment a WHERE a.annotator = annotator.id)"
    )
    overlap = int(json.loads(connection.execute("SELECT value FROM setting WHERE name = 'overlap'").fetchone()[0]))
    connection.execute(
        "INSERT INTO queue (item, taken, votes, fresh, place)"
        " SELECT id, votes, votes, touched = 0, CASE WHEN touched > 0 AND votes < ? THEN id END FROM ("
        "  SELECT i.id, count(a.item) AS touched, coalesce(sum(a.state = 'voted'), 0) AS votes"
        "  FROM item i LEFT JOIN assignment a ON a.item = i.id WHERE i.gold IS NULL GROUP BY i.id)",
        (overlap,),
    )


def _statements(script: str) -> list[str]:
    """The statements of a script; ``executescript`` would commit before it begins."""
    found, held = [], ""
    for line in script.splitlines():
        held += line + "\n"
        if sqlite3.complete_statement(held):
            found.append(held.strip())
            held = ""
    return found


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
