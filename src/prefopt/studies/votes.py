"""Votes: what a person says of an item, appended as an event, once.

>>> Vote.read({"tiers": [[1], [0]], "strength": 3}, count=2)
Vote(tiers=((1,), (0,)), strength=3, all_bad=False, skipped=None, rationale='', tags=())
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.errors import StudyError
from prefopt.studies.annotators import Annotator
from prefopt.studies.assign import release, take
from prefopt.studies.digests import Damaged, check, check_complete, decoding, insert
from prefopt.studies.items import Tiers, tiers_of
from prefopt.studies.study import Study, now

STRENGTHS = {1: "slightly", 2: "better", 3: "much"}
LONGEST_RATIONALE = 4000
MOST_TAGS = 20


class RefusedVote(StudyError):
    """A vote that cannot be taken as it stands; the message says why."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What one person says of the K responses of one item.

    ``tiers`` are numbers of responses, best first; those of one tier are tied, and nothing is said of those left out.
    ``strength`` (1 slightly, 2 better, 3 much better) goes with two responses of which one is preferred. ``all_bad``:
    none of them is good; without tiers it says no more. ``skipped`` is the reason why the person passed on the item.
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
            tiers_of(value.get("tiers") or ()),
            value.get("strength"),
            bool(value.get("all_bad")),
            value.get("skipped"),
            str(value.get("rationale") or ""),
            tuple(str(tag) for tag in value.get("tags") or ()),
        )
        vote.check(count)
        return vote

    def check(self, count: int) -> None:
        """Refuse what says nothing, contradicts itself, or names responses that are not there."""
        named = [k for tier in self.tiers for k in tier]
        if len(set(named)) < len(named) or not set(named) <= set(range(count)) or not all(self.tiers):
            raise RefusedVote("the order names a response twice, or one that is not there")
        if self.skipped is not None:
            if self.tiers or self.all_bad or self.strength is not None or not self.skipped.strip():
                raise RefusedVote("a skipped item has a reason and no judgement")
        elif not self.all_bad and len(named) < 2:
            raise RefusedVote("the vote compares no two responses")
        if self.strength is not None and (count != 2 or len(self.tiers) != 2 or self.strength not in STRENGTHS):
            raise RefusedVote("a strength goes with one of two responses, and is 1, 2 or 3")
        if len(self.rationale) > LONGEST_RATIONALE:
            raise RefusedVote(f"the rationale has more than {LONGEST_RATIONALE} characters")
        if len(self.tags) > MOST_TAGS:
            raise RefusedVote(f"there are more than {MOST_TAGS} tags")

    @property
    def pairs(self) -> tuple[tuple[int, int, int], ...]:
        """(i, j, sign) with i < j for all pairs that it judges: 1 where i is preferred, -1 where j is, 0 for a tie."""
        place = {k: n for n, tier in enumerate(self.tiers) for k in tier}
        ordered = sorted(place)
        return tuple(
            (i, j, (place[i] < place[j]) - (place[i] > place[j]))
            for n, i in enumerate(ordered)
            for j in ordered[n + 1 :]
        )

    def to_json(self) -> dict[str, Any]:
        """What is not said is left out."""
        body = {
            "tiers": [list(tier) for tier in self.tiers],
            "strength": self.strength,
            "all_bad": self.all_bad,
            "skipped": self.skipped,
            "rationale": self.rationale,
            "tags": list(self.tags),
        }
        return {name: value for name, value in body.items() if value not in (None, "", False, [])}


Outcome = Literal["stored", "already stored"]


def record(
    study: Study, person: Annotator, ticket: str, vote: Vote, *, active: float | None = None, at: float | None = None
) -> Outcome:
    """Store a vote on what the ticket showed; on the disk when this returns.

    The same ticket again, as a browser sends after a broken connection, changes nothing. ``active`` are the seconds
    that the page was looked at, as the page tells. Raises :class:`RefusedVote` for a ticket that this person was never
    given or has undone, and for a vote that does not fit.
    """
    moment = time.time() if at is None else at
    with study.writing() as connection:
        found = connection.execute(
            "SELECT a.*, i.count FROM assignment a JOIN item i ON i.id = a.item WHERE a.ticket = ? AND a.annotator = ?",
            (ticket, person.id),
        ).fetchone()
        if found is None:
            raise RefusedVote("this page is out of date, or belongs to somebody else; open the next item")
        if found["state"] in ("voted", "skipped"):
            return "already stored"
        vote.check(found["count"])
        elapsed = max(0.0, moment - found["since"])
        body = vote.to_json() | {"order": json.loads(found["shown"]), "seconds": round(elapsed, 1)}
        if active is not None and 0 <= active <= elapsed + 60:
            body["active_seconds"] = round(active, 1)
        kind = "vote" if vote.skipped is None else "skip"
        text = json.dumps(body, ensure_ascii=False)
        said = {"at": now(), "annotator": person.id, "item": found["item"], "kind": kind, "ticket": ticket}
        event = insert(connection, "event", said | {"body": text.encode("utf-8", "replace").decode()}).lastrowid
        _settle(connection, study, found, kind, int(event or 0))
    return "stored"


