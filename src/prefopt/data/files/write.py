"""Rows into files of JSON lines or parquet: written aside, flushed, and renamed when all is well.

>>> columns = Columns(loose={"messages"})
>>> for row in ({"messages": [{"role": "user"}], "id": 1}, {"messages": [{"role": "user", "name": "a"}], "id": "x"}):
...     columns.see(row)
>>> [f"{field.name}: {field.type}" for field in columns.schema()]
['messages: list<item: struct<role: string, name: string>>', 'id: extension<arrow.json>']

A column whose values have one type gets that type. Any other is written as JSON (arrow's ``arrow.json``, parquet's
``JSON``), which :mod:`prefopt.data.files.columnar` decodes. In ``loose`` columns objects may lack keys of one another:
what reads them takes null for absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from prefopt.core.files import aside_of, output_errors, sync_folder
from prefopt.errors import ConfigError

_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type: ``items`` of a list, ``fields`` of an object. ``mixed`` is none of parquet's."""

    name: Literal["null", "bool", "int", "float", "str", "list", "object", "mixed"]
    items: _Kind | None = None
    fields: tuple[tuple[str, _Kind], ...] = ()


_NULL, _MIXED = _Kind("null"), _Kind("mixed")


class Columns:
    """The columns of all rows that were seen, in the order in which they came up."""

    def __init__(self, loose: Collection[str] = ()) -> None:
        self._loose = frozenset(loose)
        self._kinds: dict[str, _Kind] = {}

    def see(self, row: Mapping[str, object]) -> None:
        """Take note of a row."""
        for name, value in row.items():
            loose = name in self._loose
            self._kinds[name] = _merged(self._kinds.get(name, _NULL), _kind(value, loose), loose)

    def schema(self) -> Any:
        """An arrow schema."""
        import pyarrow as pa

        return pa.schema([(name, _arrow(kind) or pa.json_()) for name, kind in self._kinds.items()])

    def batch(self, rows: Sequence[Mapping[str, object]]) -> Any:
        """A record batch of some of the rows that were seen."""
        import pyarrow as pa

        arrays = []
        for name, kind in self._kinds.items():
            values = [row.get(name) for row in rows]
            plain = _arrow(kind)
            if plain is not None:
                arrays.append(pa.array(values, plain))
                continue
            # A row that does not have the column has null there; one that has null in it, the JSON of null.
            cells = [json.dumps(row[name]) if name in row else None for row in rows]
            arrays.append(pa.ExtensionArray.from_storage(pa.json_(), pa.array(cells, pa.string())))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema())


def _kind(value: object, loose: bool) -> _Kind:
    match value:
        case None:
            return _NULL
        case bool():
            return _Kind("bool")
        case int():
            return _Kind("int") if -_INT64 <= value < _INT64 else _MIXED
        case float():
            return _Kind("float")
        case str():
            return _Kind("str") if _encodable(value) else _MIXED
        case list():
            items = _NULL
            for item in value:
                items = _merged(items, _kind(item, loose), loose)
            return _Kind("list", items)
        case dict():
            if not value or not all(map(_encodable, value)):
                return _MIXED
            return _Kind("object", fields=tuple((name, _kind(inner, loose)) for name, inner in value.items()))
    raise TypeError(f"{type(value).__name__} is no value of JSON")


def _merged(a: _Kind, b: _Kind, loose: bool) -> _Kind:
    if a == b or b.name == "null":
        return a
    if a.name == "null":
        return b
    names = {a.name, b.name}
    if names == {"list"}:
        assert a.items is not None and b.items is not None
        return _Kind("list", _merged(a.items, b.items, loose))
    if names == {"object"}:
        one, other = dict(a.fields), dict(b.fields)
        if one.keys() != other.keys() and not loose:
            return _MIXED
        every = {**one, **other}
        return _Kind("object", fields=tuple((n, _merged(one.get(n, _NULL), other.get(n, _NULL), loose)) for n in every))
    return _MIXED


def _arrow(kind: _Kind) -> Any:
    """The arrow type, or None where there is none: for what is mixed, and for what was never anything but null."""
    import pyarrow as pa

    if kind.name == "list":
        assert kind.items is not None
        items = _arrow(kind.items)
        return items and pa.list_(items)
    if kind.name == "object":
        fields = [(name, _arrow(inner)) for name, inner in kind.fields]
        return pa.struct(fields) if all(inner is not None for _, inner in fields) else None
    plain = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    return plain.get(kind.name)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


ENDINGS = (".jsonl", ".parquet")
BATCH_ROWS, BATCH_BYTES = 1024, 8 << 20


class RowFile:
    """A file of rows; use it as a context. Nothing is at ``path`` until :meth:`finish`, and nothing new without it."""

    def __init__(self, path: Path, loose: Collection[str] = ()) -> None:
        """``loose`` are the columns in which null stands for absent, see :mod:`prefopt.data.files.write`."""
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

    pass  # SELF

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
