"""Rows of parquet and arrow files, batch by batch, as plain Python values.

Values are what JSON could hold: text, numbers, booleans, null, lists and dicts. What else such a file may hold is
written as text: dates and times in ISO 8601, bytes as UTF-8 or, where they are not, as base64. Decimals become numbers
and NaN, as everywhere in prefopt, null.

All structs of a column have the same fields: what an object lacks that another one has is null there. A null inside of
an object is therefore left out, but for the ``default`` and ``const`` of a JSON schema, where null is a value.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, repeat
from typing import Any

from prefopt.data.files.content import ARROW_FILE, PARQUET, ROW_BYTES, Content, damaged, too_long
from prefopt.data.files.text_rows import decode
from prefopt.errors import DataError

# Bytes of a batch to turn into Python objects at once, and rows at most.
BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
# Keys of a JSON schema that may be null, and keys below which there are names that rows chose themselves.
NULLABLE = ("default", "const")
ARGUMENTS = "arguments"
NAMING = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Bytes that the rows of a batch may come to where a file holds at most so many a row; fewer rows would be slow.
REPEATED_BYTES, SHARED_BYTES, FEWEST_ROWS = 1 << 27, 64, 16
# A decimal with more digits before its point than any float is text: as a whole number it could fill the memory.
LARGEST = 400


def read_table(content: Content) -> Iterator[object]:
    """Rows of a parquet or arrow file, batch by batch."""
    batches = _parquet_batches if content.head.startswith(PARQUET) else arrow_batches
    return table_rows(lambda: batches(content), str(content.path))


def _parquet_batches(content: Content) -> Iterator[Any]:
    """Record batches of a parquet file, no more than a part of a row group in memory."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(
        content.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
    ) as parquet:
        meta = parquet.metadata
        size = sum(meta.row_group(at).total_byte_size for at in range(meta.num_row_groups))
        rows = min(_rows_of_a_batch(size, meta.num_rows), _rows_of_repeats(size, meta.num_rows))
        yield from parquet.iter_batches(batch_size=rows, use_threads=False)


def arrow_batches(content: Content) -> Iterator[Any]:
    """Record batches of an arrow file or stream, which is mapped, not loaded."""
    import pyarrow as pa

    with pa.memory_map(str(content.path)) as source:
        if content.head.startswith(ARROW_FILE):
            with pa.ipc.open_file(source) as reader:
                for at in range(reader.num_record_batches):
                    yield reader.get_batch(at)
        else:
            with pa.ipc.open_stream(source) as reader:
                yield from reader


def table_rows(batches: Callable[[], Iterable[Any]], file: str) -> Iterator[object]:
    """Rows of record batches. Raises :class:`DataError` where they are damaged, or there is none."""
    number = 0
    source = iter(batches())
    while True:
        try:
            batch = next(source, None)
            if batch is None:
                break
            # Offsets and lengths come from the file: unless they are checked, a damaged one reads foreign memory.
            batch.validate(full=True)
            step = _rows_of_a_batch(batch.nbytes, batch.num_rows)
        except Exception as error:  # what the library raises, of whatever class, the file has made it raise
            raise damaged(error, file, number) from None
        at = 0
        while at < batch.num_rows:
            part = batch.slice(at, step)
            wide = part.nbytes > ROW_BYTES
            part = part.slice(0, 1) if wide else part
            try:
                rows = _rows(part.to_struct_array())
            except _DuplicateName as error:
                raise DataError(str(error), file=file) from None
            except Exception as error:  # offsets, decimals, dates: what it holds is what its writer made of it
                raise damaged(error, file, number) from None
            if wide and _characters(rows) > ROW_BYTES:
                raise DataError(too_long(), file=file, row=number + 1)
            at += len(rows)
            number += len(rows)
            yield from rows
    if not number:
        raise DataError("holds no rows", file=file)


class _DuplicateName(Exception):
    pass


