"""Rows of JSON text, one at a time, with the place of whatever is wrong.

Both layouts are read: a list of rows, and one row per line. The text is never held whole: a list is decoded row by row
from a window of it.

What JSON leaves open is decided here. A key that stands twice in an object is refused, for one of its values would be
lost. ``NaN``, which many tools write where a value is missing, is read as null. ``Infinity`` is a number.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import BufferedReader
from typing import Any

from prefopt.data.files.content import ROW_BYTES, lines_of, not_utf8, read_some, too_long
from prefopt.errors import DataError

WINDOW = 1 << 20
# Decoding stops this near the end of the window only for want of more text ("tru", "\\ud83d\\ude0", "-Infin").
TAIL = 16
# Deeper than any row of data, and far from the depth at which Python gives up, here or wherever the row goes next.
DEPTH = 100
TOO_DEEP = f"nested more than {DEPTH} deep"


Opener = Callable[[], AbstractContextManager[BufferedReader]]


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    counts = Counter(key for key, _ in pairs)
    twice = next(key for key in found if counts[key] > 1)
    raise _DuplicateKey(f"the key {twice[:60]!r} stands twice in one object; keep one of them")


# Of JSON without its escapes, which stand in strings alone, strings are whatever is between two quotes.
_ESCAPE, _STRING, _BRACKET = re.compile(r"\\."), re.compile(r'"[^"]*"'), re.compile(r"[\[\]{}]")
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_CONSTANTS.__getitem__)
_LENIENT = json.JSONDecoder()  # only to find where a row with a duplicate key ends


def decode(text: str) -> object:
    """One JSON value with nothing around it. Raises ``ValueError``, and ``RecursionError`` for deep nesting."""
    value: object
    try:
        value, end = _DECODER.raw_decode(text)
    except RecursionError:
        raise RecursionError(TOO_DEEP) from None
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    _check_depth(text, 0, len(text))
    return value


def _check_depth(text: str, start: int, end: int) -> None:
    """Refuse a value, known to be JSON, that is nested deeply. Counting brackets, which is fast, clears most rows."""
    if text.count("[", start, end) + text.count("{", start, end) <= DEPTH:
        return
    depth = 0
    for sign in _BRACKET.findall(_STRING.sub("", _ESCAPE.sub("", text[start:end]))):
        depth += 1 if sign in "[{" else -1
        if depth > DEPTH:
            raise RecursionError(TOO_DEEP)


def read_lines(
    handle: BufferedReader, file: str, keep_going: bool = False, again: Opener | None = None
) -> Iterator[object]:
    """Rows of JSON lines; blank lines are none. ``keep_going`` as :func:`prefopt.data.files.sources.read_rows` has it.

    ``again`` opens the file once more, to tell whether one that has no row in its first line is a single object.
    """
    row = 0
    for number, (raw, whole) in enumerate(lines_of(handle), 1):
        problem = None
        value: object = None
        try:
            if not whole:
                raise ValueError(too_long())
            line = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8").strip(" \t\r\n")
            if not line:
                continue
            value = decode(line)
        except UnicodeDecodeError as error:
            problem = not_utf8(error, f"at line {number}")
        except json.JSONDecodeError as error:
            if row == 0 and line[0] == "{" and again is not None:
                with again() as opened:
                    if said := _one_object(opened):
                        raise DataError(said, file=file) from None
            problem = f"not JSON at line {number} ({error.msg}, column {error.colno}); {_line_hint(line, error)}"
        except (ValueError, RecursionError) as error:
            problem = f"not readable at line {number}: {error}"
        row += 1
        if problem is None:
            yield value
        elif keep_going:
            yield DataError(problem, file=file, row=row)
        else:
            raise DataError(problem, file=file, row=row)


# No more of a file is looked at to tell whether it is one object.
WHOLE = 1 << 26


def _one_object(handle: BufferedReader) -> str:
    """What is said of a file that is one JSON object over several lines, or several such; nothing of any other."""
    text = handle.read(WHOLE).removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").strip()
    try:
        value, end = _LENIENT.raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    if "\n" not in text[:end]:
        return ""
    if end < len(text):
        return "holds JSON objects that go over several lines each; put each into a line, or all into a list"
    under = next(
        (key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)), ""
    )
    remedy = f"save the list under {under[:60]!r} alone" if under else "put it into a list: [{...}, {...}]"
    what = "is one JSON object, not a list of rows nor a row in each line (the row does not end in its line)"
    return f"{what}; {remedy}"


def _line_hint(line: str, error: json.JSONDecodeError) -> str:
    if line[0] not in "[{":
        return "each line should hold one row, or the file a list of rows; comma-separated values go by the name .csv"
    if error.pos >= len(line):
        return "the row does not end in its line: each line should hold one row, or the file a list of rows"
    return "each line should hold one row, or the file a list of rows"


class _Window:
    """A part of the text: ``text[at:]`` is not yet used; what is used is dropped, its lines counted."""

    def __init__(self, handle: BufferedReader, file: str) -> None:
        self.handle, self.file = handle, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 0
        self.row: int | None = None
        self.failure: Exception | None = None  # to raise when the text before it is used

    def more(self) -> bool:
        """Drop what is used and read on, at least as much again as is held; false at the end of the file."""
        if self.ended:
            return False
        if len(self.text) - self.at > ROW_BYTES:
            raise self.fail(too_long(), why="not readable")
        if isinstance(self.failure, DataError):
            raise DataError(self.failure.what, file=self.file, row=self.row)
        if self.failure:
            raise self.failure
        self.line, self.column = self.place(self.at)
        held = self.text[self.at :]
        raw, self.failure = read_some(self.handle, max(WINDOW, len(held)))
        self.ended = not raw and not self.failure
        try:
            text = self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            # The text before it is used up first, so that the row is known when this is raised.
            text = bytes(error.object[: error.start]).decode("utf-8-sig")
            self.failure = DataError(not_utf8(error, f"at line {self.line + (held + text).count(chr(10))}"))
            self.ended = False
        self.text, self.at = held + text, 0
        return not self.ended

    def place(self, at: int) -> tuple[int, int]:
        """Line (from 1) and column (from 0) of a position in the window."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, (at - 1 - self.text.rfind("\n", 0, at) if lines else self.column + at)

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def fail(self, what: str, at: int | None = None, why: str = "not JSON") -> DataError:
        line, column = self.place(self.at if at is None else at)
        return DataError(f"{why} at line {line}, column {column + 1} ({what})", file=self.file, row=self.row)

    def value(self) -> object:
        """Decode one value and step over it. A value that is JSON but cannot be used is given as the error to raise."""
        decoder, unusable = _DECODER, None
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end == len(self.text) and isinstance(value, int | float) and self.more():
                    continue  # the window may end within a number
                if unusable is None:
                    try:
                        _check_depth(self.text, self.at, end)
                    except RecursionError as error:
                        unusable = self.fail(str(error), why="not readable")
                self.at = end
                return unusable or value
            except _DuplicateKey as error:
                decoder, unusable = _LENIENT, self.fail(str(error), why="not readable")
            except json.JSONDecodeError as error:
                unterminated = error.msg.startswith("Unterminated string")
                if not self.ended and (unterminated or error.pos >= len(self.text) - TAIL):
                    self.more()
                elif unterminated or error.pos >= len(self.text.rstrip()):
                    raise self.fail("the file ends within a row; it may be cut off") from None
                else:
                    raise self.fail(error.msg, error.pos) from None
            except RecursionError:
                raise self.fail(TOO_DEEP, why="not readable") from None
            except ValueError as error:
                raise self.fail(str(error), why="not readable") from None


def read_list(handle: BufferedReader, file: str, keep_going: bool = False) -> Iterator[object]:
    """Rows of a JSON list. ``keep_going`` as :func:`prefopt.data.files.sources.read_rows` has it."""
    window = _Window(handle, file)
    window.peek()
    window.at += 1
    if window.peek() == "]":
        raise DataError("is an empty list; it should hold rows of data", file=file)
    window.row = 0
    while True:
        window.row += 1
        window.peek()
        value = window.value()
        if isinstance(value, DataError) and not keep_going:
            raise value
        yield value
        mark = window.peek()
        if mark not in (",", "]"):
            raise window.fail("a comma or the end of the list should follow a row" if mark else "the list never ends")
        window.at += 1
        if mark == "]":
            break
    window.row = None
    if window.peek():
        raise window.fail("text after the end of the list")
