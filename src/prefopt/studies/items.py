"""Items (a prompt with its responses) and the queue that decides which item an annotator sees next.

The next item is found by an index, whatever the size of the study. Items that others have begun come first, so that
votes overlap early; then new ones, in the order of the file. Begun items that need more votes wait in a queue, at
places that only grow. Up to an annotator's ``cursor`` all items are seen or full: each search starts there. An item
that needs votes again goes to the end of the queue, beyond all cursors.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from prefopt.errors import StudyError
from prefopt.records import Tiers
from prefopt.studies.annotators import Annotator
from prefopt.studies.database import COUNTER, EVERYONE, DamagedRow, check_complete, check_row, decoding, insert
from prefopt.studies.study import Study, now

MOST_RESPONSES = 9
"""The most responses of an item: as many as a keyboard has digits."""
RENEW_SECONDS = 60.0
LAPSE_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class ResponseOrigin:
    """The model that a response comes from, and its sampling settings."""

    model: str | None = None
    sampling: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item to add: ``row`` holds prompt and responses (and tools) in the canonical layout, and ``overlap`` where the
    item shall get another number of annotators than the study's (``all``: everyone's vote); ``prompt_key`` identifies
    the prompt, ``gold`` is the known order of a gold item; it was read from ``file_row`` of ``file``."""

    row: Mapping[str, Any]
    prompt_key: bytes
    origins: Sequence[ResponseOrigin]
    gold: Tiers | None = None
    file: str = ""
    file_row: int = 0


@dataclass(frozen=True, slots=True)
class Item(NewItem):
    """An item of a study, with its number."""

    id: int = 0

    @property
    def count(self) -> int:
        """K, the number of responses."""
        return len(self.origins)


@dataclass(frozen=True, slots=True)
class Assignment:
    """An item as one annotator sees it: ``shown`` [K] are the indices of the responses in the order shown.

    ``ticket`` identifies this showing; a vote carries it. ``since`` is when it was first shown, in seconds since 1970.
    """

    item: Item
    ticket: str
    shown: tuple[int, ...]
    since: float


def add_items(study: Study, items: Iterable[NewItem]) -> tuple[int, int]:
    """Add items in order, all or none; returns the numbers of new items and duplicates. Raises :class:`StudyError`."""
    with study.writing() as connection:
        added = [_add(connection, item) for item in items]
    return sum(added), len(added) - sum(added)


def _add(connection: sqlite3.Connection, item: NewItem) -> bool:
    """Add an item; False for a duplicate."""
    if not 2 <= (count := len(item.origins)) <= MOST_RESPONSES:
        place = f"{item.file}, row {item.file_row}"
        raise StudyError(f"{place}: has {count} responses; an item has 2 to {MOST_RESPONSES}")
    origins = [{"model": o.model, "sampling": _sampling_id(connection, o.sampling)} for o in item.origins]
    row = json.dumps(item.row, ensure_ascii=False)
    try:
        row.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which SQLite cannot store
        row = json.dumps(item.row)
    overlap = _overlap(item)
    # The same row at another place is the same item, whatever its overlap; a gold item is a different one.
    bare = {name: value for name, value in item.row.items() if name != "overlap"}
    identity = json.dumps([bare, item.gold], sort_keys=True)
    values = {
        "digest": hashlib.blake2b(identity.encode(), digest_size=16).digest(),
        "prompt_key": item.prompt_key,
        "row": row,
        "count": count,
        "origins": json.dumps(origins, ensure_ascii=False),
        "gold": None if item.gold is None else json.dumps(item.gold),
        "file": item.file,
        "file_row": item.file_row,
        "at": now(),
    }
    done = insert(connection, "item", values, "ON CONFLICT (digest) DO NOTHING")
    if done.rowcount and item.gold is None:
        connection.execute("INSERT INTO queue (item, overlap) VALUES (?, ?)", (done.lastrowid, overlap))
    return bool(done.rowcount)


def _overlap(item: NewItem) -> int | None:
    """The number of annotators that an item asks for itself. Raises :class:`StudyError`."""
    given = item.row.get("overlap")
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and 1 <= given < EVERYONE):
        return given
    if given == "all":
        return EVERYONE
    place = f"{item.file}, row {item.file_row}"
    raise StudyError(f"{place}: overlap is {given!r}; it should be a number of annotators from 1 on, or all")


