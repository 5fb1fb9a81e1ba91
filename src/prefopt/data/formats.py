"""Known layouts of preference data, recognised from all rows of a file, never from the first alone.

=========================  ===============================================================================
layout                     a row
=========================  ===============================================================================
``sharegpt ranking``       ``{"conversations": [{"from": "human", "value": ...}, ...], "chosen": {"from": "gpt",
                           "value": ...}, "rejected": {...}}`` and, if wanted, ``"system"`` (LLaMA-Factory)
``conversational``         ``{"prompt": [{"role": "user", "content": ...}, ...], "chosen": [{"role": "assistant",
                           ...}], "rejected": [...]}``; a side may also be a string (TRL, explicit prompt)
``text``                   ``{"prompt": "...", "chosen": "...", "rejected": "..."}``: prompt and response are
                           joined as they stand, without a chat template (TRL, explicit prompt)
=========================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.data.read import read_json
from prefopt.data.validate import Problem
from prefopt.errors import DataError
from prefopt.records import ROLES, Comparison, Message, Response

SHAREGPT, CONVERSATIONAL, TEXT = "sharegpt ranking", "conversational", "text"
FIELDS = {
    SHAREGPT: ("conversations", "chosen", "rejected"),
    CONVERSATIONAL: ("prompt", "chosen", "rejected"),
    TEXT: ("prompt", "chosen", "rejected"),
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"} | {role: role for role in ROLES}
TRL_ROLES = {role: role for role in ROLES}
# What changes the text that a model sees, so that leaving it out would train on something else.
NOT_READ = ("tools", "images", "videos", "audios", "image", "audio")
NOT_READ_IN_MESSAGE = ("tool_calls", "reasoning_content", "thinking")


class _BadRow(Exception):
    def __init__(self, kind: str, what: str) -> None:
        self.kind, self.what = kind, what


@dataclass(frozen=True, slots=True)
class Rows:
    """One file: its rows as comparisons, and the problems of those that are none. ``read`` counts all rows.

    ``len(comparisons) + refused_rows(problems) == read``. ``notes`` says what was passed over, such as columns that
    nothing reads.
    """

    file: str
    layout: str
    comparisons: list[Comparison]
    problems: list[Problem]
    read: int
    notes: list[str] = field(default_factory=list)


def read_comparisons(path: str | Path) -> Rows:
    """Read one JSON or JSON-lines file of comparisons in any known layout.

    Raises :class:`DataError` for a file that cannot be read at all (see :func:`read_json`), and as
    :func:`parse_comparisons` does.
    """
    return parse_comparisons(read_json(path), str(path))


def parse_comparisons(rows: Iterable[object], file: str) -> Rows:
    """Comparisons from rows as JSON gives them; ``file`` names their origin in messages.

    Raises :class:`DataError` where no row has a known layout or layouts are mixed. A single bad row (a missing field,
    an unknown role) is a :class:`Problem` instead.
    """
    comparisons: list[Comparison] = []
    problems: list[Problem] = []
    unknown: list[tuple[int, object]] = []
    first: dict[str, int] = {}
    columns: dict[str, None] = {}
    number = 0
    for number, row in enumerate(rows, 1):
        layout = _layout(row)
        if layout is None or not isinstance(row, dict):
            unknown.append((number, row))
            continue
        first.setdefault(layout, number)
        try:
            comparison = _sharegpt(row, number, file) if layout == SHAREGPT else _trl(row, number, file)
        except _BadRow as bad:
            problems.append(Problem(bad.kind, number, bad.what, file))
            continue
        comparisons.append(comparison)
        columns.update(dict.fromkeys(comparison.extra))
    if not number:
        raise DataError("holds no rows", file=file)
    if not first:
        raise _unknown_layout(unknown, file)
    if len(first) > 1:
        (one, at), (other, row_number) = sorted(first.items(), key=lambda item: item[1])[:2]
        what = f"mixes layouts: row {at} is {one}, row {row_number} is {other}; give each layout a file of its own"
        raise DataError(what, file=file)
    layout = next(iter(first))
    problems += [_misfit(row, n, layout, file) for n, row in unknown]
    problems.sort(key=lambda p: p.row)
    notes = [f"{file}: columns not read: {', '.join(columns)}"] if columns else []
    return Rows(file, layout, comparisons, problems, number, notes)


def _layout(row: object) -> str | None:
    """The layout whose fields are all there (null counts as absent), or None."""
    if not isinstance(row, dict):
        return None
    present = {key for key, value in row.items() if value is not None}
    if present.issuperset(FIELDS[SHAREGPT]):
        return SHAREGPT
    if present.issuperset(FIELDS[TEXT]):
        return TEXT if isinstance(row["prompt"], str) else CONVERSATIONAL
    return None


def _misfit(row: object, number: int, layout: str, file: str) -> Problem:
    if not isinstance(row, dict):
        return Problem("not an object", number, f"is {_kind(row)}, not an object with named fields", file)
    missing = [name for name in FIELDS[layout] if row.get(name) is None]
    return Problem("missing field", number, f"lacks {', '.join(missing)}", file)


def _unknown_layout(rows: Sequence[tuple[int, object]], file: str) -> DataError:
    number, row = rows[0]
    known = "conversations, chosen, rejected (sharegpt ranking) or prompt, chosen, rejected"
    if not isinstance(row, dict):
        return DataError(f"unknown layout: the row is {_kind(row)}, not an object with {known}", file=file, row=number)
    names = ", ".join(str(key) for key in row) or "no fields"
    if "chosen" in row and "rejected" in row:
        hint = "there is no prompt; add a field prompt, and leave it out of chosen and rejected"
    else:
        hint = f"rows should have {known}"
    return DataError(f"unknown layout: no row has all fields of one, row {number} has {names}; {hint}", file=file)


def _sharegpt(row: dict[str, object], number: int, file: str) -> Comparison:
    prompt = _messages(row["conversations"], "conversations", ("from", "value"), SHAREGPT_ROLES)
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise _BadRow("wrong type", f"system is {_kind(system)}, not text")
    if system:
        if prompt and prompt[0].role == "system":
            raise _BadRow("two system turns", "has a field system and a system turn in conversations")
        prompt = (Message("system", system), *prompt)
    sides = []
    for name in ("chosen", "rejected"):
        value = row[name]
        turns = value if isinstance(value, list) else [value]
        sides.append(Response(_messages(turns, name, ("from", "value"), SHAREGPT_ROLES)))
    return Comparison(prompt, tuple(sides), ((0,), (1,)), number, file, False, _extra(row, SHAREGPT, "system"))


def _trl(row: dict[str, object], number: int, file: str) -> Comparison:
    given, text = row["prompt"], isinstance(row["prompt"], str)
    if isinstance(given, str):
        prompt: tuple[Message, ...] = (Message("user", given),)
    else:
        prompt = _messages(given, "prompt", ("role", "content"), TRL_ROLES)
    sides = []
    for name in ("chosen", "rejected"):
        value = row[name]
        if isinstance(value, str):
            sides.append(Response((Message("assistant", value),)))
        elif text:
            raise _BadRow("wrong type", f"prompt is text, so {name} should be text too, not {_kind(value)}")
        else:
            sides.append(Response(_messages(value, name, ("role", "content"), TRL_ROLES)))
    return Comparison(prompt, tuple(sides), ((0,), (1,)), number, file, text, _extra(row, TEXT))


def _extra(row: dict[str, object], layout: str, *also: str) -> dict[str, object]:
    for name in NOT_READ:
        if row.get(name):
            raise _BadRow("field that cannot be used", f"has {name}, which prefopt cannot give to a model")
    return {k: v for k, v in row.items() if k not in FIELDS[layout] and k not in also and k not in NOT_READ}


def _messages(value: object, name: str, keys: tuple[str, str], roles: dict[str, str]) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _BadRow("wrong type", f"{name} is {_kind(value)}, not a list of messages")
    return tuple(_message(item, name, keys, roles) for item in value)


def _message(item: object, name: str, keys: tuple[str, str], roles: dict[str, str]) -> Message:
    if not isinstance(item, dict):
        raise _BadRow("wrong type", f"{name} holds {_kind(item)}, not a message with {keys[0]} and {keys[1]}")
    for key in keys:
        if item.get(key) is None:
            raise _BadRow("missing field", f"a message of {name} lacks {key}")
        if not isinstance(item[key], str):
            raise _BadRow("wrong type", f"{key} of a message of {name} is {_kind(item[key])}, not text")
    for key in NOT_READ_IN_MESSAGE:
        if item.get(key):
            raise _BadRow("field that cannot be used", f"a message of {name} has {key}, which is not read")
    role, content = item[keys[0]], item[keys[1]]
    if role not in roles:
        raise _BadRow("unknown role", f"{name} has the role {role!r}; known are {', '.join(roles)}")
    return Message(roles[role], content)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
