"""What people are shown: a prompt and its responses, kept as the rows of a file would hold them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.errors import StudyError
from prefopt.studies.digests import Damaged, check, check_complete, decoding, insert
from prefopt.studies.study import Study, now

MOST_RESPONSES = 9
"""Responses of an item at most: as many as a keyboard has digits."""

Tiers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a response comes from: the model's name, and how it was sampled."""

    model: str | None = None
    sampling: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item to add.

    ``row`` is prompt and responses (and tools) in the canonical layout, ``prompt_key`` names the prompt, ``origins``
    are the responses', ``gold`` is the known order of a gold item; ``file`` and ``file_row`` say where it was read.
    """

    row: Mapping[str, Any]
    prompt_key: bytes
    origins: Sequence[Origin]
    gold: Tiers | None = None
    file: str = ""
    file_row: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """An item of a study; ``origins`` [K] as in the file, ``sampling`` already looked up."""

    id: int
    row: Mapping[str, Any]
    prompt_key: bytes
    origins: tuple[Origin, ...]
    gold: Tiers | None
    file: str
    file_row: int

    @property
    def count(self) -> int:
        """K, how many responses there are."""
        return len(self.origins)


def add_items(study: Study, items: Iterable[NewItem]) -> tuple[int, int]:
    """Add items in their order, all or none; (added, already there). Raises :class:`StudyError`."""
    added = there = 0
    with study.writing() as connection:
        for item in items:
            if not 2 <= len(item.origins) <= MOST_RESPONSES:
                raise StudyError(
                    f"{item.file}, row {item.file_row}: has {len(item.origins)} responses;"
                    f" an item has 2 to {MOST_RESPONSES}"
                )
            if _add(connection, item):
                added += 1
            else:
                there += 1
    return added, there


def _add(connection: sqlite3.Connection, item: NewItem) -> bool:
    origins = [{"model": o.model, "sampling": _sampling(connection, o.sampling)} for o in item.origins]
    gold = None if item.gold is None else json.dumps(item.gold)
    row = json.dumps(item.row, ensure_ascii=False)
    try:
        row.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which SQLite cannot hold
        row = json.dumps(item.row)
    values = {
        "digest": item_digest(item),
        "prompt_key": item.prompt_key,
        "row": row,
        "count": len(item.origins),
        "origins": json.dumps(origins, ensure_ascii=False),
        "gold": gold,
        "file": item.file,
        "file_row": item.file_row,
        "at": now(),
    }
    done = insert(connection, "item", values, "ON CONFLICT (digest) DO NOTHING")
    if done.rowcount and gold is None:
        connection.execute("INSERT INTO queue (item) VALUES (?)", (done.lastrowid,))
    return bool(done.rowcount)


def item_digest(item: NewItem) -> bytes:
    """What makes an item the same as another: the row, whatever its place; a gold one is none of the others."""
    text = json.dumps([item.row, item.gold], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def get_item(connection: sqlite3.Connection, id: int) -> Item | None:
    """One item, or None."""
    found = connection.execute("SELECT * FROM item WHERE id = ?", (id,)).fetchone()
    return _item(connection, found, {}) if found else None


def all_items(connection: sqlite3.Connection) -> Iterable[Item]:
    """All items in order, one after another."""
    check_complete(connection, "item")
    samplings: dict[int, Mapping[str, Any]] = {}
    for found in connection.execute("SELECT * FROM item ORDER BY id"):
        yield _item(connection, found, samplings)


def _item(connection: sqlite3.Connection, found: sqlite3.Row, samplings: dict[int, Mapping[str, Any]]) -> Item:
    check("item", found)
    with decoding("item", found["id"]):
        origins = []
        for origin in json.loads(found["origins"]):
            number = origin["sampling"]
            if number is not None and number not in samplings:
                samplings[number] = _settings_of(connection, number)
            origins.append(Origin(origin["model"], None if number is None else samplings[number]))
        gold = None if found["gold"] is None else tiers_of(json.loads(found["gold"]))
        row = json.loads(found["row"])
        return Item(found["id"], row, found["prompt_key"], tuple(origins), gold, found["file"], found["file_row"])


def _settings_of(connection: sqlite3.Connection, number: int) -> Mapping[str, Any]:
    found = connection.execute("SELECT * FROM sampling WHERE id = ?", (number,)).fetchone()
    if found is None:
        raise Damaged(f"sampling {number} is gone")
    check("sampling", found)
    settings: Mapping[str, Any] = json.loads(found["settings"])
    return settings


def tiers_of(value: Iterable[Iterable[int]]) -> Tiers:
    """Tiers from JSON."""
    return tuple(tuple(int(k) for k in tier) for tier in value)


def _sampling(connection: sqlite3.Connection, settings: Mapping[str, Any] | None) -> int | None:
    if settings is None:
        return None
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    insert(connection, "sampling", {"settings": text}, "ON CONFLICT (settings) DO NOTHING")
    found: int = connection.execute("SELECT id FROM sampling WHERE settings = ?", (text,)).fetchone()[0]
    return found
