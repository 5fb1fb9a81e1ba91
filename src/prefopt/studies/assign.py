"""Which item a person sees next: found by an index, whatever the size of the study.

Items that others have begun come first, so that judgements overlap early; then fresh ones, in the order of the file.
Begun items that lack judgements stand in a queue, each place a number that only grows. What lies behind a person's
``cursor`` in it they have all seen, or it is full, so that a search begins there and passes every place once. An item
that needs judgements again goes to the end of the queue, where everybody's cursor finds it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from dataclasses import dataclass

from prefopt.studies.annotators import Annotator
from prefopt.studies.digests import COUNTER, Damaged, decoding, insert
from prefopt.studies.items import Item, get_item
from prefopt.studies.study import Study, now

RENEW_SECONDS = 60.0
LAPSE_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class Assignment:
    """An item as one person sees it: ``shown`` [K] are the numbers of the responses in the order shown.

    ``ticket`` names this showing, once; a vote carries it. ``since`` is when it was first shown, in seconds since 1970.
    """

    item: Item
    ticket: str
    shown: tuple[int, ...]
    since: float


def next_item(study: Study, person: Annotator, *, at: float | None = None) -> Assignment | None:
    """What the person left unanswered, else a new item; None where there is nothing to do for them."""
    moment = time.time() if at is None else at
    with study.reading() as connection:
        waiting = _waiting(connection, person)
        renewed = waiting is not None and moment < waiting["until"] - study.settings.lease + RENEW_SECONDS
        if waiting is not None and waiting["state"] == "pending" and renewed:
            return _assignment(connection, waiting)
    with study.writing() as connection:
        _lapse(connection, study.settings.overlap, moment)
        item = _resumed(connection, study, person, moment)
        if item is None:
            item = _chosen(connection, study, person)
            if item is None:
                return None
            _show(connection, study, person, item, moment)
        found = connection.execute(
            "SELECT * FROM assignment WHERE annotator = ? AND item = ?", (person.id, item)
        ).fetchone()
        return _assignment(connection, found)


def order_shown(seed: str, person: int, item: int, count: int) -> tuple[int, ...]:
    """A permutation of ``range(count)`` that depends on nothing but its arguments, every one as likely as another."""
    keys = [
        hashlib.blake2b(f"{seed}/{person}/{item}/{number}".encode(), digest_size=8).digest() for number in range(count)
    ]
    return tuple(sorted(range(count), key=keys.__getitem__))


def take(connection: sqlite3.Connection, item: int, overlap: int) -> None:
    """One more person has or had the item; at ``overlap`` of them it leaves the queue."""
    found = connection.execute("SELECT taken, place FROM queue WHERE item = ?", (item,)).fetchone()
    if found is None:
        return  # gold items are everybody's
    taken = found["taken"] + 1
    place = None if taken >= overlap else found["place"] or _new_place(connection)
    connection.execute("UPDATE queue SET taken = ?, fresh = 0, place = ? WHERE item = ?", (taken, place, item))


def release(connection: sqlite3.Connection, item: int, overlap: int) -> None:
    """One person less; an item that needs others again goes to the end of the queue."""
    found = connection.execute("SELECT taken, place FROM queue WHERE item = ?", (item,)).fetchone()
    if found is None:
        return
    taken = found["taken"] - 1
    place = found["place"] or (_new_place(connection) if taken < overlap else None)
    connection.execute("UPDATE queue SET taken = ?, place = ? WHERE item = ?", (taken, place, item))


def _new_place(connection: sqlite3.Connection) -> int:
    """A place behind all that were ever given: those of full items are not given again."""
    connection.execute(
        "INSERT INTO setting (name, value) VALUES (?,"
        " (SELECT coalesce(max(place), 0) + 1 FROM queue WHERE place IS NOT NULL))"
        " ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + 1",
        (COUNTER,),
    )
    return int(connection.execute("SELECT value FROM setting WHERE name = ?", (COUNTER,)).fetchone()[0])


def _waiting(connection: sqlite3.Connection, person: Annotator) -> sqlite3.Row | None:
    found: sqlite3.Row | None = connection.execute(
        "SELECT * FROM assignment WHERE annotator = ? AND state IN ('pending', 'lapsed') ORDER BY since DESC LIMIT 1",
        (person.id,),
    ).fetchone()
    return found


def _resumed(connection: sqlite3.Connection, study: Study, person: Annotator, moment: float) -> int | None:
    """What was shown and not answered, if there is still need of it, its lease renewed."""
    overlap = study.settings.overlap
    rows = connection.execute(
        "SELECT a.item, a.state, q.taken FROM assignment a LEFT JOIN queue q ON q.item = a.item"
        " WHERE a.annotator = ? AND a.state IN ('pending', 'lapsed') ORDER BY a.since DESC LIMIT 20",
        (person.id,),
    ).fetchall()
    for row in rows:
        if row["state"] == "lapsed":
            if row["taken"] is not None and row["taken"] >= overlap:
                continue
            take(connection, row["item"], overlap)
        connection.execute(
            "UPDATE assignment SET state = 'pending', until = ? WHERE annotator = ? AND item = ?",
            (moment + study.settings.lease, person.id, row["item"]),
        )
        return int(row["item"])
    return None


def _lapse(connection: sqlite3.Connection, overlap: int, moment: float) -> None:
    """Give the places of those who went away to others."""
    rows = connection.execute(
        "SELECT annotator, item FROM assignment WHERE state = 'pending' AND until < ? ORDER BY until LIMIT ?",
        (moment, LAPSE_AT_ONCE),
    ).fetchall()
    for row in rows:
        connection.execute(
            "UPDATE assignment SET state = 'lapsed' WHERE annotator = ? AND item = ?", (row["annotator"], row["item"])
        )
        release(connection, row["item"], overlap)


def _chosen(connection: sqlite3.Connection, study: Study, person: Annotator) -> int | None:
    seen, cursor = connection.execute("SELECT seen, cursor FROM annotator WHERE id = ?", (person.id,)).fetchone()
    if _is_golden(study, person, seen) and (gold := _gold(connection, person)) is not None:
        return gold
    begun = connection.execute(
        "SELECT item, place FROM queue WHERE place > ? AND NOT EXISTS"
        " (SELECT 1 FROM assignment a WHERE a.annotator = ? AND a.item = queue.item) ORDER BY place LIMIT 1",
        (cursor, person.id),
    ).fetchone()
    # All places up to the one found, or to the last there is, are passed for good.
    passed = begun["place"] - 1 if begun else _highest(connection)
    if passed > cursor:
        connection.execute("UPDATE annotator SET cursor = ? WHERE id = ?", (passed, person.id))
    if begun:
        return int(begun["item"])
    fresh = connection.execute("SELECT item FROM queue WHERE fresh = 1 ORDER BY item LIMIT 1").fetchone()
    return int(fresh["item"]) if fresh else _gold(connection, person)


def _highest(connection: sqlite3.Connection) -> int:
    found = connection.execute("SELECT max(place) FROM queue WHERE place IS NOT NULL").fetchone()[0]
    return int(found or 0)


def _is_golden(study: Study, person: Annotator, seen: int) -> bool:
    """Whether the person's item number ``seen`` is a gold one: one of every block, at a place nobody can guess."""
    every = study.settings.gold_every
    block = f"{study.settings.seed}/gold/{person.id}/{seen // every}".encode()
    slot = int.from_bytes(hashlib.blake2b(block, digest_size=4).digest(), "little") % every
    return seen % every == slot


