"""Rows of a JSON file, one at a time, with the place of whatever is wrong.

Both layouts of a JSON data file are read, whatever its name ends in: a list of rows, or one row per line.
The file is never held whole: a list is decoded row by row from a window of text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prefopt.errors import DataError

WINDOW = 1 << 20
# Decoding stops this near the end of the window only for want of more text ("tru", "\\ud83d\\ude0", "-Infin").
TAIL = 16

_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


def read_json(path: str | Path) -> Iterator[object]:
    """Yield the rows of a JSON list or of JSON lines, in order, as Python values.

    Raises :class:`DataError` where the file is missing, a folder, unreadable, empty, compressed, not UTF-8, or not
    JSON (with the line, and for a list the column).
    """
    file = str(path)
    try:
        handle = Path(path).open("rb")  # noqa: SIM115  (closed by the with below; only the opening is guarded here)
    except FileNotFoundError:
        raise DataError("no such file; check the path", file=file) from None
    except IsADirectoryError:
        raise DataError("is a folder; name the file inside it", file=file) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened: {error}", file=file) from None
    with handle:
        first = _first_byte(handle, file)
        yield from _read_list(handle, file) if first == b"[" else _read_lines(handle, file)


def _first_byte(handle: IO[bytes], file: str) -> bytes:
    """The first byte that is not white space; the file is wound back to its start, or past its byte-order mark."""
    start = handle.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"is compressed ({name}); unpack it first", file=file)
    if start.startswith(b"PAR1"):
        raise DataError("is a parquet file; convert it to JSON lines first", file=file)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError("is not UTF-8 but UTF-16 text; save it as UTF-8", file=file)
    mark = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    handle.seek(mark)
    while (byte := handle.read(1)).isspace():
        pass
    if not byte:
        raise DataError("is empty; it should hold rows of preference data", file=file)
    handle.seek(mark)
    return byte


def _read_lines(handle: IO[bytes], file: str) -> Iterator[object]:
    for number, raw in enumerate(handle, 1):
        try:
            line = raw.decode("utf-8").strip(" \t\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 at line {number}, byte {error.start + 1}; save it as UTF-8", file=file
            ) from None
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            what = f"not JSON at line {number} ({error.msg}, column {error.colno})"
            raise DataError(f"{what}; each line should hold one row, or the file a list of rows", file=file) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"not readable JSON at line {number} ({error})", file=file) from None


class _Window:
    """A part of the text: ``text[at:]`` is not yet used; what is used is dropped, its lines counted."""

    def __init__(self, handle: IO[bytes], file: str) -> None:
        self.handle, self.file = handle, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 0

    def more(self) -> bool:
        """Drop what is used and read on, at least as much again as is held; false at the end of the file."""
        if self.ended:
            return False
        self.line, self.column = self.place(self.at)
        held = self.text[self.at :]
        raw = self.handle.read(max(WINDOW, len(held)))
        self.ended = not raw
        try:
            self.text, self.at = held + self.decoder.decode(raw, final=self.ended), 0
        except UnicodeDecodeError:
            line = self.line + held.count("\n")
            raise DataError(f"not UTF-8 after line {line}; save it as UTF-8", file=self.file) from None
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

    def fail(self, what: str, at: int | None = None) -> DataError:
        line, column = self.place(self.at if at is None else at)
        return DataError(f"not JSON at line {line}, column {column + 1} ({what})", file=self.file)

    def value(self) -> object:
        """Decode one value and step over it."""
        decode = json.JSONDecoder().raw_decode
        while True:
            try:
                value, self.at = decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                unterminated = error.msg.startswith("Unterminated string")
                if not self.ended and (unterminated or error.pos >= len(self.text) - TAIL):
                    self.more()
                elif unterminated or error.pos >= len(self.text.rstrip()):
                    raise self.fail("the file ends within a row; it may be cut off") from None
                else:
                    raise self.fail(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.fail(str(error)) from None


def _read_list(handle: IO[bytes], file: str) -> Iterator[object]:
    window = _Window(handle, file)
    window.peek()
    window.at += 1
    if window.peek() == "]":
        raise DataError("is an empty list; it should hold rows of preference data", file=file)
    while True:
        window.peek()
        yield window.value()
        mark = window.peek()
        if mark not in (",", "]"):
            raise window.fail("a comma or the end of the list should follow a row" if mark else "the list never ends")
        window.at += 1
        if mark == "]":
            break
    if window.peek():
        raise window.fail("text after the end of the list")
