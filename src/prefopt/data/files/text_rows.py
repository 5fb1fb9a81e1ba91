"""Rows of JSON and of comma- or tab-separated values, one at a time; an error names the place.

JSON is a list of rows, decoded from a window of the text, or one row per line. A duplicate key in an object is refused:
one of its values would be lost. ``NaN``, which many tools write for a missing value, is null; ``Infinity`` is a number.

Cells of separated values are text: ``123`` is ``"123"``, an empty cell ``""``. A column is decoded only if every cell
that is not empty is a list or a message, in JSON or as Python (and so pandas) prints it; an answer that is JSON stays
text if one cell is neither. In a decoded column, a cell that begins like a list of messages and is damaged makes its
row unreadable: spreadsheets truncate cells.
"""

from __future__ import annotations

import ast
import codecs
import csv
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BufferedReader
from itertools import islice
from typing import Any

from prefopt.data.files.content import DAMAGED, ROW_BYTES, Content, data_suffix, lines_of, not_utf8, read_some, too_long
from prefopt.errors import DataError

WINDOW = 1 << 20
# A decoding error this near the end of the window may be due to missing text ("tru", "\\ud83d\\ude0", "-Infin").
TAIL = 16
DEPTH = 100  # deeper than any row of data, and far below the limit of Python's recursion
TOO_DEEP = f"nested more than {DEPTH} deep"
# How a list of messages begins: a cell that begins so and cannot be decoded is damaged, not text.
BROKEN = re.compile(r"""\s*\[\s*\{\s*["']""")
LINE_HINT = "each line should hold one row, or the file a list of rows; comma-separated values go by the name .csv"
SEARCHED = 100_000  # lines that are searched for the end of an object that is no row
NAME_LIMIT = 200  # a longer column name shows that the first line is a row


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = _twice([key for key, _ in pairs])
        raise _DuplicateKey(f"the key {twice[:60]!r} occurs twice in one object; keep one of them")
    return found


def _twice(names: Sequence[str]) -> str:
    """The first name that occurs more than once; empty where there is none."""
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), "")


# Once its escapes are removed, a string of JSON is all text between two quotes.
_ESCAPE, _STRING, _BRACKET = re.compile(r"\\."), re.compile(r'"[^"]*"'), re.compile(r"[\[\]{}]")
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_CONSTANTS.__getitem__)
_LENIENT = json.JSONDecoder()  # finds the end of a row with a duplicate key


def decode(text: str) -> object:
    """One JSON value. Raises ``ValueError``, and ``RecursionError`` for deep nesting."""
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
    """Raise ``RecursionError`` for deeply nested JSON. The number of brackets, which is fast, clears most rows."""
    if text.count("[", start, end) + text.count("{", start, end) <= DEPTH:
        return
    depth = 0
    for step in _nesting(text[start:end]):
        depth += step
        if depth > DEPTH:
            raise RecursionError(TOO_DEEP)


def _nesting(text: str) -> Iterator[int]:
    """1 for each bracket that opens, -1 for each that closes."""
    return (1 if sign in "[{" else -1 for sign in _BRACKET.findall(_STRING.sub("", _ESCAPE.sub("", text))))


def read_json_lines(handle: BufferedReader, file: str) -> Iterator[object]:
    """Rows of JSON lines without blank lines; in place of a row that cannot be read, the error."""
    row, lines = 0, lines_of(handle)
    for number, (raw, whole) in enumerate(lines, 1):
        problem = None
        value: object = None
        try:
            if not whole:
                raise ValueError(too_long())
            line = raw.decode("utf-8").strip(" \t\r\n")
            if not line:
                continue
            value = decode(line)
        except UnicodeDecodeError as error:
            problem = not_utf8(error, f"at line {number}")
        except json.JSONDecodeError as error:
            ends = "the row does not end in its line: " if error.pos >= len(line) and line[0] in "[{" else ""
            problem = f"not JSON at line {number} ({error.msg}, column {error.colno}); {ends}{LINE_HINT}"
            if row == 0 and line[0] == "{" and line[-1] in "{[":
                rest = [sum(_nesting(more.decode("utf-8", "replace"))) for more, _ in islice(lines, SEARCHED)]
                if next(lines, None) is None and sum(_nesting(line)) + sum(rest) > 0:
                    what = f"the file ends within the object that begins at line {number}; it may be cut off"
                    raise DataError(f"not JSON ({what})", file=file) from None
                what = "is one JSON object over several lines, not a list of rows nor a row in each line"
                remedy = "save its list of rows alone, or put the object into a list"
                raise DataError(f"{what}; {remedy}", file=file) from None
        except (ValueError, RecursionError) as error:
            problem = f"not readable at line {number}: {error}"
        row += 1
        yield value if problem is None else DataError(problem, file=file, row=row)


class _Window:
    """A part of the text: ``text[at:]`` is not used yet. Used text is dropped, and its lines are counted."""

    def __init__(self, handle: BufferedReader, file: str) -> None:
        self.handle, self.file = handle, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 0
        self.row: int | None = None
        self.failure: Exception | None = None  # raised once the text before it is used

    def more(self) -> bool:
        """Drop used text and read on, at least as much as is held; false at the end of the file."""
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
        """Decode one value and step over it. For JSON that cannot be used, return the error to raise."""
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
            except (ValueError, RecursionError) as error:
                what = TOO_DEEP if isinstance(error, RecursionError) else str(error)
                raise self.fail(what, why="not readable") from None


