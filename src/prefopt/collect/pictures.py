"""Pictures of a study: encoded again without metadata when they are imported, and served from the study alone."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from prefopt.data.pictures import reencoded
from prefopt.records import Comparison, Message, Response
from prefopt.studies.items import Item

PREFIX = "data:image/png;base64,"
"""How the canonical layout begins a picture that :func:`without_metadata` encoded."""


def without_metadata(c: Comparison) -> Comparison:
    """The row with its pictures in PNG, of the same pixels, without what cameras and programs wrote beside them.

    Raises :class:`prefopt.data.pictures.BadPicture` and :class:`prefopt.errors.DataError` for one that cannot be read.
    """

    def changed(m: Message) -> Message:
        return replace(m, pictures=tuple(map(reencoded, m.pictures))) if m.pictures else m

    responses = tuple(Response(tuple(map(changed, r.messages)), r.cut) for r in c.responses)
    return replace(c, prompt=tuple(map(changed, c.prompt)), responses=responses)


def parts_of(content: object) -> list[Mapping[str, Any]]:
    """The content of a message in the canonical layout as parts."""
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": str(content)}] if content else []


def words_of(content: object) -> str:
    """The words of a message, without its pictures."""
    return "".join(str(part["text"]) for part in parts_of(content) if part.get("type") == "text")


def picture_of(item: Item, place: int) -> bytes | None:
    """The ``place``-th picture of an item (from 0: the prompt's, then each response's) as PNG; None without it."""
    found = next((held for at, held in enumerate(_pictures(item.row)) if at == place), "")
    return base64.b64decode(found[len(PREFIX) :]) if found.startswith(PREFIX) else None


def pictures_before(row: Mapping[str, Any]) -> list[int]:
    """The number of the first picture of each response, [K]."""
    counts = [_count(row["prompt"]), *map(_count, row["responses"])]
    return [sum(counts[: k + 1]) for k in range(len(row["responses"]))]


def _count(turns: Any) -> int:
    return sum(1 for _ in _in_turns(turns))


def _pictures(row: Mapping[str, Any]) -> Iterator[str]:
    for turns in (row["prompt"], *row["responses"]):
        yield from _in_turns(turns)


def _in_turns(turns: Any) -> Iterator[str]:
    for message in turns if isinstance(turns, list) else ():
        yield from (str(part["image"]) for part in parts_of(message.get("content")) if part.get("type") == "image")