def for_everyone(items: Sequence[NewItem], fraction: float) -> list[NewItem]:
    """The items, a ``fraction`` of which (rounded up) every annotator shall judge: which ones depends on their contents
    alone. Gold items, which everyone judges, are not counted; an item with an overlap of its own keeps it."""
    own = [item for item in items if item.gold is None]
    free = [item for item in own if item.row.get("overlap") is None]
    order = sorted(
        free, key=lambda i: hashlib.blake2b(json.dumps(i.row, sort_keys=True).encode(), digest_size=8).digest()
    )
    wanted = math.ceil(Fraction(str(fraction)) * len(own))  # 0.07 of 100 is 7, and a little more in binary
    wanted -= sum(item.row.get("overlap") == "all" for item in own)
    chosen = {id(item) for item in order[: max(wanted, 0)]}
    return [replace(item, row={**item.row, "overlap": "all"}) if id(item) in chosen else item for item in items]


def _sampling_id(connection: sqlite3.Connection, settings: Mapping[str, Any] | None) -> int | None:
    if settings is None:
        return None
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    insert(connection, "sampling", {"settings": text}, "ON CONFLICT (settings) DO NOTHING")
    return int(connection.execute("SELECT id FROM sampling WHERE settings = ?", (text,)).fetchone()[0])


def get_item(connection: sqlite3.Connection, id: int) -> Item | None:
    found = connection.execute("SELECT * FROM item WHERE id = ?", (id,)).fetchone()
    return _item(connection, found, {}) if found else None


def was_shown(connection: sqlite3.Connection, annotator: Annotator, item: int) -> bool:
    """Whether an item is, or was, before an annotator."""
    query = "SELECT 1 FROM assignment WHERE annotator = ? AND item = ?"
    return item < 2**63 and connection.execute(query, (annotator.id, item)).fetchone() is not None


def all_items(connection: sqlite3.Connection) -> Iterable[Item]:
    check_complete(connection, "item")
    samplings: dict[int, Mapping[str, Any]] = {}
    for found in connection.execute("SELECT * FROM item ORDER BY id"):
        yield _item(connection, found, samplings)


def _item(connection: sqlite3.Connection, found: sqlite3.Row, samplings: dict[int, Mapping[str, Any]]) -> Item:
    check_row("item", found)
    with decoding("item", found["id"]):
        origins = []
        for origin in json.loads(found["origins"]):
            number = origin["sampling"]
            if number is not None and number not in samplings:
                settings = connection.execute("SELECT * FROM sampling WHERE id = ?", (number,)).fetchone()
                if settings is None:
                    raise DamagedRow(f"sampling {number} is gone")
                check_row("sampling", settings)
                samplings[number] = json.loads(settings["settings"])
            origins.append(ResponseOrigin(origin["model"], None if number is None else samplings[number]))
        gold = None if found["gold"] is None else parse_tiers(json.loads(found["gold"]))
        row = json.loads(found["row"])
        return Item(row, found["prompt_key"], tuple(origins), gold, found["file"], found["file_row"], found["id"])


def gold_tiers(connection: sqlite3.Connection) -> dict[int, Tiers]:
    """The known orders of gold items by number."""
    found = {}
    for row in connection.execute("SELECT * FROM item NOT INDEXED WHERE gold IS NOT NULL"):
        check_row("item", row)
        with decoding("item", row["id"]):
            found[row["id"]] = parse_tiers(json.loads(row["gold"]))
    return found


def parse_tiers(value: Iterable[Iterable[int]]) -> Tiers:
    return tuple(tuple(int(k) for k in tier) for tier in value)


# -- the queue -----------------------------------------------------------------------------------------------------


