"""Values of a row and what is said of those that are not what they should be."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

SAID = 300  # characters of what is said of a row, which may quote from it


class BadRow(Exception):
    """A row that gives no comparison: ``kind`` is what rows are counted by, ``what`` says it of this one."""

    def __init__(self, kind: str, what: str) -> None:
        self.kind, self.what = kind, what if len(what) <= SAID else f"{what[:SAID]}..."
        super().__init__(self.what)


def kind(value: object) -> str:
    """What a value is, in words: ``a list``."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def items_of(value: object, name: str) -> Sequence[object]:
    """A list (a tuple counts as one); ``name`` says where it stands."""
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not a list")
    return value


def number_of(value: object, name: str) -> float:
    """A finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow("not a finite number", f"{name} is {number}; it should be a finite number")
    return number


def index_of(value: object, count: int, name: str) -> int:
    """The index of one of ``count`` responses, counted from 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRow("wrong type", f"{name} holds {kind(value)}, not the index of a response")
    if not 0 <= value < count:
        raise BadRow("unknown response", f"{name} names response {value}; there are {count}, counted from 0")
    return value


def object_text(value: object, name: str, *, verbatim: bool = False) -> str:
    """A JSON object as text, whether given as one or as text; spelt as ``json.dumps`` does unless ``verbatim``."""
    if isinstance(value, str):
        found = json_of(value, name)
        if not isinstance(found, dict):
            raise BadRow("wrong type", f"{name} is {kind(found)} written as text, not an object")
        return value if verbatim else dumps(found, name)
    if not isinstance(value, dict):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not an object")
    return dumps(value, name)


def json_of(text: str, name: str) -> object:
    """What JSON text says."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} is text that is not JSON ({error})") from None
    return found


def dumps(value: object, name: str) -> str:
    """JSON text with characters as they are: what chat templates show of an object."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} cannot be written as JSON ({error})") from None
