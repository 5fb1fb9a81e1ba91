"""What a run leaves behind, read with its kinds checked: ``run.json``, and the lines of ``metrics.jsonl``.

Everybody who reads a run reads it here, so that no other place has to ask what a value is. What this version does not
know is let through; what it knows and finds of another kind is told in one line, with its place.

>>> checked({"status": "finished", "steps": 3})
{'status': 'finished', 'steps': 3}
>>> checked({"steps": "many"})
Traceback (most recent call last):
ValueError: steps is 'many'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.disk.read import parsed, printable, read_json
from prefopt.errors import RunError

RECORD, METRICS = "run.json", "metrics.jsonl"
LARGEST_COUNT = 2**53
"""Of steps, rows, tokens, bytes: beyond it a float does not tell neighbours apart."""
LARGEST = 1e100
"""Of any number: nothing that is measured comes near it, and squares of it are still numbers."""

Line = dict[str, Any]
"""``step`` (1 or more) and metrics by name, each a finite number, or none where it was not finite."""
Is = Callable[[Any], bool]


def read_record(folder: Path, remedy: str = "leave this run out") -> dict[str, Any]:
    """The ``run.json`` of an output folder.

    Raises :class:`RunError` where there is none, where it cannot be read, and where a value is of another kind than
    runs write: with ``remedy``, what to do then.
    """
    if not (folder / RECORD).exists():
        raise RunError(f"{folder}: no run of prefopt (no {RECORD} in it); name its output folder")
    return read_json(folder / RECORD, checked, remedy)


def read_metrics(folder: Path) -> list[Line]:
    """The lines of ``metrics.jsonl``, none where there is no such file. A last line that a kill cut off is left out.

    Raises :class:`RunError` for any other line that holds no metrics.
    """
    return [line for _, line in numbered_lines(folder / METRICS)]


def numbered_lines(path: Path) -> Iterator[tuple[bytes, Line]]:
    """Each line as it stands in the file, and what it says. Raises as :func:`read_metrics`."""
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); restore it, or leave this run out") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            values = parsed(text)
        except ValueError as error:
            if number == len(lines):  # cut off by a kill
                return
            raise _no_metrics(path, number, str(error)) from None
        try:
            line = _line(values)
        except ValueError as error:
            raise _no_metrics(path, number, str(error)) from None
        yield text, line


def checked(record: Any) -> dict[str, Any]:
    """``record`` with half surrogates out of its texts. Raises ``ValueError`` for a value of another kind."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    for name, value in record.items():
        if name in KINDS and value is not None and not KINDS[name](value):
            raise ValueError(f"{name} is {_short(value)}")
    found: dict[str, Any] = printable(record)
    # A null is what is not there.
    return {name: value for name, value in found.items() if value is not None}


def _line(values: Any) -> Line:
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    if not (_is_count(values.get("step")) and values["step"] >= 1):
        raise ValueError(f"step is {_short(values.get('step'))}")
    line: Line = {}
    for name, value in values.items():
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            line[name] = None
        elif not _is_number(value) or not _in_bounds(name, value):
            raise ValueError(f"{_short(name)} is {_short(value)}")
        else:
            line[name] = value
    return line


def _in_bounds(name: str, value: float) -> bool:
    """Time does not run backwards."""
    return value >= 0 or not name.startswith(("epoch", "step_seconds", "tokens"))


def _no_metrics(path: Path, number: int, why: str) -> RunError:
    return RunError(f"{path}, line {number} holds no metrics ({why}); remove it, or leave this run out")


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST_COUNT else "a number without end"
    return text if len(text) <= 40 else f"{text[:39]}…"


# -- kinds of values -------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_plain(value: Any) -> bool:
    """The value of an option."""
    not_finite = isinstance(value, float) and not math.isfinite(value)
    return value is None or isinstance(value, str | bool) or not_finite or _is_number(value)


def _is_option(value: Any) -> bool:
    return _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value)))


def _mapping(of: Is) -> Is:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


KINDS: Mapping[str, Is] = {
    **dict.fromkeys(("status", "started", "finished", "method", "algorithm", "loss"), _is_text),
    **dict.fromkeys(("data", "model", "reference", "reward", "ptx_data"), _is_text),
    **dict.fromkeys(("steps", "max_length", "token_budget", "scoring_budget", "sampled_at_once"), _is_count),
    "options": _mapping(_is_option),
    "results": _mapping(_is_option),
    # Earlier runs of PPO wrote here how many responses they drew at once.
    "rows": lambda value: _is_count(value) or _mapping(_is_count)(value),
    "costs": _mapping(_is_amount),
    "memory": _mapping(_is_amount),
    "tracking": _mapping(_is_text),
    "environment": _mapping(_mapping(_is_text)),
}
"""What the keys of ``run.json`` hold."""
