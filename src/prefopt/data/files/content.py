"""The kind of a data file, recognised from its first bytes, and its decompressed contents."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import DataError

HEAD = 4096
BUFFER = 1 << 20
ROW_BYTES = 1 << 26  # of one row in any kind of file: a megabyte can decompress to a row that no memory holds
# The decompressed size of a file is bounded by the larger of these: 256 MiB, and a multiple of its size.
UNPACKED, TIMES = 1 << 28, 250
REASON_CHARACTERS = 300  # of another library's message

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_NAMES = (".gz", ".bz2", ".xz", ".zst")
JSON_NAMES = (".json", ".jsonl", ".ndjson")
CSV_NAMES = (".csv", ".tsv", ".tab")
TABLE_NAMES = (".parquet", ".arrow", ".feather")
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"
TABLES = (PARQUET, ARROW_FILE, ARROW_STREAM)
# How JSON rows begin in a file named .csv, whose first column may have a name with a bracket.
_JSON = re.compile(rb"""\s*(\[\s*[\[{"\]]|\{\s*["}])""")

_PICKLE = "is a Python pickle, which can run code and is never loaded; write JSON lines or parquet"
# Beginnings of files that hold no rows, with the remedy.
_REFUSED = {
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"7z\xbc\xaf": "is a 7z archive; unpack it first",
    b"PARE": "is an encrypted parquet file; write it again without encryption",
    b"\xd0\xcf\x11\xe0": "is an Office document (an old or a password-protected workbook?); export it as CSV in UTF-8",
    b"SQLite format 3": "is an SQLite database and no study of prefopt collect; export the rows as JSON lines",
    b"%PDF": "is a PDF document, not rows of data",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
    b"FEA1\0": "is a Feather file of version 1; write it again as version 2, or as parquet",
    b"version https://git-lfs": "is a Git LFS pointer, not the data; fetch the data with: git lfs pull",
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "is not UTF-8 but UTF-32 text; save it as UTF-8"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "is not UTF-8 but UTF-16 text; save it as UTF-8"),
}
# What a damaged stream raises, whichever the compression (zlib.error has no base but Exception).
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True, slots=True)
class Content:
    """The beginning of a decompressed file: ``head`` has up to 4096 bytes, ``first`` is the first that is not white."""

    path: Path
    compression: str | None
    head: bytes
    first: bytes

    @property
    def is_table(self) -> bool:
        """Whether it is parquet or arrow."""
        return self.head.startswith(TABLES)

    @property
    def is_json(self) -> bool:
        """Whether it is JSON, by its name or else by its beginning."""
        suffix = data_suffix(self.path)
        if suffix in CSV_NAMES:
            return bool(_JSON.match(self.head.removeprefix(codecs.BOM_UTF8)))
        return suffix in JSON_NAMES or self.first in (b"[", b"{")

    @contextmanager
    def opened(self) -> Iterator[io.BufferedReader]:
        """The bytes from the start, decompressed as they are read."""
        with ExitStack() as stack:
            yield _decompressed(self.path, self.compression, stack)


def look(path: Path) -> Content:
    """Open a file and recognise its kind. Raises :class:`DataError` for a file that cannot hold rows: missing, a
    folder, a pipe, unreadable, empty, an archive, encrypted, binary, or text in UTF-16 or UTF-32."""
    file = str(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError("is a folder; name the file inside it", file=file)
        if not stat.S_ISREG(mode):
            raise DataError("is a pipe or device, and rows are read more than once; save them to a file", file=file)
        with path.open("rb") as raw:
            magic = raw.read(6)
    except FileNotFoundError:
        raise DataError("no such file; check the path", file=file) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened: {reason(error)}", file=file) from None
    compression = next((name for start, name in COMPRESSED.items() if magic.startswith(start)), None)
    with ExitStack() as stack:
        handle = _decompressed(path, compression, stack)
        head, failure = read_some(handle, HEAD)
        _refuse(file, head, compression)
        text = head.removeprefix(codecs.BOM_UTF8)
        while not text.strip() and not failure and (more := read_some(handle, BUFFER))[0]:
            text, failure = more
    if failure and not text.strip():
        raise damaged(failure, file)
    if not text.strip():
        raise DataError("is empty; it should hold rows of data", file=file)
    return Content(path, compression, head, text.lstrip()[:1])


def data_suffix(path: Path) -> str:
    """The ending of a name in small letters, without those of compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED_NAMES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_data_name(path: Path) -> bool:
    """Whether a name says that the file holds rows."""
    return data_suffix(path) in JSON_NAMES + CSV_NAMES + TABLE_NAMES


def read_some(handle: io.BufferedReader, size: int) -> tuple[bytes, Exception | None]:
    """``size`` bytes, or fewer at the end of the file or before damage, and the error that the damage raised."""
    parts: list[bytes] = []
    held = 0
    try:
        while held < size and (part := handle.read1(size - held)):
            parts.append(part)
            held += len(part)
    except DAMAGED as error:
        return b"".join(parts), error
    return b"".join(parts), None


def lines_of(handle: io.BufferedReader) -> Iterator[tuple[bytes, bool]]:
    """Lines, and whether each is whole: of a line longer than a row may be, only the beginning is given."""
    while line := handle.readline(ROW_BYTES + 1):
        whole = len(line) <= ROW_BYTES
        if not whole and not line.endswith(b"\n"):
            while (rest := handle.readline(BUFFER)) and not rest.endswith(b"\n"):
                pass
        yield line, whole


def too_long(where: str = "") -> str:
    """The message for a row of more than ``ROW_BYTES``."""
    return f"the row{where} is longer than {ROW_BYTES >> 20} MiB, which no row may be; shorten it, or leave it out"


def too_large() -> str:
    """The message for a file that decompresses to far more than its size."""
    return f"comes to more than {TIMES} times its size when it is unpacked, which rows do not; unpack it first"


class _Parts(io.RawIOBase):
    """A decompressed stream of bounded size, whose bytes before damage can be read."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._file = stream, str(path)
        self._left = max(UNPACKED, TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._stream.read1(len(buffer))
        buffer[: len(part)] = part
        self._left -= len(part)
        if self._left < 0:
            raise DataError(too_large(), file=self._file)
        return len(part)


def _decompressed(path: Path, compression: str | None, stack: ExitStack) -> io.BufferedReader:
    raw = stack.enter_context(path.open("rb"))
    if compression is None:
        return raw
    if compression == "zstd":
        import pyarrow as pa

        stream: Any = pa.CompressedInputStream(raw, "zstd")
    else:
        openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        stream = openers[compression](raw)
    return io.BufferedReader(_Parts(stack.enter_context(stream), path), BUFFER)


def _refuse(file: str, head: bytes, compression: str | None) -> None:
    inside = f" inside {compression}" if compression else ""
    if head.startswith(b"PK") and (b"[Content_Types].xml" in head or b"xl/" in head):
        raise DataError("is an Excel workbook; export it as CSV in UTF-8", file=file)
    for start, what in _REFUSED.items():
        if head.startswith(start):
            raise DataError(what, file=file)
    if compression and (again := next((n for s, n in COMPRESSED.items() if head.startswith(s)), None)):
        raise DataError(f"is compressed twice ({again}{inside}); unpack it once", file=file)
    if compression and head.startswith(TABLES):
        raise DataError(f"is a parquet or arrow file{inside}; unpack it first", file=file)
    if head[257:262] == b"ustar":
        raise DataError(f"is a tar archive{inside}; unpack it first", file=file)
    if head.startswith(TABLES):
        return
    if head.count(0) > 0.1 * len(head):
        halves = head[0::2].count(0), head[1::2].count(0)
        if max(halves) > 0.4 * (len(head) // 2) and min(halves) < 0.1 * (len(head) // 2):
            raise DataError("is not UTF-8, it looks like UTF-16 text; save it as UTF-8", file=file)
        raise DataError("is neither text nor parquet nor arrow; write the rows as JSON lines", file=file)
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError("is a web page; download the data file itself", file=file)


def reason(error: BaseException) -> str:
    """The message of an exception, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else text[:REASON_CHARACTERS] + "..."


def damaged(error: BaseException, file: str, rows: int = 0) -> DataError:
    """The error for a file that is damaged after ``rows`` rows."""
    after = f" after row {rows}" if rows else ""
    return DataError(f"is damaged or cut off{after} ({reason(error)}); download or copy it again", file=file)


def not_utf8(error: UnicodeDecodeError, where: str) -> str:
    """The message for bytes that are not UTF-8, with a guess at their encoding."""
    bad = error.object[error.start]
    alone = not any(byte >= 0x80 for byte in error.object[error.start + 1 : error.start + 2])
    guess = "; it may be Latin-1 or Windows-1252" if alone else ""
    return f"not UTF-8 {where} (byte 0x{bad:02x}{guess}); save it as UTF-8"
