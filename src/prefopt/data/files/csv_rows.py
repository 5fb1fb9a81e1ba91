"""Rows of comma- or tab-separated values, one at a time, each a dict of texts by column name.

A cell is text and stays text: ``123`` is ``"123"``, an empty cell ``""``. One thing is undone, because conversations
survive in such a file no other way: a column whose cells, all that are not empty, are lists of values or messages
written as JSON (or as Python prints them, which is what pandas writes) is decoded. One cell that is neither, and the
column is text, so that an answer which happens to be JSON stays the text it is. In a decoded column, a cell that begins
like a list of messages and is damaged (spreadsheets cut cells off) makes its row unreadable.
"""

from __future__ import annotations

import ast
import codecs
import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader

from prefopt.data.files.content import DAMAGED, ROW_BYTES, Content, layout_name, lines_of, not_utf8, too_long
from prefopt.data.files.json_rows import decode
from prefopt.errors import DataError

# How a list of messages begins: a cell that begins so and cannot be decoded is a broken one, not text.
BROKEN = re.compile(r"""\s*\[\s*\{\s*["']""")
# A header with a name longer than this is a row.
NAME_LIMIT = 200


def read_csv(content: Content, *, keep_going: bool = False, header: bool = True) -> Iterator[object]:
    """Rows of a file whose first line names the columns, or with ``header=False`` is a row; then columns are called 1,
    2, ... ``keep_going`` as :func:`prefopt.data.files.sources.read_rows`."""
    file = str(content.path)
    structured = _structured_columns(content, header)
    number = 0
    with content.opened() as handle:
        table = _Table(handle, content, header)
        for number, cells in enumerate(table, 1):
            try:
                row = _row(table, cells, structured)
            except ValueError as error:
                unusable = DataError(str(error), file=file, row=number)
                if not keep_going:
                    raise unusable from None
                yield unusable
            else:
                yield row
    if not number:
        what = "names its columns and holds no rows; if its line is a row, say --header none"
        raise DataError(what, file=file)


def _row(table: _Table, cells: list[str], structured: list[str]) -> dict[str, object]:
    """One record by column name. Raises ``ValueError`` for one that does not fit."""
    if len(cells) != len(table.header):
        few, columns = "few" if len(cells) < len(table.header) else "many", len(table.header)
        what = f"too {few} cells at line {table.start}: {len(cells)}, where the first line names {columns} columns"
        raise ValueError(f"{what}; put quotes around text that holds {table.delimiter!r}, a quote or a line end")
    row: dict[str, object] = dict(zip(table.header, cells, strict=True))
    for name in structured:
        cell = str(row[name])
        if cell.strip():
            try:
                row[name] = _structure(cell)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the cell of column {name!r} at line {table.start} is no JSON ({error})") from None
    return row


class _Table:
    """The records of a file as lists of cells: ``header`` names them, ``start`` is the line that the last began in."""

    def __init__(self, handle: BufferedReader, content: Content, header: bool) -> None:
        self.file = str(content.path)
        self.delimiter = _delimiter(content)
        csv.field_size_limit(ROW_BYTES)
        self._held = 0  # bytes of the record that is being read
        self._reader = csv.reader(self._lines(handle), delimiter=self.delimiter, strict=True)
        self.start = 1
        self._first: list[str] | None = None
        first = next(self, [])
        if header:
            self.header = self._names(first)
        else:
            self.header = [str(at) for at in range(1, len(first) + 1)]
            self._first = first or None

    def __iter__(self) -> _Table:
        return self

    def __next__(self) -> list[str]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while True:
            self.start, self._held = self._reader.line_num + 1, 0
            try:
                if cells := next(self._reader):
                    return cells
            except csv.Error as error:
                raise DataError(self._explain(str(error)), file=self.file) from None

    def _explain(self, said: str) -> str:
        if "unexpected end of data" in said:
            return f"a quote that opens in the row at line {self.start} is never closed; the file may be cut off"
        if "field larger" in said:
            return self._endless()
        return f"not CSV at line {self._reader.line_num} ({said}); inside quotes, a quote is written twice"

    def _endless(self) -> str:
        return f"{too_long(f' at line {self.start}')}; is a quote never closed?"

    def _lines(self, handle: BufferedReader) -> Iterator[str]:
        number = 0
        for at, (raw, _) in enumerate(lines_of(handle)):
            self._held += len(raw)
            if self._held > ROW_BYTES:
                raise DataError(self._endless(), file=self.file)
            for line in (raw.removeprefix(codecs.BOM_UTF8) if at == 0 else raw).splitlines(keepends=True):
                number += 1
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(not_utf8(error, f"at line {number}"), file=self.file) from None

    def _names(self, cells: list[str]) -> list[str]:
        names = [cell.strip() or f"column {at}" for at, cell in enumerate(cells, 1)]
        if long := next((name for name in names if len(name) > NAME_LIMIT or "\n" in name), None):
            what = f"the first line should name the columns, and {long[:30]!r}... is no name; add a line with names"
            raise DataError(what, file=self.file)
        counts = Counter(names)
        if twice := next((name for name in names if counts[name] > 1), None):
            raise DataError(f"two columns are named {twice!r}; rename one of them", file=self.file)
        return names


def _delimiter(content: Content) -> str:
    """Tab where the name says so; else a comma, or what the first line has in its place (spreadsheets differ)."""
    if layout_name(content.path) in (".tsv", ".tab"):
        return "\t"
    first = content.head.splitlines()[0] if content.head else b""
    return next((sign for sign in ",\t;" if sign.encode() in first), ",")


def _structured_columns(content: Content, header: bool) -> list[str]:
    """Names of the columns to decode. It reads as far as a cell in every column tells: most often, one row."""
    decoded: dict[int, bool] = {}
    with content.opened() as handle:
        try:
            table = _Table(handle, content, header)
            decoded = dict.fromkeys(range(len(table.header)), False)  # columns still in question: was any cell decoded?
            for cells in table:
                for at in [at for at in decoded if at < len(cells) and cells[at].strip()]:
                    try:
                        decoded[at] = _structure(cells[at]) is not None or decoded[at]
                    except (ValueError, RecursionError):
                        if not BROKEN.match(cells[at]):
                            del decoded[at]
                if not decoded:
                    break
        except (DataError, *DAMAGED):
            pass  # whoever reads the rows will meet it again
    return [table.header[at] for at, seen in decoded.items() if seen]


def _structure(cell: str) -> object:
    """The list or message that a cell spells out. Raises ``ValueError`` or ``RecursionError`` where it is text."""
    if cell.lstrip()[:1] not in ("[", "{"):
        raise ValueError("it is text")
    try:
        value = decode(cell.strip(" \t\r\n"))
    except json.JSONDecodeError as error:
        value = _printed(cell, error)
    if isinstance(value, list) or (isinstance(value, dict) and ("role" in value or "from" in value)):
        return value
    raise ValueError("it is neither a list nor a message")


def _printed(cell: str, error: ValueError) -> object:
    """A value as Python prints it: literals only, nothing is run. Raises ``error`` where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown escapes, in text that is no literal anyway
        try:
            return decode(json.dumps(ast.literal_eval(cell.strip())))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise error from None
