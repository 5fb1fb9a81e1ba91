"""The votes in force, read for counting: undone ones are gone, skipped items are counted and say nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefopt.studies.items import Tiers, tiers_of
from prefopt.studies.seal import Damaged, check, check_complete, decoding
from prefopt.studies.votes import Vote


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
    :class:`~prefopt.studies.seal.Damaged` for one that is gone or is not what was written.
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
