"""Votes: one annotator's judgement of the responses of an item, appended as an event, once.

>>> Vote.read({"tiers": [[1], [0]], "strength": 3}, count=2)
Vote(tiers=((1,), (0,)), strength=3, all_bad=False, skipped=None, rationale='', tags=())
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

from prefopt.errors import StudyError
from prefopt.records import Tiers
from prefopt.studies.annotators import Annotator
from prefopt.studies.database import DamagedRow, check_complete, check_row, decoding, insert
from prefopt.studies.items import change_taken, parse_tiers
from prefopt.studies.study import Study, now

STRENGTHS = {1: "slightly better", 2: "better", 3: "much better"}
LONGEST_RATIONALE = 4000
MOST_TAGS = 20


class RefusedVote(StudyError):
    """An invalid vote; the message says why."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One annotator's vote on the K responses of one item.

    ``tiers`` are indices of responses, best first; responses of one tier are tied, those left out are not judged.
    ``strength`` (1 slightly, 2 better, 3 much better) applies to two responses of which one is preferred. ``all_bad``:
    no response is good; without tiers nothing else is known. ``skipped`` is the reason for skipping the item.
    """

    tiers: Tiers = ()
    strength: int | None = None
    all_bad: bool = False
    skipped: str | None = None
    rationale: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def read(cls, value: Mapping[str, Any], count: int) -> Vote:
        """A vote on ``count`` responses from JSON. Raises :class:`RefusedVote`."""
        vote = cls(
            parse_tiers(value.get("tiers") or ()),
            value.get("strength"),
            bool(value.get("all_bad")),
            value.get("skipped"),
            str(value.get("rationale") or ""),
            tuple(str(tag) for tag in value.get("tags") or ()),
        )
        vote.check(count)
        return vote

    def check(self, count: int) -> None:
        """Raises :class:`RefusedVote` for a vote that is empty, contradictory, or names unknown responses."""
        named = [k for tier in self.tiers for k in tier]
        if len(set(named)) < len(named) or not set(named) <= set(range(count)) or not all(self.tiers):
            raise RefusedVote("the order names a response twice, or one that does not exist")
        if self.skipped is not None:
            if self.tiers or self.all_bad or self.strength is not None or not self.skipped.strip():
                raise RefusedVote("a skipped item has a reason and no judgement")
        elif not self.all_bad and len(named) < 2:
            raise RefusedVote("the vote compares no two responses")
        if self.strength is not None and (count != 2 or len(self.tiers) != 2 or self.strength not in STRENGTHS):
            raise RefusedVote("a strength is 1, 2 or 3, and needs two responses of which one is preferred")
        if len(self.rationale) > LONGEST_RATIONALE:
            raise RefusedVote(f"the rationale has more than {LONGEST_RATIONALE} characters")
        if len(self.tags) > MOST_TAGS:
            raise RefusedVote(f"there are more than {MOST_TAGS} tags")

    @property
    def pairs(self) -> tuple[tuple[int, int, int], ...]:
        """(i, j, sign) with i < j for all judged pairs: 1 where i is preferred, -1 where j is, 0 for a tie."""
        tier = {k: n for n, members in enumerate(self.tiers) for k in members}
        return tuple((i, j, (tier[i] < tier[j]) - (tier[i] > tier[j])) for i, j in combinations(sorted(tier), 2))

    def to_json(self) -> dict[str, Any]:
        """The fields that are set."""
        body = asdict(self) | {"tiers": [list(tier) for tier in self.tiers], "tags": list(self.tags)}
        return {name: value for name, value in body.items() if value not in (None, "", False, [])}

    def matches(self, gold: Tiers) -> bool:
        """Whether the vote agrees with a known order on every pair of which that order prefers one."""
        signs = {(i, j): sign for i, j, sign in self.pairs}
        return all(signs.get((i, j)) == sign for i, j, sign in Vote(gold).pairs if sign)


@dataclass(frozen=True, slots=True)
class StoredVote:
    """A vote or skip in force.

    ``shown`` [K] are the indices of the responses in the order of the page. ``seconds`` passed between showing and
    vote; ``active`` of them the page was visible, where the browser reported it.
    """

    annotator: int
    item: int
    vote: Vote
    shown: tuple[int, ...]
    at: str
    seconds: float
    active: float | None


def record(
    study: Study,
    annotator: Annotator,
    ticket: str,
    vote: Vote,
    *,
    active: float | None = None,
    at: float | None = None,
) -> Literal["stored", "already stored"]:
    """Store a vote on the item that the ticket showed; it is on the disk when this returns.

    Repeating a ticket, as browsers do after a lost connection, changes nothing. Raises :class:`RefusedVote` for an
    invalid vote, and for a ticket that this annotator was never given or whose vote was undone.
    """
    moment = time.time() if at is None else at
    overlap = study.settings.overlap
    with study.writing() as connection:
        found = _shown(connection, annotator, ticket)
        if found["state"] in ("voted", "skipped"):
            return "already stored"
        vote.check(found["count"])
        elapsed = max(0.0, moment - found["since"])
        body = vote.to_json() | {"order": json.loads(found["shown"]), "seconds": round(elapsed, 1)}
        if active is not None and 0 <= active <= elapsed + 60:
            body["active_seconds"] = round(active, 1)
        text = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace").decode()
        kind, state = ("vote", "voted") if vote.skipped is None else ("skip", "skipped")
        event = {"at": now(), "annotator": annotator.id, "item": found["item"], "kind": kind, "ticket": ticket}
        number = insert(connection, "event", event | {"body": text}).lastrowid
        connection.execute(
            "UPDATE assignment SET state = ?, event = ? WHERE annotator = ? AND item = ?",
            (state, number, annotator.id, found["item"]),
        )
        if kind == "vote":
            connection.execute("UPDATE queue SET votes = votes + 1 WHERE item = ?", (found["item"],))
            if found["state"] == "lapsed":  # the item was released to others meanwhile; a late vote still counts
                change_taken(connection, found["item"], 1, overlap)
        elif found["state"] == "pending":
            change_taken(connection, found["item"], -1, overlap)
    return "stored"


def undo(study: Study, annotator: Annotator, ticket: str | None = None) -> bool:
    """Undo the annotator's last vote or skip, by a new event; False where there is none. A ``ticket`` must be that of
    the last vote or skip: the same request twice undoes one vote."""
    moment = time.time()
    with study.writing() as connection:
        found = _last_answered(connection, annotator)
        if found is None or (ticket is not None and found["ticket"] != ticket):
            return False
        fresh = secrets.token_urlsafe(18)
        event = {"at": now(), "annotator": annotator.id, "item": found["item"], "kind": "undo", "ticket": fresh}
        insert(connection, "event", event | {"undoes": found["event"], "body": "{}"})
        connection.execute(
            "UPDATE assignment SET state = 'pending', ticket = ?, since = ?, until = ?, event = NULL"
            " WHERE annotator = ? AND item = ?",
            (fresh, moment, moment + study.settings.lease, annotator.id, found["item"]),
        )
        if found["state"] == "voted":
            connection.execute("UPDATE queue SET votes = votes - 1 WHERE item = ?", (found["item"],))
        else:
            change_taken(connection, found["item"], 1, study.settings.overlap)
    return True


def _last_answered(connection: sqlite3.Connection, annotator: Annotator) -> sqlite3.Row | None:
    query = "SELECT * FROM assignment WHERE annotator = ? AND event IS NOT NULL ORDER BY event DESC LIMIT 1"
    found: sqlite3.Row | None = connection.execute(query, (annotator.id,)).fetchone()
    return found


def latest_ticket(connection: sqlite3.Connection, annotator: Annotator) -> str | None:
    """The ticket of the vote or skip that :func:`undo` would undo."""
    found = _last_answered(connection, annotator)
    return None if found is None else str(found["ticket"])


def shown_order(connection: sqlite3.Connection, annotator: Annotator, ticket: str) -> list[int]:
    """The indices of the responses [K] as the ticket showed them. Raises :class:`RefusedVote`."""
    with decoding("the assignment of ticket", ticket):
        shown: list[int] = json.loads(_shown(connection, annotator, ticket)["shown"])
        return shown


def _shown(connection: sqlite3.Connection, annotator: Annotator, ticket: str) -> sqlite3.Row:
    """The assignment of a ticket, with the item's ``count``. Raises :class:`RefusedVote`."""
    query = "SELECT a.*, i.count FROM assignment a JOIN item i ON i.id = a.item WHERE a.ticket = ? AND a.annotator = ?"
    found: sqlite3.Row | None = connection.execute(query, (ticket, annotator.id)).fetchone()
    if found is None:
        raise RefusedVote("this page is out of date, or belongs to another annotator; open the next item")
    return found


