"""The votes in force, read for counting: undone ones are gone, skipped items are counted and say nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from prefopt.studies.items import Tiers, tiers_of
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
    """All votes and skips in force by item and time, or those on one item."""
    query = (
        "SELECT e.annotator, e.item, e.at, e.body, i.count FROM assignment a JOIN event e ON e.id = a.event"
        " JOIN item i ON i.id = e.item WHERE a.state IN ('voted', 'skipped')"
    )
    values: tuple[int, ...] = ()
    if item is not None:
        query, values = query + " AND a.item = ?", (item,)
    for annotator, number, at, text, count in connection.execute(query + " ORDER BY e.item, e.id", values):
        body = json.loads(text)
        yield Judgement(
            annotator,
            number,
            Vote.read(body, count),
            tuple(body["order"]),
            at,
            float(body["seconds"]),
            body.get("active_seconds"),
        )


def golds(connection: sqlite3.Connection) -> dict[int, Tiers]:
    """The known orders of gold items."""
    rows = connection.execute("SELECT id, gold FROM item WHERE gold IS NOT NULL")
    return {row["id"]: tiers_of(json.loads(row["gold"])) for row in rows}


def agrees_with(vote: Vote, gold: Tiers) -> bool:
    """Whether a vote decides every pair as the known order does, where that prefers one of the two."""
    said = {(i, j): sign for i, j, sign in vote.pairs}
    return all(said.get((i, j)) == sign for i, j, sign in Vote(gold).pairs if sign)
