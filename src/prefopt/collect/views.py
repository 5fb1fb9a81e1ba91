"""Contents of the pages: languages, an item with its responses, the ballot, and the lead's statistics."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from markupsafe import Markup

from prefopt.collect.markdown import as_html, as_plain
from prefopt.collect.pictures import parts_of, pictures_before, words_of
from prefopt.records import Tiers
from prefopt.studies.annotators import annotators
from prefopt.studies.items import Item, get_item
from prefopt.studies.study import Study
from prefopt.studies.summary import StudySummary, answer_kind, summarise
from prefopt.studies.votes import RefusedVote, StoredVote, Vote, stored_votes
from prefopt.web.language import read_languages

LETTERS = "ABCDEFGHI"
REASONS = ("unclear", "outside", "broken", "offensive")
LONGEST_FIELD = 20_000
LANGUAGES = read_languages("prefopt.collect")

Form = Mapping[str, Sequence[str]]
"""Field names to values."""


# -- items ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MessageView:
    """One message: role, content as HTML, reasoning as HTML, and tool calls as text."""

    role: str
    html: Markup
    reasoning: Markup | None = None
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponseView:
    """A response on the page: ``place`` counts from 0, ``letter`` is its name, ``source`` its text without markup."""

    place: int
    letter: str
    messages: tuple[MessageView, ...]
    source: str


@dataclass(frozen=True, slots=True)
class ItemView:
    """A prompt and its responses in the order shown."""

    prompt: tuple[MessageView, ...]
    tools: tuple[str, ...]
    responses: tuple[ResponseView, ...]


def view_of(item: Item, shown: Sequence[int]) -> ItemView:
    """An item with the responses in the order ``shown``, a list of their indices."""
    row = item.row
    plain = isinstance(row["prompt"], str)

    def messages(role: str, given: Any, first: int = 0) -> tuple[MessageView, ...]:
        """Of turns whose pictures are numbered from ``first``."""
        if plain:
            return (MessageView(role, as_plain(given) if given else Markup()),)
        addresses = (f"/picture/{item.id}/{number}" for number in count(first))
        return tuple(_message(message, addresses) for message in given)

    responses = []
    before = pictures_before(row)
    for place, k in enumerate(shown):
        given = row["responses"][k]
        source = given if plain else "\n\n".join(words_of(m.get("content")) for m in given)
        responses.append(ResponseView(place, LETTERS[place], messages("assistant", given, before[k]), source))
    prompt = tuple(m for m in messages("user", row["prompt"]) if m.html or m.calls or m.reasoning)
    return ItemView(prompt, tuple(_indented(tool) for tool in row.get("tools") or ()), tuple(responses))


def _message(message: Mapping[str, Any], addresses: Iterator[str]) -> MessageView:
    """A message; its pictures have the next ``addresses``."""
    reasoning = message.get("reasoning_content")
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        calls.append(f"{function.get('name', '')}({_indented(function.get('arguments', ''))})")
    html = Markup()
    for part in parts_of(message.get("content")):
        if part.get("type") == "image":
            html += Markup('<img class="picture" src="{}" alt="">').format(next(addresses))
        else:
            html += as_html(str(part["text"]))
    return MessageView(str(message["role"]), html, as_html(reasoning) if reasoning else None, tuple(calls))


def _indented(text: str) -> str:
    try:
        return json.dumps(json.loads(text), indent=1, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


# -- the ballot ----------------------------------------------------------------------------------------------------


def field_of(form: Form, name: str) -> str:
    """The value of a field, or an empty string. Raises :class:`RefusedVote` for a repeated field."""
    values = form.get(name, ())
    if len(values) > 1:
        raise RefusedVote(f"the form has {name} twice")
    return values[0][:LONGEST_FIELD] if values else ""


def read_ballot(form: Form, shown: Sequence[int], tags: Sequence[str]) -> Vote:
    """The vote of a form on the responses ``shown`` [K]. Raises :class:`RefusedVote`.

    ``choice`` is ``a1`` to ``a3`` or ``b1`` to ``b3`` (the first or second of two is better, with strength), ``tie``,
    ``bad``, ``skip`` (with a ``reason``), or ``rank`` with a rank for each place in ``rank0``, ``rank1``, ...
    """
    choice, count = field_of(form, "choice"), len(shown)
    rationale = field_of(form, "rationale").replace("\r\n", "\n").strip()
    given = tuple(dict.fromkeys(form.get("tag", ())))
    if not set(given) <= set(tags):
        raise RefusedVote("the form has a tag that the study does not have")

    def vote(*tiers: Sequence[int], strength: int | None = None, bad: bool = False, skipped: str | None = None) -> Vote:
        by_response = tuple(tuple(shown[place] for place in tier) for tier in tiers)
        return Vote(by_response, strength, bad, skipped, rationale, given)

    if choice == "skip":
        reason = field_of(form, "reason")
        if reason not in REASONS:
            raise RefusedVote("a skipped item needs a reason")
        return vote(skipped=reason)
    if choice == "bad":
        return vote(bad=True)
    if choice == "tie":
        return vote(range(count))
    if choice == "rank":
        return vote(*_ranks(form, count))
    if count == 2 and len(choice) == 2 and choice[0] in "ab" and choice[1] in "123":
        best = "ab".index(choice[0])
        return vote([best], [1 - best], strength=int(choice[1]))
    raise RefusedVote("choose one of the answers")


def _ranks(form: Form, count: int) -> Tiers:
    """Tiers of places from their ranks; places without a rank are left out."""
    by_rank: dict[int, tuple[int, ...]] = {}
    for place in range(count):
        text = field_of(form, f"rank{place}")
        if text and not (len(text) == 1 and text in "123456789" and int(text) <= count):
            raise RefusedVote(f"a rank is a number from 1 to {count}")
        if text:
            by_rank[int(text)] = (*by_rank.get(int(text), ()), place)
    if sum(map(len, by_rank.values())) < 2:
        raise RefusedVote("rank at least two responses")
    return tuple(by_rank[rank] for rank in sorted(by_rank))


# -- the lead's pages --------------------------------------------------------------------------------------------------


class Lead:
    """Statistics of a study, recomputed when it changes, and single items with all votes. Statistics may be old by
    ``patience`` times the time that they take."""

    def __init__(self, study: Study, patience: float = 10.0) -> None:
        self.study, self._patience = study, patience
        self._turn = threading.Lock()
        self._cached: tuple[tuple[int, int], float, StudySummary] | None = None

    def summary(self) -> StudySummary:
        with self._turn:
            revision = self.study.revision()
            started = time.monotonic()
            if self._cached is not None and (self._cached[0] == revision or started < self._cached[1]):
                return self._cached[2]
            found = summarise(self.study)
            ended = time.monotonic()
            self._cached = revision, ended + self._patience * (ended - started), found
            return found

    def item(self, number: int) -> dict[str, Any] | None:
        """The template values of an item with all its votes, or None for an unknown number."""
        with self.study.reading() as connection:
            item = get_item(connection, number) if number < 2**63 else None
            if item is None:
                return None
            names = {a.id: a.name for a in annotators(connection)}
            votes = [_vote_values(v, names[v.annotator]) for v in stored_votes(connection, number)]
        models = [o.model for o in item.origins]
        return {"item": item, "view": view_of(item, range(item.count)), "votes": votes, "models": models}


def _vote_values(v: StoredVote, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "skip" if v.vote.skipped is not None else answer_kind(v),
        "reason": v.vote.skipped,
        "order": " > ".join(" = ".join(LETTERS[k] for k in tier) for tier in v.vote.tiers),
        "shown": " ".join(LETTERS[k] for k in v.shown),
        "rationale": v.vote.rationale,
        "tags": v.vote.tags,
        "seconds": v.seconds if v.active is None else v.active,
    }


def number(value: float, digits: int = 2) -> str:
    """A number for a table, or a dash for nan."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