def _gold(connection: sqlite3.Connection, person: Annotator) -> int | None:
    found = connection.execute(
        "SELECT id FROM item WHERE gold IS NOT NULL AND NOT EXISTS"
        " (SELECT 1 FROM assignment a WHERE a.annotator = ? AND a.item = item.id) ORDER BY id LIMIT 1",
        (person.id,),
    ).fetchone()
    return int(found["id"]) if found else None


def _show(connection: sqlite3.Connection, study: Study, person: Annotator, item: int, moment: float) -> None:
    settings = study.settings
    count = connection.execute("SELECT count FROM item WHERE id = ?", (item,)).fetchone()[0]
    shown = order_shown(settings.seed, person.id, item, count)
    ticket = secrets.token_urlsafe(18)
    said = {"at": now(), "annotator": person.id, "item": item, "kind": "shown", "ticket": ticket}
    insert(connection, "event", said | {"body": json.dumps({"order": shown})})
    connection.execute(
        "INSERT INTO assignment VALUES (?, ?, 'pending', ?, ?, ?, ?, NULL)",
        (person.id, item, ticket, json.dumps(shown), moment, moment + settings.lease),
    )
    connection.execute("UPDATE annotator SET seen = seen + 1 WHERE id = ?", (person.id,))
    take(connection, item, settings.overlap)


def _assignment(connection: sqlite3.Connection, found: sqlite3.Row) -> Assignment:
    item = get_item(connection, found["item"])
    if item is None:
        raise Damaged(f"item {found['item']} is gone")
    with decoding("the assignment of item", item.id):
        shown = tuple(json.loads(found["shown"]))
        if sorted(shown) != list(range(item.count)):
            raise Damaged(f"the assignment of item {item.id} shows responses that it does not have")
    return Assignment(item, found["ticket"], shown, found["since"])
