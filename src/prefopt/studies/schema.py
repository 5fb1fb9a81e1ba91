"""What a study file holds, and how one of an older version becomes one of today.

Facts are appended and never changed: items, and the events of people (an item was shown, a vote, a skip, an undo).
``assignment`` and ``queue`` are what follows from the events, kept up in the same transaction so that the next item
and the vote in force are found by an index; :func:`rebuild` makes them from the events alone.
"""

from __future__ import annotations

import json
import sqlite3

from prefopt.errors import StudyError
from prefopt.studies.seal import COUNTER, SEALED, seal_all

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