def stored_votes(connection: sqlite3.Connection, item: int | None = None) -> Iterator[StoredVote]:
    """All votes and skips in force, or those on one item, by item and time, from the events alone. Raises
    :class:`DamagedRow` for an event that was changed or is missing."""
    if item is None:
        check_complete(connection, "event")
    # An index has no digests: only the page of a single item uses one.
    where, values = ("NOT INDEXED WHERE true", ()) if item is None else ("WHERE e.item = ?", (item,))
    undone = {row[0] for row in connection.execute(f"SELECT undoes FROM event e {where}", values)}
    query = f"SELECT e.*, (SELECT count FROM item i WHERE i.id = e.item) AS count FROM event e {where}"
    for event in connection.execute(query + " ORDER BY e.item, e.id", values):
        check_row("event", event)
        if event["kind"] in ("vote", "skip") and event["id"] not in undone:
            with decoding("event", event["id"]):
                if event["count"] is None:
                    raise DamagedRow(f"item {event['item']} is gone")
                body = json.loads(event["body"])
                vote, order, seconds = Vote.read(body, event["count"]), tuple(body["order"]), float(body["seconds"])
                place, at, active = (event["annotator"], event["item"]), event["at"], body.get("active_seconds")
                yield StoredVote(*place, vote, order, at, seconds, active)
