"""What a data file is, told from its first bytes, and its bytes as they were before they were compressed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
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
ROW_BYTES = 1 << 26
"""A row may be this long, in bytes, whatever the kind of file: 64 MiB, a hundred novels. There has to be some end: a
file of a megabyte can decompress to a row that no memory holds."""
UNPACKED, TIMES = 1 << 28, 250
"""No compressed file of rows comes to more than 256 MiB and so many times its size; a bomb comes to thousands."""
SAID = 300  # characters of another library's message, at most

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_NAMES = (".gz", ".bz2", ".xz", ".zst")
JSON_NAMES = (".json", ".jsonl", ".ndjson")
CSV_NAMES = (".csv", ".tsv", ".tab")
TABLE_NAMES = (".parquet", ".arrow", ".feather")
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"

_PICKLE = "is a Python pickle, which can run code and is never loaded; write JSON lines or parquet"
# What is not data, or not yet: told by how it begins, so that the message can say what to do.
_REFUSED = {
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"PK\x05\x06": "is an empty zip archive",
    b"7z\xbc\xaf": "is a 7z archive; unpack it first",
    b"Rar!": "is a rar archive; unpack it first",
    b"PARE": "is an encrypted parquet file; write it again without encryption",
    b"\xd0\xcf\x11\xe0": "is an Office document (an old or a password-protected workbook?); export it as CSV in UTF-8",
    b"-----BEGIN PGP": "is encrypted (PGP); decrypt it first",
    b"SQLite format 3": "is an SQLite database and no study of prefopt collect; export the rows as JSON lines",
    b"%PDF": "is a PDF document, not rows of data",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
    b"\x89HDF": "is an HDF5 file; write JSON lines or parquet",
    b"\x93NUMPY": "is a numpy array; write JSON lines or parquet",
    b"Obj\x01": "is an Avro file; write JSON lines or parquet",
    b"FEA1\0": "is a Feather file of version 1; write it again as version 2, or as parquet",
    b"version https://git-lfs": "is a Git LFS pointer, not the data; fetch the data with: git lfs pull",
    codecs.BOM_UTF32_LE: "is not UTF-8 but UTF-32 text; save it as UTF-8",
    codecs.BOM_UTF32_BE: "is not UTF-8 but UTF-32 text; save it as UTF-8",
    codecs.BOM_UTF16_LE: "is not UTF-8 but UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is not UTF-8 but UTF-16 text; save it as UTF-8",
}
# What a damaged stream of bytes raises, whichever the compression (zlib.error has no other base than Exception).
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True, slots=True)
class Content:
    """How a file begins, once decompressed: ``head`` is up to 4096 bytes, ``first`` the first that is not white."""

    path: Path
    compression: str | None
    head: bytes
    first: bytes

    @contextmanager
    def opened(self) -> Iterator[io.BufferedReader]:
        """The bytes from the start, decompressed as they are read."""
        with ExitStack() as stack:
            yield _decompressed(self.path, self.compression, stack)


def look(path: Path) -> Content:
    """Tell what a file is. Raises :class:`DataError` for what cannot hold rows: missing, a folder, a pipe, unreadable,
    empty, an archive, encrypted, binary of another kind, or text in UTF-16 or UTF-32."""
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


def layout_name(path: Path) -> str:
    """The ending of a name that tells a layout, in small letters, what was added by compression aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED_NAMES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_data_name(path: Path) -> bool:
    """Whether a name says that the file holds rows."""
    return layout_name(path) in JSON_NAMES + CSV_NAMES + TABLE_NAMES


def read_some(handle: io.BufferedReader, size: int) -> tuple[bytes, Exception | None]:
    """As many bytes, or fewer at the end of the file or before damage, and what the damage raised: what can be read
    before it is not lost."""
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
    """Lines, and whether each is whole: of one that is longer than a row may be, only the beginning is given."""
    while line := handle.readline(ROW_BYTES + 1):
        whole = len(line) <= ROW_BYTES
        if not whole and not line.endswith(b"\n"):
            while (rest := handle.readline(BUFFER)) and not rest.endswith(b"\n"):
                pass
        yield line, whole


def too_long(where: str = "") -> str:
    """What to say of a row that is longer than a row may be."""
    return f"the row{where} is longer than {ROW_BYTES >> 20} MiB, which no row may be; shorten it, or leave it out"


class _Parts(io.RawIOBase):
    """A decompressed stream that gives what it has, and only then what stopped it; not without end."""

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
            what = f"comes to more than {TIMES} times its size when it is unpacked, which rows do not; unpack it first"
            raise DataError(what, file=self._file)
        return len(part)


def _decompressed(path: Path, compression: str | None, stack: ExitStack) -> io.BufferedReader:
    raw = stack.enter_context(path.open("rb"))
    match compression:
        case None:
            return raw
        case "gzip":
            stream: Any = gzip.GzipFile(fileobj=raw)
        case "bzip2":
            stream = bz2.BZ2File(raw)
        case "xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115  (entered below)
        case _:
            import pyarrow as pa

            stream = pa.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(_Parts(stack.enter_context(stream), path), BUFFER)


def _refuse(file: str, head: bytes, compression: str | None) -> None:
    inside = f" inside {compression}" if compression else ""
    if head.startswith(b"PK") and (b"[Content_Types].xml" in head or b"xl/" in head):
        raise DataError("is an Excel workbook; export it as CSV in UTF-8", file=file)
    if head.startswith(b"PK\x03\x04") and len(head) > 6 and head[6] & 1:
        raise DataError("is a zip archive with a password; unpack it first", file=file)
    for start, what in _REFUSED.items():
        if head.startswith(start):
            raise DataError(what, file=file)
    if compression and (again := next((n for s, n in COMPRESSED.items() if head.startswith(s)), None)):
        raise DataError(f"is compressed twice ({again}{inside}); unpack it once", file=file)
    if compression and head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        raise DataError(f"is a parquet or arrow file{inside}; unpack it first", file=file)
    if head[257:262] == b"ustar":
        raise DataError(f"is a tar archive{inside}; unpack it first", file=file)
    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        return
    if head.count(0) > 0.1 * len(head):
        halves = head[0::2].count(0), head[1::2].count(0)
        if max(halves) > 0.4 * (len(head) // 2) and min(halves) < 0.1 * (len(head) // 2):
            raise DataError("is not UTF-8, it looks like UTF-16 text; save it as UTF-8", file=file)
        raise DataError("is neither text nor parquet nor arrow; write the rows as JSON lines", file=file)
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError("is a web page; download the data file itself", file=file)


def reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= SAID else text[:SAID] + "..."


def damaged(error: BaseException, file: str, rows: int = 0) -> DataError:
    """What to raise for a file that ended, or went wrong, after so many rows."""
    after = f" after row {rows}" if rows else ""
    return DataError(f"is damaged or cut off{after} ({reason(error)}); download or copy it again", file=file)


def not_utf8(error: UnicodeDecodeError, where: str) -> str:
    """What to say of bytes that are not UTF-8, with a guess at what they are."""
    bad = error.object[error.start]
    alone = not any(byte >= 0x80 for byte in error.object[error.start + 1 : error.start + 2])
    guess = "; it may be Latin-1 or Windows-1252" if alone else ""
    return f"not UTF-8 {where} (byte 0x{bad:02x}{guess}); save it as UTF-8"
