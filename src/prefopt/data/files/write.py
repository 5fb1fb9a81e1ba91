"""Write rows to files of JSON lines or parquet: aside first, flushed, and renamed when complete."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Self

from prefopt.core.files import aside_of, expanded, output_errors, sync_folder
from prefopt.errors import ConfigError

ENDINGS = (".jsonl", ".parquet")
FORMULA = ("=", "+", "-", "@", "\t", "\r")


class RowFile:
    """A file of rows, used as a context. Nothing is at ``path`` before :meth:`finish`.

    ``loose`` are the columns in which a null inside an object means that the field is absent.
    """

    def __init__(self, path: Path, loose: Collection[str] = ()) -> None:
        self.path, self.written, self._loose = path, 0, loose
        self._aside, self._table = aside_of(path), aside_of(path.with_name(f"{path.name}.table"))
        self._file: BinaryIO

    def __enter__(self) -> Self:
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._aside.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk; a finished file has been flushed
            self._file.close()
        for left in (self._aside, self._table):
            with suppress(OSError):
                left.unlink(missing_ok=True)

    def write(self, row: Mapping[str, object]) -> None:
        try:
            self.write_line(json.dumps(row, ensure_ascii=False).encode("utf-8"))
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
            self.write_line(json.dumps(row).encode("ascii"))

    def write_line(self, line: bytes) -> None:
        with output_errors(self.path):
            self._file.write(line + b"\n")
        self.written += 1

    def finish(self) -> None:
        """Move the complete file to ``path``. Raises :class:`RunError` for an error of the disk."""
        with output_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            ready = self._aside
            if self.path.suffix == ".csv":
                ready = self._table
                _write_csv(self._aside, ready)
            if self.path.suffix == ".parquet":
                from prefopt.data.files.columnar import write_parquet  # pyarrow takes time to import

                ready = self._table
                write_parquet(self._aside, ready, self._loose)
            ready.replace(self.path)
            sync_folder(self.path.parent)


def _write_csv(lines: Path, output: Path) -> None:
    """JSON lines as a table for spreadsheets: with a byte-order mark, and an apostrophe before text that they would
    take for a formula."""
    with lines.open(encoding="utf-8") as read, output.open("w", encoding="utf-8-sig", newline="") as written:
        rows = map(json.loads, read)
        first = next(rows)
        table = csv.DictWriter(written, first)
        table.writeheader()
        for row in chain([first], rows):
            table.writerow({k: f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v for k, v in row.items()})
        written.flush()
        os.fsync(written.fileno())


@contextmanager
def row_files(
    outputs: Mapping[str, str],
    *,
    overwrite: bool,
    inputs: Sequence[Path],
    loose: Collection[str] = (),
    endings: Sequence[str] = ENDINGS,
) -> Iterator[list[RowFile]]:
    """Open the files of the options in ``outputs`` (``--output`` to path), after checking all of them.

    ``endings``: with .csv for rows that all have the same columns, without lists or objects. Raises
    :class:`ConfigError` for an unknown ending, a folder, a file that is named twice or is one of ``inputs``, and
    an existing file unless ``overwrite``.
    """
    paths = {name: expanded(path) for name, path in outputs.items()}
    real = {os.path.realpath(path) for path in inputs}
    for name, path in paths.items():
        if path.suffix not in endings:
            raise ConfigError(f"{name} {path}: the name should end in {' or '.join(endings)}")
        if path.is_dir():
            raise ConfigError(f"{name} {path}: is a folder; name a file")
        if os.path.realpath(path) in real:
            raise ConfigError(f"{name} {path}: is one of the files to read; name another")
        if path.exists() and not overwrite:
            raise ConfigError(f"{name} {path}: exists; name another, or replace it with --overwrite")
    if len({os.path.realpath(path) for path in paths.values()}) < len(paths):
        raise ConfigError(f"{' and '.join(paths)} name one file; name two")
    with ExitStack() as stack:
        yield [stack.enter_context(RowFile(path, loose)) for path in paths.values()]