def undo(study: Study, person: Annotator, ticket: str | None = None) -> bool:
    """Take back the person's latest vote or skip, by a new event; False where there is none.

    ``ticket`` is that of the vote to take back: where it is not the latest in force any more, nothing is done, so that
    the same request twice undoes one vote.
    """
    moment = time.time()
    with study.writing() as connection:
        found = connection.execute(
            "SELECT * FROM assignment WHERE annotator = ? AND event IS NOT NULL ORDER BY event DESC LIMIT 1",
            (person.id,),
        ).fetchone()
        if found is None or (ticket is not None and found["ticket"] != ticket):
            return False
        fresh = secrets.token_urlsafe(18)
        said = {"at": now(), "annotator": person.id, "item": found["item"], "kind": "undo", "ticket": fresh}
        insert(connection, "event", said | {"undoes": found["event"], "body": "{}"})
        connection.execute(
            "UPDATE assignment SET state = 'pending', ticket = ?, since = ?, until = ?, event = NULL"
            " WHERE annotator = ? AND item = ?",
            (fresh, moment, moment + study.settings.lease, person.id, found["item"]),
        )
        if found["state"] == "voted":
            connection.execute("UPDATE queue SET votes = votes - 1 WHERE item = ?", (found["item"],))
        else:
            take(connection, found["item"], study.settings.overlap)
    return True


def latest(connection: sqlite3.Connection, person: Annotator) -> str | None:
    """The ticket of the vote or skip that :func:`undo` would take back."""
    found = connection.execute(
        "SELECT ticket FROM assignment WHERE annotator = ? AND event IS NOT NULL ORDER BY event DESC LIMIT 1",
        (person.id,),
    ).fetchone()
    return None if found is None else str(found["ticket"])


def _settle(connection: sqlite3.Connection, study: Study, found: sqlite3.Row, kind: str, event: int) -> None:
    """Bring assignment and queue up to the event."""
    overlap = study.settings.overlap
    connection.execute(
        "UPDATE assignment SET state = ?, event = ? WHERE annotator = ? AND item = ?",
        ("voted" if kind == "vote" else "skipped", event, found["annotator"], found["item"]),
    )
    if kind == "vote":
        connection.execute("UPDATE queue SET votes = votes + 1 WHERE item = ?", (found["item"],))
        if found["state"] == "lapsed":  # the place went to others meanwhile; the vote counts all the same
            take(connection, found["item"], overlap)
    elif found["state"] == "pending":
        release(connection, found["item"], overlap)


def on_page(shown: Sequence[int], tiers: Tiers) -> Tiers:
    """Tiers of places on the page as tiers of responses: ``shown`` [K] are the responses in the order of the page."""
    return tuple(tuple(shown[place] for place in tier) for tier in tiers)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A vote in force: who, on which item, in which order it was shown, when and after how many seconds.

    ``shown`` [K] are the responses in the order of the page. ``active`` are the seconds that the page was looked at, as
    the page told, where it did.
    """

    annotator: int
    item: int
    vote: Vote
    shown: tuple[int, ...]
    at: str
    seconds: float
    active: float | None


def judgements(connection: sqlite3.Connection, item: int | None = None) -> Iterator[Judgement]:
    """All votes and skips in force by item and time, or those on one item.

    They are read from the events alone, every one of which is checked. Raises
    :class:`~prefopt.studies.digests.Damaged` for one that is gone or is not what was written.
    """
    if item is None:
        check_complete(connection, "event")
    # An index has no seals: only what one item's page shows is found by one.
    where, values = ("NOT INDEXED WHERE true", ()) if item is None else ("WHERE e.item = ?", (item,))
    undone = {row[0] for row in connection.execute(f"SELECT undoes FROM event e {where}", values)}
    query = f"SELECT e.*, (SELECT count FROM item i WHERE i.id = e.item) AS count FROM event e {where}"
    for event in connection.execute(query + " ORDER BY e.item, e.id", values):
        check("event", event)
        if event["kind"] in ("vote", "skip") and event["id"] not in undone:
            with decoding("event", event["id"]):
                yield _judgement(event, json.loads(event["body"]))


def _judgement(event: sqlite3.Row, body: Any) -> Judgement:
    if event["count"] is None:
        raise Damaged(f"item {event['item']} is gone")
    return Judgement(
        event["annotator"],
        event["item"],
        Vote.read(body, event["count"]),
        tuple(body["order"]),
        event["at"],
        float(body["seconds"]),
        body.get("active_seconds"),
    )


def golds(connection: sqlite3.Connection) -> dict[int, Tiers]:
    """The known orders of gold items."""
    found = {}
    for row in connection.execute("SELECT * FROM item NOT INDEXED WHERE gold IS NOT NULL"):
        check("item", row)
        with decoding("item", row["id"]):
            found[row["id"]] = tiers_of(json.loads(row["gold"]))
    return found


def agrees_with(vote: Vote, gold: Tiers) -> bool:
    """Whether a vote decides every pair as the known order does, where that prefers one of the two."""
    said = {(i, j): sign for i, j, sign in vote.pairs}
    return all(said.get((i, j)) == sign for i, j, sign in Vote(gold).pairs if sign)
