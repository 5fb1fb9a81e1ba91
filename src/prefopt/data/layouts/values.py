"""Values of a row: how they look, how they are converted, and what labels mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from prefopt.errors import LONGEST, ConfigError


class BadRow(Exception):
    """A row that cannot be read. Rows are counted by ``kind``; ``what`` is the reason for this one, ``pictures`` are
    the files that cause it."""

    def __init__(self, kind: str, what: str, pictures: tuple[str, ...] = ()) -> None:
        self.pictures = pictures
        self.kind, self.what = kind, what if len(what) <= LONGEST else f"{what[:LONGEST]}..."
        super().__init__(self.what)


def type_name(value: object) -> str:
    """The type of a value in words, such as ``a list``."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def items_of(value: object, name: str) -> Sequence[object]:
    """The value as a list or tuple; ``name`` is its place in the row."""
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
    found = json_of(value, name) if isinstance(value, str) else value
    if not isinstance(found, dict):
        written = " written as text" * isinstance(value, str)
        raise BadRow("wrong type", f"{name} is {type_name(found)}{written}, not an object")
    if verbatim and isinstance(value, str):
        return value
    try:
        return json.dumps(found, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} cannot be written as JSON ({error})") from None


def json_of(text: str, name: str) -> object:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} is text that is not JSON ({error})") from None
    return found


TRANSCRIPT_STARTS = ("\n\nHuman:", "\n\nAssistant:")
LISTS = ("messages", "replies", "texts", "list")  # results of look() for a list

# Scores of a pair, and their other column names: chosen_rating, rating_chosen, chosen-rating and the like.
# Ranks, counts and rewards are not read as scores.
SCORES = ("score_chosen", "score_rejected")
SCORE_COLUMNS = [
    (form.format("chosen", what).replace("_", sign), form.format("rejected", what).replace("_", sign))
    for sign in "_-"
    for what in (f"{mean}{w}" for w in ("score", "rating") for mean in ("", "avg_", "average_", "mean_", "overall_"))
    for form in ("{0}_{1}", "{1}_{0}")
]


def look(value: object) -> str:
    """The kind of a value, finer than its type, so that layouts with the same columns can be told apart.

    ``replies`` are messages that begin with the assistant, ``transcript`` is text as in Anthropic's HH, ``scores`` is
    an object with the scores of chosen and rejected.
    """
    if isinstance(value, str):
        return "transcript" if value.startswith(TRANSCRIPT_STARTS) else "text"
    if isinstance(value, (list, tuple)):
        first = value[0] if value else None
        if isinstance(first, dict):
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
    **dict.fromkeys(("tie", "equal", "draw", "tie (bothbad)", "tie (both bad)", "tie_bothbad"), "tie"),
    **dict.fromkeys(("both_bad", "bothbad", "both bad"), "tie"),
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