def next_item(study: Study, annotator: Annotator, *, at: float | None = None) -> Assignment | None:
    """The item that the annotator left unanswered, else a new one, else None."""
    moment = time.time() if at is None else at
    lease = study.settings.lease
    columns = "SELECT * FROM assignment WHERE annotator = ?"
    with study.reading() as connection:
        query = f"{columns} AND state IN ('pending', 'lapsed') ORDER BY since DESC LIMIT 1"
        found = connection.execute(query, (annotator.id,)).fetchone()
        if found is not None and found["state"] == "pending" and moment < found["until"] - lease + RENEW_SECONDS:
            return _assignment(connection, found)
    with study.writing() as connection:
        _lapse(connection, study.settings.overlap, moment)
        item = _resume(connection, study, annotator, moment)
        if item is None:
            item = _choose(connection, study, annotator)
            if item is None:
                return None
            _show(connection, study, annotator, item, moment)
        found = connection.execute(f"{columns} AND item = ?", (annotator.id, item)).fetchone()
        return _assignment(connection, found)


def items_seen(connection: sqlite3.Connection, annotator: Annotator) -> int:
    return int(connection.execute("SELECT seen FROM annotator WHERE id = ?", (annotator.id,)).fetchone()[0])


def items_left(connection: sqlite3.Connection, annotator: Annotator) -> int:
    """The number of items that the annotator could still be shown, if others voted no more."""
    queue = "SELECT (SELECT count(*) FROM queue WHERE fresh = 1) + (SELECT count(*) FROM queue WHERE place IS NOT NULL)"
    own = "(SELECT count(*) FROM assignment a JOIN queue q ON q.item = a.item"
    own += " WHERE a.annotator = ? AND (q.fresh = 1 OR q.place IS NOT NULL))"
    gold = "(SELECT count(*) FROM item WHERE gold IS NOT NULL AND NOT EXISTS"
    gold += " (SELECT 1 FROM assignment a WHERE a.annotator = ? AND a.item = item.id))"
    return int(connection.execute(f"{queue} - {own} + {gold}", (annotator.id, annotator.id)).fetchone()[0])


def order_shown(seed: str, annotator: int, item: int, count: int) -> tuple[int, ...]:
    """A uniformly distributed permutation of ``range(count)`` that depends on its arguments alone."""
    keys = [hashlib.blake2b(f"{seed}/{annotator}/{item}/{k}".encode(), digest_size=8).digest() for k in range(count)]
    return tuple(sorted(range(count), key=keys.__getitem__))


def change_taken(connection: sqlite3.Connection, item: int, change: int, overlap: int) -> None:
    """Count one annotator more (1) or less (-1) for an item. At its own number of annotators, or ``overlap``, it leaves
    the queue; where it needs votes again, it goes to the end."""
    found = connection.execute("SELECT taken, place, overlap FROM queue WHERE item = ?", (item,)).fetchone()
    if found is None:
        return  # gold items are shown to everyone
    taken, place, overlap = found["taken"] + change, found["place"], found["overlap"] or overlap
    if taken >= overlap:
        place = None if change > 0 else place
    elif not place:  # one behind all that were ever given: those of full items are not given again
        connection.execute(
            "INSERT INTO setting (name, value) VALUES (?,"
            " (SELECT coalesce(max(place), 0) + 1 FROM queue WHERE place IS NOT NULL))"
            " ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + 1",
            (COUNTER,),
        )
        place = int(connection.execute("SELECT value FROM setting WHERE name = ?", (COUNTER,)).fetchone()[0])
    connection.execute("UPDATE queue SET taken = ?, fresh = 0, place = ? WHERE item = ?", (taken, place, item))


def _lapse(connection: sqlite3.Connection, overlap: int, moment: float) -> None:
    """Release the items of annotators who left them unanswered."""
    query = "SELECT annotator, item FROM assignment WHERE state = 'pending' AND until < ? ORDER BY until LIMIT ?"
    for annotator, item in connection.execute(query, (moment, LAPSE_AT_ONCE)).fetchall():
        update = "UPDATE assignment SET state = 'lapsed' WHERE annotator = ? AND item = ?"
        connection.execute(update, (annotator, item))
        change_taken(connection, item, -1, overlap)


