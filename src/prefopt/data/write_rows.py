"""Rows into files of JSON lines or parquet: written aside, flushed, and renamed when all is well."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from prefopt.disk.write import aside_of, output_errors, sync_folder
from prefopt.errors import ConfigError

ENDINGS = (".jsonl", ".parquet")
BATCH_ROWS, BATCH_BYTES = 1024, 8 << 20


class RowFile:
    """A file of rows; use it as a context. Nothing is at ``path`` until :meth:`finish`, and nothing new without it."""

    def __init__(self, path: Path, loose: Collection[str] = ()) -> None:
        """``loose`` are the columns in which null stands for absent, see :mod:`prefopt.data.parquet_types`."""
        self.path, self.written, self._loose = path, 0, loose
        self._aside = aside_of(path)
        self._parquet = path.suffix == ".parquet"
        self._file: BinaryIO

    def __enter__(self) -> Self:
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._aside.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what a full disk did not take; whatever is finished has been flushed
            self._file.close()
        for left in (self._aside, self._table):
            with suppress(OSError):
                left.unlink(missing_ok=True)

    @property
    def _table(self) -> Path:
        return aside_of(self.path.with_name(f"{self.path.name}.table"))

    def write(self, row: Mapping[str, object]) -> None:
        """One row."""
        try:
            self.write_line(json.dumps(row, ensure_ascii=False).encode("utf-8"))
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only spell out
            self.write_line(json.dumps(row).encode("ascii"))

    def write_line(self, line: bytes) -> None:
        """One row as the JSON that it is already; a line end is added."""
        with output_errors(self.path):
            self._file.write(line + b"\n")
        self.written += 1

    def finish(self) -> None:
        """Put the file in its place. Raises :class:`RunError` where the disk stands in the way."""
        with output_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            ready = self._aside
            if self._parquet:
                ready = self._table
                _as_parquet(self._aside, ready, self._loose)
            ready.replace(self.path)
            sync_folder(self.path.parent)


@contextmanager
def row_files(
    outputs: Mapping[str, str], *, overwrite: bool, inputs: Sequence[Path], loose: Collection[str] = ()
) -> Iterator[list[RowFile]]:
    """Files for the options in ``outputs`` (``--output`` to path), all checked before any is written.

    Raises :class:`ConfigError` for an ending that is no kind of file here, a file that exists unless ``overwrite``
    (one of ``inputs`` even then), and a file that is named twice.
    """
    paths = {name: Path(path).expanduser() for name, path in outputs.items()}
    real = {os.path.realpath(path) for path in inputs}
    for name, path in paths.items():
        if path.suffix not in ENDINGS:
            raise ConfigError(f"{name} {path}: the name should end in {' or '.join(ENDINGS)}")
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


def _as_parquet(lines: Path, table: Path, loose: Collection[str]) -> None:
    """A parquet file of the rows in a file of JSON lines, read twice: for the types of the columns, then by batches."""
    import pyarrow.parquet as pq

    from prefopt.data.parquet_types import Columns

    columns = Columns(loose)
    for batch in _batches(lines):
        for row in batch:
            columns.see(row)
    with pq.ParquetWriter(table, columns.schema(), compression="zstd") as writer:
        for batch in _batches(lines):
            writer.write_batch(columns.batch(batch))
    with table.open("rb+") as written:
        os.fsync(written.fileno())


def _batches(lines: Path) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    with lines.open("rb") as file:
        for line in file:
            batch.append(json.loads(line))
            size += len(line)
            if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
