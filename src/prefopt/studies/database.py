"""Tables of a study, their migrations, and the digests that detect a changed or missing row.

Items and events (an item was shown, a vote, a skip, an undo) are appended and never changed. ``assignment`` and
``queue`` follow from them and are updated in the same transaction, so that the next item and the votes in force are
found by an index; :func:`rebuild` derives them from the events alone.

SQLite detects a broken page, but not a changed letter in a vote. Each row of the tables in :data:`SEALED` therefore has
a digest of its columns in ``seal``, which is checked whenever the row is read. Rows of the tables in :data:`NUMBERED`
have the numbers 1, 2, 3, ..., so that a missing row is detected as well.

>>> seal("sampling", {"settings": "{}"}) == seal("sampling", {"settings": "{ }"})
False
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from prefopt.errors import StudyError

APPLICATION_ID = 0x70724673
"""Bytes 68 to 71 of the file: they tell a study from any other SQLite database."""
SEALED: Mapping[str, tuple[str, ...]] = {
    "setting": ("name", "value"),
    "sampling": ("settings",),
    "item": ("digest", "prompt_key", "row", "count", "origins", "gold", "file", "file_row", "at"),
    "annotator": ("name", "pseudonym", "lead", "at"),
    "event": ("at", "annotator", "item", "kind", "ticket", "undoes", "body"),
}
"""Tables with row digests, and the columns that the digests cover."""
NUMBERED = ("sampling", "item", "annotator", "event")
SEALS = 3
"""The first version of the schema with row digests."""
COUNTER = "last_place"
"""The one setting that changes: the last place of the queue."""

VERSION = 4
"""The schema version: ``migrations/N.sql`` leads from version N - 1 to N."""


EVERYONE = 2**31 - 1
"""The overlap of an item that every annotator judges."""
OWN_OVERLAP = (
    f"CASE json_extract(i.row, '$.overlap') WHEN 'all' THEN {EVERYONE} ELSE json_extract(i.row, '$.overlap') END"
)
"""SQL: the number of annotators that an item i asks for itself, or null."""


class DamagedRow(Exception):
    """A row differs from what was written, or is missing; ``str()`` names it. :func:`study.errors_of` adds the file."""


# -- versions ------------------------------------------------------------------------------------------------------


def check_version(connection: sqlite3.Connection, file: str) -> int:
    """The schema version of a study. Raises :class:`StudyError` for one of a newer prefopt."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise StudyError(f"{file}: is a study of version {version}, newer than {VERSION}; update prefopt")
    return version


def migrate(connection: sqlite3.Connection, file: str) -> None:
    """Migrate an empty database or an older study to :data:`VERSION` in one transaction. Raises :class:`StudyError`."""
    if check_version(connection, file) == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]  # another process may have been first
        for number in range(version + 1, VERSION + 1):
            script = files("prefopt.studies") / "migrations" / f"{number}.sql"
            for statement in script.read_text("utf-8").split(";\n"):  # executescript() would commit first
                connection.execute(statement)
        if 0 < version < VERSION:
            rebuild(connection)
        if 0 < version < SEALS:
            _seal_all(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _seal_all(connection: sqlite3.Connection) -> None:
    """Add the digests of all rows of an older study."""
    connection.execute("DROP TRIGGER event_stays")
    for table in SEALED:
        key = "name" if table == "setting" else "id"
        rows = connection.execute(f"SELECT * FROM {table}").fetchall()
        sealed = [(seal(table, dict(row)), row[key]) for row in rows if row[key] != COUNTER]
        connection.executemany(f"UPDATE {table} SET seal = ? WHERE {key} = ?", sealed)
    connection.execute(
        "CREATE TRIGGER event_stays BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END"
    )


def rebuild(connection: sqlite3.Connection) -> None:
    """Derive assignments and queue from items and events, in the caller's transaction. Items shown without an answer
    become lapsed: their annotators resume them on their next visit."""
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
        "INSERT INTO queue (item, taken, votes, fresh, place, overlap)"
        " SELECT id, votes, votes, touched = 0, CASE WHEN touched > 0 AND votes < coalesce(own, ?) THEN id END, own"
        " FROM ("
        f"  SELECT i.id, count(a.item) AS touched, coalesce(sum(a.state = 'voted'), 0) AS votes, {OWN_OVERLAP} AS own"
        "  FROM item i LEFT JOIN assignment a ON a.item = i.id WHERE i.gold IS NULL GROUP BY i.id)",
        (overlap,),
    )