def _resume(connection: sqlite3.Connection, study: Study, annotator: Annotator, moment: float) -> int | None:
    """The last unanswered item that still needs a vote, its lease renewed."""
    overlap = study.settings.overlap
    found = connection.execute(
        "SELECT a.item, a.state FROM assignment a LEFT JOIN queue q ON q.item = a.item"
        " WHERE a.annotator = ? AND a.state IN ('pending', 'lapsed')"
        " AND (a.state = 'pending' OR coalesce(q.taken, 0) < coalesce(q.overlap, ?)) ORDER BY a.since DESC LIMIT 1",
        (annotator.id, overlap),
    ).fetchone()
    if found is None:
        return None
    if found["state"] == "lapsed":
        change_taken(connection, found["item"], 1, overlap)
    update = "UPDATE assignment SET state = 'pending', until = ? WHERE annotator = ? AND item = ?"
    connection.execute(update, (moment + study.settings.lease, annotator.id, found["item"]))
    return int(found["item"])


def _choose(connection: sqlite3.Connection, study: Study, annotator: Annotator) -> int | None:
    query, every = "SELECT seen, cursor FROM annotator WHERE id = ?", study.settings.gold_every
    seen, cursor = connection.execute(query, (annotator.id,)).fetchone()
    # One item of every block of ``every`` is a gold item, at a place that annotators cannot guess.
    block = f"{study.settings.seed}/gold/{annotator.id}/{seen // every}".encode()
    slot = int.from_bytes(hashlib.blake2b(block, digest_size=4).digest(), "little") % every
    if seen % every == slot and (gold := _next_gold(connection, annotator)) is not None:
        return gold
    begun = connection.execute(
        "SELECT item, place FROM queue WHERE place > ? AND NOT EXISTS"
        " (SELECT 1 FROM assignment a WHERE a.annotator = ? AND a.item = queue.item) ORDER BY place LIMIT 1",
        (cursor, annotator.id),
    ).fetchone()
    # All places before the one found, or all places there are, never have to be searched again.
    last = "SELECT coalesce(max(place), 0) FROM queue WHERE place IS NOT NULL"
    passed = begun["place"] - 1 if begun else connection.execute(last).fetchone()[0]
    if passed > cursor:
        connection.execute("UPDATE annotator SET cursor = ? WHERE id = ?", (passed, annotator.id))
    if begun:
        return int(begun["item"])
    fresh = connection.execute("SELECT item FROM queue WHERE fresh = 1 ORDER BY item LIMIT 1").fetchone()
    return int(fresh["item"]) if fresh else _next_gold(connection, annotator)


def _next_gold(connection: sqlite3.Connection, annotator: Annotator) -> int | None:
    query = "SELECT id FROM item WHERE gold IS NOT NULL AND NOT EXISTS"
    query += " (SELECT 1 FROM assignment a WHERE a.annotator = ? AND a.item = item.id) ORDER BY id LIMIT 1"
    found = connection.execute(query, (annotator.id,)).fetchone()
    return int(found["id"]) if found else None


def _show(connection: sqlite3.Connection, study: Study, annotator: Annotator, item: int, moment: float) -> None:
    settings = study.settings
    count = connection.execute("SELECT count FROM item WHERE id = ?", (item,)).fetchone()[0]
    shown = order_shown(settings.seed, annotator.id, item, count)
    ticket = secrets.token_urlsafe(18)
    event = {"at": now(), "annotator": annotator.id, "item": item, "kind": "shown", "ticket": ticket}
    insert(connection, "event", event | {"body": json.dumps({"order": shown})})
    connection.execute(
        "INSERT INTO assignment VALUES (?, ?, 'pending', ?, ?, ?, ?, NULL)",
        (annotator.id, item, ticket, json.dumps(shown), moment, moment + settings.lease),
    )
    connection.execute("UPDATE annotator SET seen = seen + 1 WHERE id = ?", (annotator.id,))
    change_taken(connection, item, 1, settings.overlap)


def _assignment(connection: sqlite3.Connection, found: sqlite3.Row) -> Assignment:
    item = get_item(connection, found["item"])
    if item is None:
        raise DamagedRow(f"item {found['item']} is gone")
    with decoding("the assignment of item", item.id):
        shown = tuple(json.loads(found["shown"]))
        if sorted(shown) != list(range(item.count)):
            raise DamagedRow(f"the assignment of item {item.id} shows responses that it does not have")
    return Assignment(item, found["ticket"], shown, found["since"])
