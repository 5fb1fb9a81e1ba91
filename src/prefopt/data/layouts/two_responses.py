"""Two responses and which of them is better: by a label whose meaning is stated, by scores, or by votes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from prefopt.data.layouts.layout import Layout
from prefopt.data.layouts.llama_factory import instructed
from prefopt.data.layouts.providers import MARK, ROLES
from prefopt.data.layouts.row import Row, answer, text_prompt
from prefopt.data.layouts.shapes import TURNS, look
from prefopt.data.layouts.values import TIERS, BadRow, items_of, kind, verdict
from prefopt.records import Comparison, Message, Response, tiers_of


def within(values: Mapping[str, object], path: str) -> object:
    """What stands at a path, or None where it leads nowhere."""
    found: object = values
    for key in path.split("."):
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, (list, tuple)) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def there(row: Row, path: str) -> object:
    """The same, of a value that must be there."""
    value = within(row.values, path)
    if value is None:
        raise BadRow("missing field", f"lacks {path}")
    return value


def asked(row: Row, path: str) -> tuple[Message, ...]:
    """A prompt: messages, a transcript in the manner of Anthropic's HH, or the words of a user."""
    value = there(row, path)
    if isinstance(value, (list, tuple)):
        return row.with_system(row.response_of(value, path).messages)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{path} is {kind(value)}, not text or messages")
    if not value.startswith(TURNS):
        return row.with_system((Message("user", value),))
    marks = list(MARK.finditer(value))
    ends = [mark.start() for mark in marks[1:]] + [len(value)]
    turns = [Message(ROLES[m[1]], value[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)]
    if turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()
    return row.with_system(tuple(turns))


def replied(row: Row, value: object, name: str) -> Response:
    """A response: text or messages."""
    if value is None:
        raise BadRow("missing field", f"lacks {name}")
    return answer(value) if isinstance(value, str) else row.response_of(value, name)


def turns_of_texts(row: Row, name: str) -> list[str]:
    """A list of texts, which may be written as JSON: the turns of one side."""
    value = there(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("wrong type", f"{name} is text that is no list of turns written as JSON") from None
    texts = items_of(value, name)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRow("wrong type", f"{name} should be a list of texts, one for each turn, none of them null")
    return [str(text) for text in texts]


JUDGED = ("label", "score_first", "score_second", "votes_first", "votes_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Where a public data set keeps a prompt, two responses and which is better; paths such as ``info.post``.

    ``means`` says what its labels mean. Of ``label`` and ``scores`` (higher is better) it has one.
    """

    prompt: str
    first: str
    second: str
    label: str = ""
    means: Mapping[str, str] = field(default_factory=dict)
    scores: tuple[str, str] | tuple[()] = ()

    def read(self, row: Row) -> Comparison:
        """The comparison; ``--label-means`` goes before what is known of the labels."""
        sides = [replied(row, within(row.values, path), path) for path in (self.first, self.second)]
        prompt = asked(row, self.prompt)
        if self.scores:
            scores = tuple(row.number_of(there(row, path), path) for path in self.scores)
            return row.comparison(prompt, sides, tiers_of(scores), scores=scores)
        found = verdict(there(row, self.label), self.label, row.means or self.means)
        return row.comparison(prompt, sides, TIERS[found])


def judged(row: Mapping[str, object]) -> bool:
    """There are two responses, and something says which is better."""
    sides = [look(row[name]) for name in ("first", "second")]
    return not {"number", "truth"} & set(sides) and any(row.get(name) is not None for name in JUDGED)


def _read(row: Row, prompt: tuple[Message, ...], *, text: bool) -> Comparison:
    sides = [row.response("first", text=text), row.response("second", text=text)]
    scores, votes = (_both(row, f"{what}_first", f"{what}_second") for what in ("score", "votes"))
    if row.has("label"):
        tiers = TIERS[verdict(row.given("label"), "label", row.means, row.sides)]
        return row.comparison(prompt, sides, tiers, text=text, scores=scores)
    if scores is not None:
        return row.comparison(prompt, sides, tiers_of(scores), text=text, scores=scores)
    if votes is None:
        raise BadRow("missing field", "lacks label, score_first and score_second, or votes_first and votes_second")
    return by_votes(row, prompt, sides, votes, text=text)


def by_votes(
    row: Row, prompt: tuple[Message, ...], sides: list[Response], votes: tuple[float, ...], *, text: bool = False
) -> Comparison:
    """Two responses with how many people preferred each; as many for both are a tie."""
    if min(votes) < 0:
        raise BadRow("wrong type", f"has {min(votes):g} votes for a response; there can be none or more")
    cast = tuple((k, 1 - k, v) for k, v in enumerate(votes) if v)
    both = cast if len(cast) == 2 else None
    return row.comparison(prompt, sides, tiers_of(votes), text=text, votes=both)


def _both(row: Row, first: str, second: str) -> tuple[float, ...] | None:
    if not (row.has(first) or row.has(second)):
        return None
    if not (row.has(first) and row.has(second)):
        raise BadRow("missing score", f"has only one of {first} and {second}")
    return tuple(row.number_of(row.given(name), name) for name in (first, second))


def _read_text(row: Row) -> Comparison:
    chat = look(row.given("prompt")) != "text" and look(row.given("prompt")) != "transcript"
    prompt = row.chat("prompt") if chat else text_prompt(row.text("prompt"))
    return _read(row, prompt, text=not chat)


def _read_chat(row: Row) -> Comparison:
    return _read(row, instructed(row), text=False)


SAYS = "two responses, and a label that says which is better (--label-means), scores, or votes"
TWO_CHAT = Layout(
    name="two-responses-chat",
    fields=("instruction", "first", "second"),
    reader=_read_chat,
    gives="pairs",
    example={"instruction": "What is 2 + 2?", "first": "22", "second": "4", "label": "second"},
    says=f"an instruction, {SAYS}",
    shape=judged,
    origin="judges and people",
    optional=("input", "system", "history", *JUDGED),
    words={"prompt": "instruction", "query": "input"},
    aliases={"question": "instruction"},
)
TWO_TEXT = Layout(
    name="two-responses",
    fields=("prompt", "first", "second"),
    reader=_read_text,
    gives="pairs",
    example={"prompt": "2 + 2 =", "first": " 22", "second": " 4", "score_first": 1.0, "score_second": 9.0},
    says=f"a prompt, in turns or as plain text, {SAYS}",
    shape=judged,
    origin="judges and people",
    optional=("system", "tools", *JUDGED),
)
