"""Seals: a digest beside every row that exports depend on, so that a flipped bit is found and never exported.

SQLite notices a broken page, not a changed letter in a vote. Every row of :data:`SEALED` is inserted with the digest of
what it says, and is checked whenever it is read. Rows are numbered without gaps, so that one that is gone, or that no
longer looks like a vote, is missed as well.

>>> seal("sampling", {"settings": "{}"}) == seal("sampling", {"settings": "{ }"})
False
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

SEALED: Mapping[str, tuple[str, ...]] = {
    "setting": ("name", "value"),
    "sampling": ("settings",),
    "item": ("digest", "prompt_key", "row", "count", "origins", "gold", "file", "file_row", "at"),
    "annotator": ("name", "pseudonym", "lead", "at"),
    "event": ("at", "annotator", "item", "kind", "ticket", "undoes", "body"),
}
"""Tables and the columns that their seals cover."""
NUMBERED = ("sampling", "item", "annotator", "event")
"""Tables whose rows have the numbers 1, 2, 3 and so on, and are never removed."""
SEALS = 3
"""The version of a study from which on rows are sealed."""
COUNTER = "last_place"
"""The one setting that changes: how far the queue has come, which follows from the rest."""


class Damaged(Exception):
    """A row is not what was written; ``str()`` names it. It is made a ``StudyError`` where the file's name is known."""


def seal(table: str, values: Mapping[str, Any]) -> bytes:
    """The digest of a row's columns [16 bytes]."""
    said = [table, *(values.get(name) for name in SEALED[table])]
    text = json.dumps([v.hex() if isinstance(v, bytes) else v for v in said])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def insert(connection: sqlite3.Connection, table: str, values: Mapping[str, Any], conflict: str = "") -> sqlite3.Cursor:
    """Insert a row with its seal; ``conflict`` is the clause for a row that is there."""
    columns = [*values, "seal"]
    query = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) {conflict}"
    return connection.execute(query, [*values.values(), seal(table, values)])


def seal_again(connection: sqlite3.Connection, table: str, number: int) -> None:
    """Seal a row whose columns were changed on purpose."""
    row = connection.execute(f"SELECT * FROM {table} WHERE rowid = ?", (number,)).fetchone()
    connection.execute(f"UPDATE {table} SET seal = ? WHERE rowid = ?", (seal(table, dict(row)), number))


def seal_all(connection: sqlite3.Connection) -> None:
    """Seal every row of a study of an older version, as it is found."""
    connection.execute("DROP TRIGGER event_stays")
    for table, columns in SEALED.items():
        key = "name" if table == "setting" else "id"
        rows = connection.execute(f"SELECT {key}, {', '.join(columns)} FROM {table}").fetchall()
        sealed = [(seal(table, dict(zip(columns, row[1:], strict=True))), row[0]) for row in rows if row[0] != COUNTER]
        connection.executemany(f"UPDATE {table} SET seal = ? WHERE {key} = ?", sealed)
    connection.execute(
        "CREATE TRIGGER event_stays BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END"
    )


def check(table: str, row: sqlite3.Row) -> None:
    """Raises :class:`Damaged` where a row is not what was written. Studies of older versions have no seals."""
    if "seal" in row.keys() and row["seal"] != seal(table, dict(row)):  # noqa: SIM118, a Row holds values
        name = row["name"] if table == "setting" else row["id"]
        raise Damaged(f"{table} {name} is not what was written")


def check_complete(connection: sqlite3.Connection, table: str) -> None:
    """Raises :class:`Damaged` where a row of a numbered table is gone.

    Told from the table itself, as all that is counted: SQLite does not compare an index, which has no seals, with it.
    """
    count, last = connection.execute(f"SELECT count(*), coalesce(max(id), 0) FROM {table} NOT INDEXED").fetchone()
    kept = None
    if table == "event":  # the one table whose last number is kept apart
        found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'event'").fetchone()
        kept = found[0] if found else None
    if count != last or kept not in (None, last):
        raise Damaged(f"{max(last, kept or 0) - count} rows of its {table}s are gone")


@contextmanager
def decoding(table: str, number: object) -> Iterator[None]:
    """What a row holds is taken apart inside; whatever is wrong with it, it is :class:`Damaged`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise Damaged(f"{table} {number} cannot be read ({type(error).__name__}: {error})") from error


def problems(connection: sqlite3.Connection) -> Iterator[str]:
    """All that is wrong with a study: pages, rows that are not what was written, rows that are gone, and assignments
    that do not follow from the events."""
    for (line,) in connection.execute("PRAGMA integrity_check(20)").fetchall():
        if line != "ok":
            yield f"SQLite: {line}"
    for table in SEALED:
        for row in _rows(connection, table):
            try:
                if table != "setting" or row["name"] != COUNTER:
                    check(table, row)
            except Damaged as error:
                yield str(error)
        if table in NUMBERED:
            try:
                check_complete(connection, table)
            except Damaged as error:
                yield str(error)
    yield from _assignments(connection)


def _rows(connection: sqlite3.Connection, table: str) -> Iterator[sqlite3.Row]:
    """The rows of a table; text that is no UTF-8 is read all the same, so that the others are looked at."""
    factory, connection.text_factory = connection.text_factory, lambda data: data.decode("utf-8", "surrogateescape")
    try:
        yield from connection.execute(f"SELECT * FROM {table}").fetchall()
    finally:
        connection.text_factory = factory


def _assignments(connection: sqlite3.Connection) -> Iterator[str]:
    """Assignments are kept up beside the events; votes are read from the events alone."""
    last: dict[tuple[int, int], tuple[str, int]] = {}
    for row in connection.execute("SELECT id, annotator, item, kind FROM event ORDER BY id"):
        last[row["annotator"], row["item"]] = (row["kind"], row["id"])
    want = {key: (kind, number) for key, (kind, number) in last.items()}
    for row in connection.execute("SELECT annotator, item, state, event FROM assignment"):
        kind, number = want.pop((row["annotator"], row["item"]), ("", 0))
        states: Sequence[str] = {"vote": ["voted"], "skip": ["skipped"]}.get(kind, ["pending", "lapsed"])
        if row["state"] not in states or row["event"] != (number if kind in ("vote", "skip") else None) or not kind:
            yield f"what annotator {row['annotator']} was given (item {row['item']}) does not follow from the events"
    for annotator, item in want:
        yield f"the assignment of item {item} to annotator {annotator} is gone"
