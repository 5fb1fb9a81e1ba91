"""Rows of parquet and arrow files as plain Python values, batch by batch; and parquet files of rows.

Values are what JSON can hold: text, numbers, booleans, null, lists and dicts. Dates and times become text in ISO 8601,
bytes become text in UTF-8 or else base64, decimals become numbers, and NaN becomes null.

All structs of a column have the same fields, so a field that an object lacks is null. A null inside an object is
therefore left out, except for ``default`` and ``const`` of a JSON schema, where null is a value.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import os
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefopt.data.files import content as bounds
from prefopt.data.files.content import ARROW_FILE, PARQUET, ROW_BYTES, Content, damaged, too_large, too_long
from prefopt.data.files.text_rows import decode
from prefopt.errors import DataError

# The largest batch that is converted to Python objects at once.
BATCH_BYTES, BATCH_ROWS = 4 << 20, 1024
# Keys of a JSON schema that may be null, and keys below which names are chosen by the rows.
NULLABLE = ("default", "const")
ARGUMENTS = "arguments"
NAMING = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Where a file has at most SHARED_BYTES a row, rows may share long texts: the batch then has REPEATED_BYTES at most.
REPEATED_BYTES, SHARED_BYTES, FEWEST_ROWS = 1 << 27, 64, 16
# A decimal with a larger exponent stays text: as a whole number it could fill the memory.
MAX_EXPONENT = 400
LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which UTF-8 cannot hold


def read_table(content: Content) -> Iterator[object]:
    batches = _parquet_batches if content.head.startswith(PARQUET) else arrow_batches
    return table_rows(lambda: batches(content), str(content.path))


def _parquet_batches(content: Content) -> Iterator[Any]:
    """Record batches of a parquet file, at most a part of a row group in memory."""
    with pq.ParquetFile(
        content.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
    ) as parquet:
        meta = parquet.metadata
        size = sum(meta.row_group(at).total_byte_size for at in range(meta.num_row_groups))
        rows = min(_rows_of_a_batch(size, meta.num_rows), _rows_of_repeats(size, meta.num_rows))
        yield from parquet.iter_batches(batch_size=rows, use_threads=False)


def arrow_batches(content: Content) -> Iterator[Any]:
    """Record batches of an arrow file or stream, which is mapped, not loaded."""
    start = len(ARROW_FILE) if content.head.startswith(ARROW_FILE) else 0  # a file is a stream between magic and footer
    with pa.memory_map(str(content.path)) as source:
        source.seek(start)
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type in ("record batch", "dictionary"):
                _check_unpacked(message, str(content.path))
        source.seek(start)
        with pa.ipc.open_stream(source) as reader:
            yield from reader


def _check_unpacked(message: Any, file: str) -> None:
    """Refuse compressed buffers that come to far more than their size, by the sizes at their heads, before unpacking.

    The metadata are a flatbuffer (Message.fbs of Arrow): a table begins with the distance to its vtable, which holds
    its own size, the size of the table and the offsets of the fields.
    """
    data = message.metadata.to_pybytes()

    def number(form: str, at: int) -> int:
        return int(struct.unpack_from(form, data, at)[0])

    def field(table: int, index: int) -> int:
        vtable = table - number("<i", table)
        place = 4 + 2 * index
        offset = number("<H", vtable + place) if place < number("<H", vtable) else 0
        return table + offset if offset else 0

    def target(at: int) -> int:
        return at + number("<I", at)

    batch = target(field(target(0), 2))
    if message.type == "dictionary":
        batch = target(field(batch, 1))
    if not field(batch, 3):  # not compressed
        return
    buffers = target(field(batch, 2))
    places = np.frombuffer(data, "<i8", 2 * number("<I", buffers), buffers + 4).reshape(-1, 2).tolist()
    unpacked = sum(max(0, struct.unpack_from("<q", message.body, at)[0]) for at, size in places if size)
    if unpacked > max(bounds.UNPACKED, bounds.TIMES * message.body.size):
        raise DataError(too_large(), file=file)


def table_rows(batches: Callable[[], Iterable[Any]], file: str) -> Iterator[object]:
    """Rows of record batches. Raises :class:`DataError` where they are damaged or there is none."""
    number = 0
    try:
        for batch in batches():
            batch.validate(full=True)  # unchecked offsets of a damaged file would read foreign memory
            step = _rows_of_a_batch(batch.nbytes, batch.num_rows)
            at = 0
            while at < batch.num_rows:
                part = batch.slice(at, step)
                wide = part.nbytes > ROW_BYTES
                rows = _rows((part.slice(0, 1) if wide else part).to_struct_array())
                if wide and _characters(rows) > ROW_BYTES:
                    raise DataError(too_long(), row=number + 1)
                at += len(rows)
                number += len(rows)
                yield from rows
    except DataError as error:
        raise DataError(error.what, file=error.file or file, row=error.row) from None
    except Exception as error:  # of any class: the file caused it
        raise damaged(error, file, number) from None
    if not number:
        raise DataError("holds no rows", file=file)


def _rows_of_a_batch(size: int, rows: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _rows_of_repeats(size: int, rows: int) -> int:
    """Rows of a batch where rows may share long texts through a dictionary: each may be as long as the whole file."""
    return BATCH_ROWS if size >= SHARED_BYTES * rows else max(FEWEST_ROWS, REPEATED_BYTES // max(size, 1))


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return sum(map(_characters, inner)) if isinstance(inner, list) else 0


def _values(array: Any, key: str = "") -> list[Any]:
    """The values of an array below ``key``, converted column by column: many times faster than row by row."""
    kind, types = array.type, pa.types
    if types.is_struct(kind):
        return _structs(array, key)
    if isinstance(kind, LISTS):
        inner, lengths = iter(_values(array.flatten(), key)), pc.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(inner, length)) for length in lengths]
    if types.is_map(kind):
        return _maps(array, key)
    if types.is_dictionary(kind):
        return _shared(array) if _is_text(kind.value_type) else _values(array.dictionary_decode(), key)
    if isinstance(kind, pa.JsonType):
        return [None if text is None else _json(text) for text in array.storage.to_pylist()]
    if isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage, key)
    if _is_text(kind):
        return list(array.to_numpy(zero_copy_only=False).tolist())  # None where it is null
    return [_plain(value) for value in array.to_pylist(maps_as_pydicts="strict")]


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _shared(array: Any) -> list[str | None]:
    """Texts of a dictionary, each once in memory however many rows point to it."""
    used = pc.unique(array.indices.drop_null())
    texts = dict(zip(used.to_pylist(), _values(array.dictionary.take(used)), strict=True))
    return [None if at is None else texts[at] for at in array.indices.to_pylist()]


def _structs(array: Any, key: str) -> list[Any]:
    """Objects without the fields that they lack."""
    rows = _rows(array, key)
    kept = () if key in (*NAMING, ARGUMENTS) else NULLABLE
    rows = [{name: v for name, v in row.items() if v is not None or name in kept} for row in rows]
    if not array.null_count:
        return rows
    return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]


def _maps(array: Any, key: str) -> list[dict[str, Any] | None]:
    """Objects whose keys are their own, so that none is filled in."""
    whole = array.cast(pa.list_(pa.struct([("key", array.type.key_type), ("value", array.type.item_type)])))
    pairs = whole.flatten()
    names, inner = map(str, pairs.field(0).to_pylist()), _values(pairs.field(1), key if key == ARGUMENTS else "")
    held, lengths = zip(names, inner, strict=True), whole.value_lengths().to_pylist()
    maps = [None if length is None else dict(islice(held, length)) for length in lengths]
    if any(held is not None and len(held) < length for held, length in zip(maps, lengths, strict=True)):
        raise ValueError("a map has one key twice")
    return maps


def _rows(array: Any, key: str = "") -> list[dict[str, Any]]:
    """Objects with all of their fields, as rows have all columns."""
    names = [field.name for field in array.type]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two columns are named {twice!r}; rename one of them")
    columns = [_values(array.field(at), key if key == ARGUMENTS else name) for at, name in enumerate(names)]
    cells = zip(*columns, strict=True) if names else repeat((), len(array))
    return [dict(zip(names, row, strict=True)) for row in cells]


def _plain(value: Any) -> Any:
    match value:
        case None | str() | bool() | int():
            return value
        case float():
            return None if math.isnan(value) else value
        case bytes():
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return base64.b64encode(value).decode("ascii")
        case decimal.Decimal():
            if not value.is_finite() or abs(value.adjusted()) > MAX_EXPONENT:
                return str(value)
            return int(value) if value == value.to_integral_value() else float(value)
        case datetime.timedelta():
            return value.total_seconds()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
    return str(value)


def _json(text: str) -> Any:
    try:
        return decode(text)
    except (ValueError, RecursionError):
        return text


def write_parquet(lines: Path, table: Path, loose: Collection[str]) -> None:
    """A parquet file of the rows in a file of JSON lines, which is read twice: for the schema, then by batches.

    A column whose values have one type has that type; any other is JSON (arrow's ``arrow.json``, parquet's ``JSON``),
    which is decoded on reading. In ``loose`` columns, objects of one type may lack fields.
    """
    types: dict[str, Any] = {}
    for batch in _line_batches(lines):
        for row in batch:
            for name, value in row.items():
                found = _type_of(value, name in loose)
                types[name] = _merged(types.get(name, pa.null()), found, name in loose)
    plain = {name for name, kind in types.items() if kind is not None and not _has_null(kind)}
    schema = pa.schema([(name, kind if name in plain else pa.json_()) for name, kind in types.items()])
    with pq.ParquetWriter(table, schema, compression="zstd") as writer:
        for batch in _line_batches(lines):
            arrays = []
            for field in schema:
                if field.name in plain:
                    arrays.append(pa.array([row.get(field.name) for row in batch], field.type))
                    continue
                # An absent value is null; a null is the JSON of null.
                cells = [json.dumps(row[field.name]) if field.name in row else None for row in batch]
                arrays.append(pa.ExtensionArray.from_storage(pa.json_(), pa.array(cells, pa.string())))
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    with table.open("rb+") as written:
        os.fsync(written.fileno())


def _line_batches(lines: Path) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    with lines.open("rb") as file:
        for line in file:
            batch.append(json.loads(line))
            size += len(line)
            if len(batch) == BATCH_ROWS or size > 2 * BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _type_of(value: object, loose: bool) -> Any:
    """The arrow type of a JSON value; None where it has none."""
    match value:
        case None:
            return pa.null()
        case bool():
            return pa.bool_()
        case int():
            return pa.int64() if -(2**63) <= value < 2**63 else None
        case float():
            return pa.float64()
        case str():
            return None if SURROGATE.search(value) else pa.string()
        case list():
            items = pa.null()
            for item in value:
                items = _merged(items, _type_of(item, loose), loose)
            return None if items is None else pa.list_(items)
        case dict() if not loose and None in value.values():
            return None  # a null in a field of a struct reads as an absent field
        case dict():
            fields = {name: _type_of(inner, loose) for name, inner in value.items()}
            whole = fields and None not in fields.values() and not any(map(SURROGATE.search, fields))
            return pa.struct(fields.items()) if whole else None
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _merged(a: Any, b: Any, loose: bool) -> Any:
    """A type for values of both types; None where there is none."""
    if a is None or b is None:
        return None
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_list(a) and pa.types.is_list(b):
        items = _merged(a.value_type, b.value_type, loose)
        return None if items is None else pa.list_(items)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        one, other = ({field.name: field.type for field in kind} for kind in (a, b))
        if one.keys() == other.keys() or loose:
            fields = {n: _merged(one.get(n, pa.null()), other.get(n, pa.null()), loose) for n in {**one, **other}}
            return None if None in fields.values() else pa.struct(fields.items())
    return None


def _has_null(kind: Any) -> bool:
    return pa.types.is_null(kind) or any(_has_null(kind.field(at).type) for at in range(kind.num_fields))
