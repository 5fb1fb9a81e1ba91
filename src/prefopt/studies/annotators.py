"""Who votes: annotators, the invitations they come with, and the sessions these are exchanged for.

What opens a door (the secret of an invitation, of a session) is given out once; the file keeps its hash alone.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from dataclasses import dataclass

from prefopt.errors import StudyError
from prefopt.studies.digests import check, check_complete, insert, seal_again
from prefopt.studies.study import Study, now

DAY = 86400.0
SESSION_DAYS = 30.0
LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Annotator:
    """A person. ``pseudonym`` is what exports call them; a ``lead`` sees the numbers of all."""

    id: int
    name: str
    pseudonym: str
    lead: bool


def invite(study: Study, name: str, *, lead: bool = False, days: float = 30.0) -> tuple[Annotator, str]:
    """The annotator of this name, made where there is none, and the secret of a new invitation.

    Earlier invitations of the same person end; sessions go on. Raises :class:`StudyError` for an unusable name.
    """
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise StudyError(f"{name!r} is no name for an annotator; give 1 to {LONGEST_NAME} printable characters")
    secret = secrets.token_urlsafe(24)
    with study.writing() as connection:
        found = connection.execute("SELECT * FROM annotator WHERE name = ?", (name,)).fetchone()
        if found is None:
            pseudonym = "annotator-" + secrets.token_hex(4)
            insert(connection, "annotator", {"name": name, "pseudonym": pseudonym, "lead": int(lead), "at": now()})
        elif lead and not _person(found).lead:
            connection.execute("UPDATE annotator SET lead = 1 WHERE id = ?", (found["id"],))
            seal_again(connection, "annotator", found["id"])
        person = _person(connection.execute("SELECT * FROM annotator WHERE name = ?", (name,)).fetchone())
        connection.execute("DELETE FROM invitation WHERE annotator = ?", (person.id,))
        until = time.time() + days * DAY
        connection.execute(
            "INSERT INTO invitation VALUES (?, ?, ?, ?)", (_digest(secret), person.id, time.time(), until)
        )
    return person, secret


def revoke(study: Study, name: str) -> Annotator:
    """End a person's invitations and sessions; their votes stay. Raises :class:`StudyError` for an unknown name."""
    with study.writing() as connection:
        found = connection.execute("SELECT * FROM annotator WHERE name = ?", (" ".join(name.split()),)).fetchone()
        if found is None:
            names = [row[0] for row in connection.execute("SELECT name FROM annotator ORDER BY name LIMIT 20")]
            raise StudyError(
                f"{study.path}: nobody is called {name!r}; there are {', '.join(names) or 'no annotators'}"
            )
        connection.execute("DELETE FROM invitation WHERE annotator = ?", (found["id"],))
        connection.execute("DELETE FROM session WHERE annotator = ?", (found["id"],))
    return _person(found)


def invited(study: Study, secret: str) -> Annotator | None:
    """Whose invitation this is, or None where it is nobody's or has run out."""
    with study.reading() as connection:
        return _holder(connection, "invitation", secret)


def open_session(study: Study, secret: str) -> str | None:
    """Exchange an invitation for the secret of a session, or None. An invitation may be used again until it ends."""
    with study.writing() as connection:
        person = _holder(connection, "invitation", secret)
        if person is None:
            return None
        session, started = secrets.token_urlsafe(32), time.time()
        connection.execute("DELETE FROM session WHERE until < ?", (started,))
        connection.execute(
            "INSERT INTO session VALUES (?, ?, ?, ?)",
            (_digest(session), person.id, started, started + SESSION_DAYS * DAY),
        )
    return session


def session_of(study: Study, secret: str) -> Annotator | None:
    """Whose session this is, or None."""
    with study.reading() as connection:
        return _holder(connection, "session", secret)


def close_session(study: Study, secret: str) -> None:
    """End one session."""
    with study.writing() as connection:
        connection.execute("DELETE FROM session WHERE digest = ?", (_digest(secret),))


def live_invitations(study: Study) -> int:
    """How many people can come in: those with an invitation or a session that has not run out."""
    with study.reading() as connection:
        query = "SELECT count(DISTINCT annotator) FROM (SELECT annotator, until FROM invitation"
        query += " UNION ALL SELECT annotator, until FROM session) WHERE until > ?"
        count: int = connection.execute(query, (time.time(),)).fetchone()[0]
    return count


def annotators(connection: sqlite3.Connection) -> list[Annotator]:
    """Everyone, in the order they came."""
    check_complete(connection, "annotator")
    return [_person(row) for row in connection.execute("SELECT * FROM annotator ORDER BY id")]


def _holder(connection: sqlite3.Connection, table: str, secret: str) -> Annotator | None:
    found = connection.execute(
        f"SELECT a.* FROM {table} t JOIN annotator a ON a.id = t.annotator WHERE t.digest = ? AND t.until > ?",
        (_digest(secret), time.time()),
    ).fetchone()
    return None if found is None else _person(found)


def _person(row: sqlite3.Row) -> Annotator:
    check("annotator", row)
    return Annotator(row["id"], row["name"], row["pseudonym"], bool(row["lead"]))


def _digest(secret: str) -> bytes:
    """Secrets have 24 random bytes or more, so that a plain hash cannot be turned back."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()
