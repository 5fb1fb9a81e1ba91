"""Annotators, their invitations, and the sessions that invitations are exchanged for.

The secret of an invitation or session is returned once; the file stores only its hash.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from dataclasses import dataclass

from prefopt.errors import StudyError
from prefopt.studies.database import check_complete, check_row, insert, seal
from prefopt.studies.study import Study, now

DAY = 86400.0
SESSION_DAYS = 30.0
LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Annotator:
    """A person who votes. Exports contain the ``pseudonym``; a ``lead`` sees the votes and statistics of all."""

    id: int
    name: str
    pseudonym: str
    lead: bool


def invite(study: Study, name: str, *, lead: bool = False, days: float = 30.0) -> tuple[Annotator, str]:
    """The annotator of this name, created if unknown, and the secret of a new invitation.

    Earlier invitations of the annotator end; sessions continue. Raises :class:`StudyError` for an unusable name.
    """
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise StudyError(f"{name!r} is not a name for an annotator; give 1 to {LONGEST_NAME} printable characters")
    with study.writing() as connection:
        found = _by_name(connection, name)
        if found is None:
            pseudonym = "annotator-" + secrets.token_hex(4)
            insert(connection, "annotator", {"name": name, "pseudonym": pseudonym, "lead": int(lead), "at": now()})
        elif lead and not _annotator(found).lead:
            changed = seal("annotator", dict(found) | {"lead": 1})
            connection.execute("UPDATE annotator SET lead = 1, seal = ? WHERE id = ?", (changed, found["id"]))
        annotator = _annotator(_by_name(connection, name))
        connection.execute("DELETE FROM invitation WHERE annotator = ?", (annotator.id,))
        return annotator, _new_secret(connection, "invitation", annotator, days)


def revoke(study: Study, name: str) -> Annotator:
    """End an annotator's invitations and sessions; votes stay. Raises :class:`StudyError` for an unknown name."""
    with study.writing() as connection:
        found = _by_name(connection, " ".join(name.split()))
        if found is None:
            names = [row[0] for row in connection.execute("SELECT name FROM annotator ORDER BY name LIMIT 20")]
            raise StudyError(f"{study.path}: no annotator {name!r}; there are {', '.join(names) or 'none'}")
        connection.execute("DELETE FROM invitation WHERE annotator = ?", (found["id"],))
        connection.execute("DELETE FROM session WHERE annotator = ?", (found["id"],))
        return _annotator(found)


def invited(study: Study, secret: str) -> Annotator | None:
    """The annotator of an invitation, or None where it is unknown or has expired."""
    with study.reading() as connection:
        return _holder(connection, "invitation", secret)


def open_session(study: Study, secret: str) -> str | None:
    """Exchange an invitation for the secret of a new session, or None. An invitation can be used until it expires."""
    with study.writing() as connection:
        annotator = _holder(connection, "invitation", secret)
        if annotator is None:
            return None
        connection.execute("DELETE FROM session WHERE until < ?", (time.time(),))
        return _new_secret(connection, "session", annotator, SESSION_DAYS)


def session_of(study: Study, secret: str) -> Annotator | None:
    with study.reading() as connection:
        return _holder(connection, "session", secret)


def close_session(study: Study, secret: str) -> None:
    with study.writing() as connection:
        connection.execute("DELETE FROM session WHERE digest = ?", (_digest(secret),))


def live_invitations(study: Study) -> int:
    """The number of annotators with a valid invitation or session."""
    query = "SELECT count(DISTINCT annotator) FROM (SELECT annotator, until FROM invitation"
    query += " UNION ALL SELECT annotator, until FROM session) WHERE until > ?"
    with study.reading() as connection:
        return int(connection.execute(query, (time.time(),)).fetchone()[0])


def annotators(connection: sqlite3.Connection) -> list[Annotator]:
    check_complete(connection, "annotator")
    return [_annotator(row) for row in connection.execute("SELECT * FROM annotator ORDER BY id")]


def _by_name(connection: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    found: sqlite3.Row | None = connection.execute("SELECT * FROM annotator WHERE name = ?", (name,)).fetchone()
    return found


def _annotator(row: sqlite3.Row | None) -> Annotator:
    assert row is not None
    check_row("annotator", row)
    return Annotator(row["id"], row["name"], row["pseudonym"], bool(row["lead"]))


def _holder(connection: sqlite3.Connection, table: str, secret: str) -> Annotator | None:
    query = f"SELECT a.* FROM {table} t JOIN annotator a ON a.id = t.annotator WHERE t.digest = ? AND t.until > ?"
    found = connection.execute(query, (_digest(secret), time.time())).fetchone()
    return None if found is None else _annotator(found)


def _new_secret(connection: sqlite3.Connection, table: str, annotator: Annotator, days: float) -> str:
    secret, at = secrets.token_urlsafe(32 if table == "session" else 24), time.time()
    row = (_digest(secret), annotator.id, at, at + days * DAY)
    connection.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", row)
    return secret


def _digest(secret: str) -> bytes:
    """Secrets have at least 24 random bytes, so that a plain hash cannot be inverted."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()
