"""Values of a row: how they look, how they are converted, and what labels mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from prefopt.errors import ConfigError

MAX_REASON = 300  # characters: a reason may quote from the row


class BadRow(Exception):
    """A row that cannot be read. Rows are counted by ``kind``; ``what`` is the reason for this one."""

    def __init__(self, kind: str, what: str) -> None:
        self.kind, self.what = kind, what if len(what) <= MAX_REASON else f"{what[:MAX_REASON]}..."
        super().__init__(self.what)


def type_name(value: object) -> str:
    """The type of a value in words, such as ``a list``."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def items_of(value: object, name: str) -> Sequence[object]:
    """The value as a list or tuple; ``name`` is its place in the row, for messages."""
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, not a list")
    return value


def number_of(value: object, name: str) -> float:
    """The value as a finite number; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, not a number")
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
        raise BadRow("wrong type", f"{name} holds {type_name(value)}, not the index of a response")
    if not 0 <= value < count:
        raise BadRow("unknown response", f"{name} names response {value}; there are {count}, counted from 0")
    return value


def object_text(value: object, name: str, *, verbatim: bool = False) -> str:
    """A JSON object, given as an object or as text, written as ``json.dumps`` does; ``verbatim`` keeps given text."""
    if isinstance(value, str):
        found = json_of(value, name)
        if not isinstance(found, dict):
            raise BadRow("wrong type", f"{name} is {type_name(found)} written as text, not an object")
        return value if verbatim else dumps(found, name)
    if not isinstance(value, dict):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, not an object")
    return dumps(value, name)


def json_of(text: str, name: str) -> object:
    """Decoded JSON text."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} is text that is not JSON ({error})") from None
    return found


def dumps(value: object, name: str) -> str:
    """JSON text without ASCII escapes, as chat templates show objects."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} cannot be written as JSON ({error})") from None


TRANSCRIPT_STARTS = ("\n\nHuman:", "\n\nAssistant:")
LISTS = ("messages", "replies", "weighted", "texts", "list")  # results of look() for a list

# Scores of a pair, and their other column names: chosen_rating, rating_chosen, chosen-rating and the like.
# Ranks, counts and rewards are not read as scores.
SCORES = ("score_chosen", "score_rejected")
_MEASURES = [f"{mean}{what}" for what in ("score", "rating") for mean in ("", "avg_", "average_", "mean_", "overall_")]
_UNDERSCORED = [
    pair
    for what in _MEASURES
    for pair in ((f"chosen_{what}", f"rejected_{what}"), (f"{what}_chosen", f"{what}_rejected"))
]
SCORE_COLUMNS = [(good.replace("_", sign), bad.replace("_", sign)) for sign in "_-" for good, bad in _UNDERSCORED]


def look(value: object) -> str:
    """The kind of a value, finer than its type, so that layouts with the same columns can be told apart.

    ``replies`` are messages that begin with the assistant, ``weighted`` messages are LLaMA-Factory v1's,
    ``transcript`` is text as in Anthropic's HH, ``scores`` is an object with the scores of chosen and rejected.
    """
    if isinstance(value, str):
        return "transcript" if value.startswith(TRANSCRIPT_STARTS) else "text"
    if isinstance(value, (list, tuple)):
        first = value[0] if value else None
        if isinstance(first, dict):
            if _weighted(first):
                return "weighted"
            return "replies" if first.get("role", first.get("from")) in ("assistant", "gpt") else "messages"
        return "texts" if isinstance(first, str) else "list"
    if isinstance(value, dict):
        if "solution" in value and "is_correct" in value:
            return "solution"
        if "score_chosen" in value and "score_rejected" in value:
            return "scores"
        return "message" if ("role" in value or "from" in value) else "object"
    if isinstance(value, bool):
        return "truth"
    return "null" if value is None else "number"


def _weighted(message: dict[object, object]) -> bool:
    content = message.get("content")
    part = content[0] if isinstance(content, list) and content else None
    return message.get("loss_weight") is not None or (isinstance(part, dict) and part.get("value") is not None)


def scored_sides(looks: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that hold the scores of chosen and rejected under other names than :data:`SCORES`: two, or
    ``metadata`` with both. ``looks`` is the :func:`look` of each column; nothing where it has :data:`SCORES`."""
    if any(looks.get(name, "null") != "null" for name in SCORES):
        return ()
    metadata = ("metadata",) if looks.get("metadata") == "scores" else ()
    return next(
        (pair for pair in SCORE_COLUMNS if all(looks.get(name) in ("number", "cell") for name in pair)), metadata
    )


MEANINGS = ("first", "second", "tie", "good", "bad")
TIERS: Mapping[str, tuple[tuple[int, ...], ...]] = {"first": ((0,), (1,)), "second": ((1,), (0,)), "tie": ((0, 1),)}
# Labels that name a response in any data set. Numbers do not: 0 is the first response in some and a tie in others.
LABEL_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("first", "a", "model_a", "response_a"), "first"),
    **dict.fromkeys(("second", "b", "model_b", "response_b"), "second"),
    **dict.fromkeys(
        ("tie", "equal", "draw", "tie (bothbad)", "tie (both bad)", "tie_bothbad", "both_bad", "bothbad", "both bad"),
        "tie",
    ),
}


def label_text(value: object) -> str:
    """A label as text: ``1``, ``1.0`` and ``"1"`` are one label, and so are ``true`` and ``"True"``."""
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
    """``["0=first,1=second", "2=tie"]`` as a mapping. Raises :class:`ConfigError` for anything else."""
    means: dict[str, str] = {}
    for part in (part.strip() for word in given for part in word.split(",")):
        label, equals, meaning = part.rpartition("=")
        if not (equals and label.strip() and meaning.strip() in MEANINGS):
            what = f"--label-means {part!r} should be LABEL=MEANING, such as 0=first,1=second,2=tie"
            raise ConfigError(f"{what}; meanings are {', '.join(MEANINGS)}")
        if means.setdefault(label_text(label), meaning.strip()) != meaning.strip():
            raise ConfigError(f"--label-means gives {label.strip()} two meanings; leave one out")
    return means


def verdict(value: object, name: str, means: Mapping[str, str], sides: Sequence[str] = ()) -> str:
    """``first``, ``second`` or ``tie``, by ``means`` if given, else by :data:`LABEL_NAMES` and the names of the two
    columns, ``sides``. Raises :class:`BadRow` for any other label."""
    if not isinstance(value, (str, bool, int, float)):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, not a label")
    label = label_text(value)
    names = means or {**LABEL_NAMES, **dict(zip(map(label_text, sides), ("first", "second"), strict=False))}
    found = names.get(label, names.get({"true": "1", "false": "0"}.get(label, "")))
    if found in TIERS:
        return str(found)
    if means:
        known = ", ".join(f"{label}={meaning}" for label, meaning in means.items())
        raise BadRow("unknown label", f"{name} is {value!r}; the known labels are {known}")
    remedy = "give the meaning of labels, such as --label-means 0=first,1=second,2=tie"
    raise BadRow("label of unknown meaning", f"{name} is {value!r}, and no response is known by that label; {remedy}")
