"""Rows of one file, whatever its layout: told from its contents, and only where they leave it open from its name."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path

from prefopt.data.files import columnar, csv_rows, json_rows
from prefopt.data.files.content import (
    ARROW_FILE,
    ARROW_STREAM,
    DAMAGED,
    PARQUET,
    Content,
    damaged,
    layout_name,
    lines_of,
    look,
)
from prefopt.errors import DataError

JSON_NAMES = (".json", ".jsonl", ".ndjson")
CSV_NAMES = (".csv", ".tsv", ".tab")
TABLE_NAMES = (".parquet", ".arrow", ".feather")


def read_rows(path: str | os.PathLike[str], *, keep_going: bool = False, header: bool = True) -> Iterator[object]:
    """Yield the rows of a file of JSON, comma- or tab-separated values, parquet or arrow, in order, as Python values.

    JSON and separated values may be compressed (gzip, bzip2, xz, zstd). The file is never held whole.

    Raises :class:`DataError` where the file is missing, a folder, unreadable, empty, damaged, not UTF-8 or of no known
    kind, and where a row cannot be read (with its row and line). With ``keep_going``, a row that cannot be read is
    given as the :class:`DataError` to raise for it, in its place, and the rows after it follow, wherever it is certain
    where they begin: in JSON lines, in a list where a row is JSON but unusable, and where a record has a wrong number
    of cells. ``header``: the first line of separated values names the columns; else they are called 1, 2, ...
    """
    content = look(Path(path))
    number = 0
    try:
        for row in _reader(content, keep_going, header):
            number += 1
            yield row
    except DAMAGED as error:
        raise damaged(error, str(path), number) from None


def raw_lines(path: Path) -> Iterator[bytes] | None:
    """The bytes of each row of a file of JSON lines, line end included, decompressed; None for any other file.

    There are as many as :func:`read_rows` gives rows with ``keep_going``, in the same order.
    """
    content = look(path)
    binary = content.head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM))
    return None if binary or content.first == b"[" or not _is_json(content) else _lines(content)


def _lines(content: Content) -> Iterator[bytes]:
    with content.opened() as handle:
        for number, (raw, _) in enumerate(lines_of(handle), 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if line.strip(b" \t\r\n"):
                yield line


def is_data_name(path: Path) -> bool:
    """Whether a name says that the file holds rows."""
    return layout_name(path) in JSON_NAMES + CSV_NAMES + TABLE_NAMES


# How JSON rows begin. A column of a .csv may have a name with a bracket.
_JSON = re.compile(rb"""\s*(\[\s*[\[{"\]]|\{\s*["}])""")


def _is_json(content: Content) -> bool:
    if layout_name(content.path) in JSON_NAMES:
        return True
    if layout_name(content.path) in CSV_NAMES:
        return bool(_JSON.match(content.head.removeprefix(codecs.BOM_UTF8)))
    return content.first in (b"[", b"{")


def _reader(content: Content, keep_going: bool, header: bool) -> Iterator[object]:
    if content.head.startswith(PARQUET):
        yield from columnar.read_parquet(content)
    elif content.head.startswith((ARROW_FILE, ARROW_STREAM)):
        yield from columnar.read_arrow(content)
    elif _is_json(content):
        with content.opened() as handle:
            if content.first == b"[":
                yield from json_rows.read_list(handle, str(content.path), keep_going)
            else:
                yield from json_rows.read_lines(handle, str(content.path), keep_going, content.opened)
    elif layout_name(content.path) in CSV_NAMES:
        yield from csv_rows.read_csv(content, keep_going=keep_going, header=header)
    elif layout_name(content.path) in TABLE_NAMES:
        what = f"is no {layout_name(content.path)[1:]} file, whatever its name says; download or copy it again"
        raise DataError(what, file=str(content.path))
    else:
        what = "is of no known kind; name it by what it holds: .jsonl, .json, .csv, .tsv, .parquet or .arrow"
        raise DataError(what, file=str(content.path))
