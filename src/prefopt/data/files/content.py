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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import LONGEST, DataError

HEAD = 4096
BUFFER = 1 << 20
ROW_BYTES = 1 << 26  # of one row in any kind of file: a megabyte can decompress to a row that no memory holds
# The decompressed size of a file is bounded by the larger of these: 256 MiB, and a multiple of its size.
UNPACKED, TIMES = 1 << 28, 250

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
_HTML = (b"<!doctype html", b"<html")
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
        return self.head.startswith(TABLES)

    @property
    def is_json(self) -> bool:
        """Whether it is JSON, by its name or else by its beginning."""
        suffix = data_suffix(self.path)
        if suffix in CSV_NAMES:
            return bool(_JSON.match(self.head.removeprefix(codecs.BOM_UTF8)))
        return suffix in JSON_NAMES or self.first in (b"[", b"{")

    def opened(self) -> AbstractContextManager[io.BufferedReader]:
        return _decompressed(self.path, self.compression)


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
    with _decompressed(path, compression) as handle:
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
    """Lines without the byte order mark, and whether each is whole: of one longer than ``ROW_BYTES``, the beginning."""
    mark = codecs.BOM_UTF8
    while line := handle.readline(ROW_BYTES + 1):
        whole = len(line) <= ROW_BYTES
        if not whole and not line.endswith(b"\n"):
            while (rest := handle.readline(BUFFER)) and not rest.endswith(b"\n"):
                pass
        yield line.removeprefix(mark), whole
        mark = b""


def too_long(where: str = "") -> str:
    return f"the row{where} is longer than {ROW_BYTES >> 20} MiB, the limit of a row; shorten it, or leave it out"


def too_large() -> str:
    return f"comes to more than {TIMES} times its size when unpacked; if you trust the file, unpack it first"


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


def _zstd(raw: io.BufferedReader) -> Any:
    import pyarrow as pa  # takes time to import

    return pa.CompressedInputStream(raw, "zstd")


_OPENERS: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, "zstd": _zstd}


@contextmanager
def _decompressed(path: Path, compression: str | None) -> Iterator[io.BufferedReader]:
    with path.open("rb") as raw:
        if compression is None:
            yield raw
            return
        with _OPENERS[compression](raw) as stream:
            yield io.BufferedReader(_Parts(stream, path), BUFFER)


def _refuse(file: str, head: bytes, compression: str | None) -> None:
    inside = f" inside {compression}" if compression else ""
    excel = head.startswith(b"PK") and (b"[Content_Types].xml" in head or b"xl/" in head)
    binary = head.count(0) > 0.1 * len(head) and not head.startswith(TABLES)
    halves = sorted((head[0::2].count(0), head[1::2].count(0)))
    utf_16 = binary and halves[1] > 0.4 * (len(head) // 2) and halves[0] < 0.1 * (len(head) // 2)
    faults = {
        "is an Excel workbook; export it as CSV in UTF-8": excel,
        **{what: True for start, what in _REFUSED.items() if head.startswith(start)},
        f"is compressed twice{inside}; unpack it once": compression and head.startswith(tuple(COMPRESSED)),
        f"is a parquet or arrow file{inside}; unpack it first": compression and head.startswith(TABLES),
        f"is a tar archive{inside}; unpack it first": head[257:262] == b"ustar",
        "is not UTF-8, it looks like UTF-16 text; save it as UTF-8": utf_16,
        "is neither text nor parquet nor arrow; write the rows as JSON lines": binary,
        "is a web page; download the data file itself": head.lstrip()[:15].lower().startswith(_HTML),
    }
    if what := next((what for what, found in faults.items() if found), ""):
        raise DataError(what, file=file)


def reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


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
