"""Values of a row and what is said of those that are not what they should be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from prefopt.errors import ConfigError

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


MEANINGS = ("first", "second", "tie", "good", "bad")
TIERS: Mapping[str, tuple[tuple[int, ...], ...]] = {"first": ((0,), (1,)), "second": ((1,), (0,)), "tie": ((0, 1),)}
# Labels that name a side, whoever writes them. Numbers are none: 0 is the first response here and a tie there.
WORDS: Mapping[str, str] = {
    **dict.fromkeys(("first", "a", "model_a", "response_a"), "first"),
    **dict.fromkeys(("second", "b", "model_b", "response_b"), "second"),
    **dict.fromkeys(
        ("tie", "equal", "draw", "tie (bothbad)", "tie (both bad)", "tie_bothbad", "both_bad", "bothbad", "both bad"),
        "tie",
    ),
}
UNSAID = "label of unknown meaning"


def spelt(value: object) -> str:
    """A label as text, so that ``1``, ``1.0`` and ``"1"`` are one, and so are ``true`` and ``"True"``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        text = value.strip().lower()
        try:
            return f"{float(text):g}" if text[:1].isdigit() or text[:1] in "+-." else text
        except ValueError:
            return text
    return f"{value:g}" if isinstance(value, float) else ""


def parse_means(given: Sequence[str]) -> dict[str, str]:
    """``["0=first,1=second", "2=tie"]`` as a mapping. Raises :class:`ConfigError` for what says no meaning."""
    means: dict[str, str] = {}
    for part in (part.strip() for word in given for part in word.split(",")):
        label, equals, meaning = part.rpartition("=")
        if not (equals and label.strip() and meaning.strip() in MEANINGS):
            what = f"--label-means {part!r} should be LABEL=MEANING, such as 0=first,1=second,2=tie"
            raise ConfigError(f"{what}; meanings are {', '.join(MEANINGS)}")
        if means.setdefault(spelt(label), meaning.strip()) != meaning.strip():
            raise ConfigError(f"--label-means gives {label.strip()} two meanings; leave one out")
    return means


def verdict(value: object, name: str, means: Mapping[str, str], sides: Sequence[str] = ()) -> str:
    """``first``, ``second`` or ``tie``: by ``means`` where there are any, else by :data:`WORDS` and the names of the
    two columns, ``sides``. Raises :class:`BadRow` for a label that says none of them."""
    if not isinstance(value, (str, bool, int, float)):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not a label")
    label = spelt(value)
    names = means or {**WORDS, **dict(zip(map(spelt, sides), ("first", "second"), strict=False))}
    found = names.get(label, names.get({"true": "1", "false": "0"}.get(label, "")))
    if found in TIERS:
        return str(found)
    if means:
        what = f"{name} is {value!r}; the labels that are known mean {_listed(means)}"
        raise BadRow("unknown label", what)
    raise BadRow(
        UNSAID,
        f"{name} is {value!r}, and which response that prefers is not said; say it, such as "
        "--label-means 0=first,1=second,2=tie",
    )


def _listed(means: Mapping[str, str]) -> str:
    return ", ".join(f"{label}={meaning}" for label, meaning in means.items())
