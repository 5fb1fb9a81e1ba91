"""Types of the columns of a parquet file, from the values of all rows, so that what is read back is what was written.

>>> columns = Columns(loose={"messages"})
>>> for row in ({"messages": [{"role": "user"}], "id": 1}, {"messages": [{"role": "user", "name": "a"}], "id": "x"}):
...     columns.see(row)
>>> [f"{field.name}: {field.type}" for field in columns.schema()]
['messages: list<item: struct<role: string, name: string>>', 'id: extension<arrow.json>']

A column whose values have one type gets that type. Any other is written as JSON (arrow's ``arrow.json``, parquet's
``JSON``), which :mod:`prefopt.data.columnar` decodes. In ``loose`` columns objects may lack keys of one another: what
reads them takes null for absent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
