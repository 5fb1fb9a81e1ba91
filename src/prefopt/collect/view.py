"""Items as pages show them: rendered, in the order shown, without a word of where a response comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from prefopt.collect.text import as_html, as_plain
from prefopt.studies.items import Item

LETTERS = "ABCDEFGHI"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: ``role``, its words as HTML, its reasoning, and the functions it calls as text."""

    role: str
    html: Markup
    reasoning: Markup | None
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """A response on the page: ``place`` counts from 0, ``letter`` is its name there, ``source`` its text as it is."""

    place: int
    letter: str
    turns: tuple[Turn, ...]
    source: str


@dataclass(frozen=True, slots=True)
class ItemView:
    """A prompt and its responses in the order shown."""

    prompt: tuple[Turn, ...]
    tools: tuple[str, ...]
    sides: tuple[Side, ...]


def view_of(item: Item, shown: Sequence[int]) -> ItemView:
    """What a page shows of an item."""
    row = item.row
    given = row["prompt"]
    plain = isinstance(given, str)
    prompt = (_plain_turn("user", given),) if plain else tuple(_turn(m) for m in given)
    sides = []
    for place, number in enumerate(shown):
        response = row["responses"][number]
        turns = (_plain_turn("assistant", response),) if plain else tuple(_turn(m) for m in response)
        source = response if plain else "\n\n".join(str(m.get("content") or "") for m in response)
        sides.append(Side(place, LETTERS[place], turns, source))
    tools = tuple(_pretty(tool) for tool in row.get("tools") or ())
    return ItemView(tuple(t for t in prompt if t.html or t.calls or t.reasoning), tools, tuple(sides))


def _turn(message: Mapping[str, Any]) -> Turn:
    reasoning = message.get("reasoning_content")
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        calls.append(f"{function.get('name', '')}({_pretty(function.get('arguments', ''))})")
    content = str(message.get("content") or "")
    return Turn(
        str(message["role"]),
        as_html(content) if content else Markup(),
        as_html(reasoning) if reasoning else None,
        tuple(calls),
    )


def _plain_turn(role: str, text: str) -> Turn:
    return Turn(role, as_plain(text) if text else Markup(), None, ())


def _pretty(text: str) -> str:
    try:
        return json.dumps(json.loads(text), indent=1, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