def _rows_of_a_batch(size: int, rows: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _rows_of_repeats(size: int, rows: int) -> int:
    """Rows at once of a file that holds few bytes a row: they may be long texts that rows share through a dictionary,
    and each row of a batch may come to be as long as all that is stored."""
    return BATCH_ROWS if size >= SHARED_BYTES * rows else max(FEWEST_ROWS, REPEATED_BYTES // max(size, 1))


def _characters(value: Any) -> int:
    """Characters of all the text in a value."""
    waiting, held = [value], 0
    while waiting:
        match waiting.pop():
            case str(text):
                held += len(text)
            case dict() as inner:
                waiting += [*inner.keys(), *inner.values()]
            case list() as inner:
                waiting += inner
    return held


def _values(array: Any, key: str = "") -> list[Any]:
    """The values of an array, column by column where it is nested, which is many times faster than row by row.

    ``key`` is what the objects among them stand under.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, types = array.type, pa.types
    if types.is_struct(kind):
        values: list[Any] = _structs(array, key)
    elif any(is_kind(kind) for is_kind in _list_kinds(types)):
        inner, lengths = iter(_values(array.flatten(), key)), pc.list_value_length(array).to_pylist()
        values = [None if length is None else list(islice(inner, length)) for length in lengths]
    elif types.is_map(kind):
        values = _maps(array, key)
    elif types.is_dictionary(kind):
        return _shared(array) if _is_text(kind.value_type) else _values(array.dictionary_decode(), key)
    elif isinstance(kind, pa.JsonType):
        values = [None if text is None else _json(text) for text in array.storage.to_pylist()]
    elif isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage, key)
    elif _is_text(kind):
        values = array.to_numpy(zero_copy_only=False).tolist()  # None where it is null
    elif types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind):
        values = array.to_pylist()
    else:
        values = [_plain(value) for value in array.to_pylist(maps_as_pydicts="strict")]
    return values


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _shared(array: Any) -> list[str | None]:
    """Texts of a dictionary, each once in memory however many rows point to it."""
    import pyarrow.compute as pc

    used = pc.unique(array.indices.drop_null())
    texts = dict(zip(used.to_pylist(), _values(array.dictionary.take(used)), strict=True))
    return [None if at is None else texts[at] for at in array.indices.to_pylist()]


def _list_kinds(types: Any) -> tuple[Callable[[Any], bool], ...]:
    views = (types.is_list_view, types.is_large_list_view)
    return (types.is_list, types.is_large_list, types.is_fixed_size_list, *views)


def _structs(array: Any, key: str) -> list[dict[str, Any] | None]:
    """Objects without the keys that they lack."""
    rows = _rows(array, key)
    kept = () if key in (*NAMING, ARGUMENTS) else NULLABLE
    rows = [{name: v for name, v in row.items() if v is not None or name in kept} for row in rows]
    if not array.null_count:
        return list(rows)
    return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]


def _maps(array: Any, key: str) -> list[dict[str, Any] | None]:
    """Objects with names of their own: none is filled in, but what they hold may be objects of one type."""
    import pyarrow as pa

    whole = array.cast(pa.list_(pa.struct([("key", array.type.key_type), ("value", array.type.item_type)])))
    pairs = whole.flatten()
    names, inner = map(str, pairs.field(0).to_pylist()), _values(pairs.field(1), key if key == ARGUMENTS else "")
    held, lengths = zip(names, inner, strict=True), whole.value_lengths().to_pylist()
    maps = [None if length is None else dict(islice(held, length)) for length in lengths]
    if any(held is not None and len(held) < length for held, length in zip(maps, lengths, strict=True)):
        raise ValueError("a map has one key twice")
    return maps


def _rows(array: Any, key: str = "") -> list[dict[str, Any]]:
    """Objects with all of their keys, as rows have all columns."""
    names = [field.name for field in array.type]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateName(f"two columns are named {twice!r}; rename one of them")
    columns = [_values(array.field(at), key if key == ARGUMENTS else name) for at, name in enumerate(names)]
    cells = zip(*columns, strict=True) if names else repeat((), len(array))
    return [dict(zip(names, row, strict=True)) for row in cells]


def _plain(value: Any) -> Any:
    """A value as JSON could hold it."""
    match value:
        case None | str() | bool() | int():
            return value
        case float():
            return None if math.isnan(value) else value
        case dict():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case bytes():
            return _text(value)
        case decimal.Decimal():
            if not value.is_finite() or abs(value.adjusted()) > LARGEST:
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


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")