# -- row digests ---------------------------------------------------------------------------------------------------


def seal(table: str, values: Mapping[str, Any]) -> bytes:
    """The digest [16 bytes] of a row's columns in :data:`SEALED`."""
    columns = [table, *(values.get(name) for name in SEALED[table])]
    text = json.dumps([v.hex() if isinstance(v, bytes) else v for v in columns])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def insert(connection: sqlite3.Connection, table: str, values: Mapping[str, Any], conflict: str = "") -> sqlite3.Cursor:
    """Insert a row with its digest; ``conflict`` is an ``ON CONFLICT`` clause."""
    columns = [*values, "seal"]
    query = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) {conflict}"
    return connection.execute(query, [*values.values(), seal(table, values)])


def check_row(table: str, row: sqlite3.Row) -> None:
    """Raises :class:`DamagedRow` where the digest does not match. Studies of older versions have no digests."""
    if "seal" in row.keys() and row["seal"] != seal(table, dict(row)):  # noqa: SIM118, a Row iterates over values
        name = row["name"] if table == "setting" else row["id"]
        raise DamagedRow(f"{table} {name} was changed after it was written")


def check_complete(connection: sqlite3.Connection, table: str) -> None:
    """Raises :class:`DamagedRow` where a row of a numbered table is missing. Counts the table itself (NOT INDEXED): an
    index has no digests, and SQLite does not compare it with the table."""
    count, last = connection.execute(f"SELECT count(*), coalesce(max(id), 0) FROM {table} NOT INDEXED").fetchone()
    query = "SELECT max(CAST(seq AS INTEGER)) FROM sqlite_sequence WHERE name = ?"  # AUTOINCREMENT: events alone
    known = connection.execute(query, (table,)).fetchone()[0]
    if count != last or known not in (None, last):
        raise DamagedRow(f"{max(last, known or 0) - count} rows of its {table}s are gone")


@contextmanager
def decoding(table: str, number: object) -> Iterator[None]:
    """Turn errors from decoding a row's values into :class:`DamagedRow`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedRow(f"{table} {number} cannot be read ({type(error).__name__}: {error})") from error


def problems(connection: sqlite3.Connection) -> Iterator[str]:
    """Everything wrong with a study, a line each: broken pages, changed or missing rows, assignments that do not follow
    from the events."""
    for (line,) in connection.execute("PRAGMA integrity_check(20)").fetchall():
        if line != "ok":
            yield f"SQLite: {line}"
    checks = [partial(check_complete, connection, table) for table in NUMBERED]
    for table in SEALED:
        rows = [row for row in _rows(connection, table) if (table, row[0]) != ("setting", COUNTER)]
        checks += [partial(check_row, table, row) for row in rows]
    for check in checks:
        try:
            check()
        except DamagedRow as error:
            yield str(error)
    yield from _wrong_assignments(connection)


def _rows(connection: sqlite3.Connection, table: str) -> list[sqlite3.Row]:
    """The rows of a table. Text that is not UTF-8 is read as well, so that the other rows are checked."""
    factory, connection.text_factory = connection.text_factory, lambda data: data.decode("utf-8", "surrogateescape")
    try:
        return connection.execute(f"SELECT * FROM {table}").fetchall()
    finally:
        connection.text_factory = factory


def _wrong_assignments(connection: sqlite3.Connection) -> Iterator[str]:
    events = connection.execute("SELECT id, annotator, item, kind FROM event ORDER BY id")
    last = {(row["annotator"], row["item"]): (row["kind"], row["id"]) for row in events}
    for row in connection.execute("SELECT annotator, item, state, event FROM assignment"):
        kind, number = last.pop((row["annotator"], row["item"]), ("", 0))
        states = {"vote": ["voted"], "skip": ["skipped"]}.get(kind, ["pending", "lapsed"])
        if row["state"] not in states or row["event"] != (number if kind in ("vote", "skip") else None) or not kind:
            which = f"item {row['item']} to annotator {row['annotator']}"
            yield f"the assignment of {which} does not follow from the events"
    for annotator, item in last:
        yield f"the assignment of item {item} to annotator {annotator} is gone"
