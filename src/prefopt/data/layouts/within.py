"""Values that stand deeper in a row, by a path such as ``summaries.0.text``; and prompts in their various spellings."""

from __future__ import annotations

import json
from collections.abc import Mapping

from prefopt.data.layouts.hh import MARK, ROLES
from prefopt.data.layouts.row import Row, answer
from prefopt.data.layouts.shapes import TURNS
from prefopt.data.layouts.values import BadRow, items_of, kind
from prefopt.records import Message, Response


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