def read_json_list(handle: BufferedReader, file: str) -> Iterator[object]:
    """Rows of a JSON list; in place of a row that is JSON and unusable, the error."""
    window = _Window(handle, file)
    window.peek()
    window.at += 1
    if window.peek() == "]":
        raise DataError("is an empty list; it should hold rows of data", file=file)
    window.row = 0
    mark = ","
    while mark == ",":
        window.row += 1
        window.peek()
        yield window.value()
        mark = window.peek()
        if mark not in (",", "]"):
            raise window.fail("a comma or the end of the list should follow a row" if mark else "the list never ends")
        window.at += 1
    window.row = None
    if window.peek():
        raise window.fail("text after the end of the list")


def read_csv(content: Content, *, header: bool = True) -> Iterator[object]:
    """Rows of separated values by column name; in place of a row with a wrong number of cells, the error."""
    file = str(content.path)
    structured = _structured_columns(content, header)
    number = 0
    with content.opened() as handle:
        records = _records(handle, content, header)
        _, names = next(records, (1, []))
        for number, (line, cells) in enumerate(records, 1):
            row: dict[str, object] = dict(zip(names, cells, strict=False))
            problem = ""
            if len(cells) != len(names):
                few, count = "few" if len(cells) < len(names) else "many", len(names)
                what = f"too {few} cells at line {line}: {len(cells)}, where the first line names {count} columns"
                problem = f"{what}; put quotes around text that holds {_delimiter(content)!r}, a quote or a line end"
            for name in () if problem else structured:
                cell = str(row[name])
                try:
                    row[name] = _structure(cell) if cell.strip() else cell
                except (ValueError, RecursionError) as error:
                    problem = problem or f"the cell of column {name!r} at line {line} is not JSON ({error})"
            yield DataError(problem, file=file, row=number) if problem else row
    if not number:
        raise DataError("names its columns and holds no rows; if its line is a row, give --header none", file=file)


def _records(handle: BufferedReader, content: Content, header: bool) -> Iterator[tuple[int, list[str]]]:
    """The column names, then the cells of each record, with the line where they begin."""
    file = str(content.path)
    start, held = 1, 0  # line and bytes of the record that is being read

    def endless() -> DataError:
        return DataError(f"{too_long(f' at line {start}')}; is a quote never closed?", file=file)

    def lines() -> Iterator[str]:
        nonlocal held
        number = 0
        for raw, _ in lines_of(handle):
            held += len(raw)
            if held > ROW_BYTES:
                raise endless()
            for line in raw.splitlines(keepends=True):
                number += 1
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(not_utf8(error, f"at line {number}"), file=file) from None

    csv.field_size_limit(ROW_BYTES)
    reader = csv.reader(lines(), delimiter=_delimiter(content), strict=True)
    named = False
    while True:
        start, held = reader.line_num + 1, 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "field larger" in str(error):
                raise endless() from None
            what = f"not CSV at line {reader.line_num} ({error}); inside quotes, a quote is written twice"
            if "unexpected end of data" in str(error):
                what = f"a quote that opens in the row at line {start} is never closed; the file may be cut off"
            raise DataError(what, file=file) from None
        if cells is None:
            return
        if cells and not named:
            yield start, _names(cells, file) if header else [str(at) for at in range(1, len(cells) + 1)]
        if cells and (named or not header):
            yield start, cells
        named = named or bool(cells)


def _names(cells: list[str], file: str) -> list[str]:
    names = [cell.strip() or f"column {at}" for at, cell in enumerate(cells, 1)]
    if long := next((name for name in names if len(name) > NAME_LIMIT or "\n" in name), None):
        what = (
            f"the first line should name the columns, and {long[:30]!r}... is not a column name; add a line with names"
        )
        raise DataError(what, file=file)
    if twice := _twice(names):
        raise DataError(f"two columns are named {twice!r}; rename one of them", file=file)
    return names


def _delimiter(content: Content) -> str:
    """Tab for .tsv; else the first of comma, tab and semicolon in the first line (spreadsheets differ)."""
    if data_suffix(content.path) in (".tsv", ".tab"):
        return "\t"
    first = content.head.splitlines()[0] if content.head else b""
    return next((sign for sign in ",\t;" if sign.encode() in first), ",")


def _structured_columns(content: Content, header: bool) -> list[str]:
    """Names of the columns to decode. Reads until every column is decided, most often one row."""
    decoded: dict[int, str] = {}  # undecided columns, with their name once a cell was decoded
    with suppress(DataError, *DAMAGED), content.opened() as handle:  # errors are raised again when the rows are read
        records = _records(handle, content, header)
        _, names = next(records, (1, []))
        decoded = dict.fromkeys(range(len(names)), "")
        for _, cells in records:
            for at in [at for at in decoded if at < len(cells) and cells[at].strip()]:
                try:
                    _structure(cells[at])
                    decoded[at] = names[at]
                except (ValueError, RecursionError):
                    if not BROKEN.match(cells[at]):
                        del decoded[at]
            if not decoded:
                break
    return [name for name in decoded.values() if name]


def _structure(cell: str) -> object:
    """The list or message in a cell. Raises ``ValueError`` or ``RecursionError`` for text."""
    if cell.lstrip()[:1] not in ("[", "{"):
        raise ValueError("it is text")
    try:
        value = decode(cell.strip(" \t\r\n"))
    except json.JSONDecodeError as error:
        value = _python_literal(cell, error)
    if isinstance(value, list) or (isinstance(value, dict) and ("role" in value or "from" in value)):
        return value
    raise ValueError("it is neither a list nor a message")


def _python_literal(cell: str, error: ValueError) -> object:
    """A value as Python prints it; only literals, no code is run. Raises ``error`` where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown escapes in text
        try:
            return decode(json.dumps(ast.literal_eval(cell.strip())))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise error from None
