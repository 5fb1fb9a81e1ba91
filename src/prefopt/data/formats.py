"""From the rows of a file to comparisons, one at a time: ``open_comparisons`` and ``parse_comparisons``.

A first pass over all rows tells their layout (:data:`prefopt.data.layouts.LAYOUTS`) and counts them; every later pass
reads them again, so that memory stays flat however long the file is.

>>> reading = parse_comparisons([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 22"}, {"prompt": "?"}], "rows")
>>> reading.layout, reading.count
('preference-text', 2)
>>> [type(row).__name__ for row in reading]
['Comparison', 'Problem']
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from prefopt.data.columns import parse_columns
from prefopt.data.layouts.layout import Columns, Layout
from prefopt.data.layouts.values import BadRow
from prefopt.data.problem import Problem
from prefopt.data.read import read_json
from prefopt.data.recognise import Recognised, named_layout, recognise
from prefopt.errors import DataError
from prefopt.records import Comparison


class Source(Protocol):
    """Rows that can be read again and again; ``name`` is what messages call them."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    def rows(self) -> Iterator[object]:
        """The rows from the first on, as JSON gives them."""


class Reading:
    """The rows of one source as comparisons.

    Iterating gives one :class:`Comparison` or :class:`Problem` for each row, in order; each pass reads the source
    again. ``layout`` is the name of the rows' layout, ``count`` how many there are. ``notes`` says what was passed
    over, such as columns that nothing reads; keys of messages are added to it in the first full pass.
    """

    def __init__(self, source: Source, file: str, layout: Layout, columns: Columns, found: Recognised) -> None:
        self.file, self.layout, self.count = file, layout.name, found.count
        self.notes = [f"{file}: {note}" for note in found.notes]
        self._source, self._layout, self._columns = source, layout, columns
        self._said = False

    def __iter__(self) -> Iterator[Comparison | Problem]:
        number = 0
        for number, row in enumerate(self._source.rows(), 1):
            try:
                yield self._layout.parse(row, number, self.file, self._columns)
            except BadRow as bad:
                yield Problem(bad.kind, number, bad.what, self.file)
        if number != self.count:
            raise DataError(f"had {self.count} rows and now has {number}: it changed while it was read", file=self.file)
        if not self._said and self._columns.tags.unread:
            self.notes.append(f"{self.file}: keys of messages not read: {', '.join(sorted(self._columns.tags.unread))}")
        self._said = True

    @cached_property
    def _all(self) -> list[Comparison | Problem]:
        return list(self)

    @property
    def comparisons(self) -> list[Comparison]:
        """All comparisons, held in memory."""
        return [c for c in self._all if isinstance(c, Comparison)]

    @property
    def problems(self) -> list[Problem]:
        """The problems of the rows that are none."""
        return [p for p in self._all if isinstance(p, Problem)]

    @property
    def read(self) -> int:
        """How many rows there are."""
        return self.count


Rows = Reading


class _File:
    """One JSON or JSON-lines file."""

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)

    def rows(self) -> Iterator[object]:
        return read_json(self.name)


class _Memory:
    """Rows in memory."""

    def __init__(self, rows: Iterable[object], name: str) -> None:
        self.name = name
        self._rows = rows if isinstance(rows, Sequence) else list(rows)

    def rows(self) -> Iterator[object]:
        return iter(self._rows)


def read_comparisons(path: str | Path) -> Reading:
    """Read one JSON or JSON-lines file; as :func:`open_comparisons`."""
    return open_comparisons(_File(path))


def parse_comparisons(
    rows: Iterable[object], file: str, *, format: str | None = None, columns: Sequence[str] | None = None
) -> Reading:
    """Comparisons from rows in memory; ``file`` names their origin in messages. As :func:`open_comparisons`."""
    return open_comparisons(_Memory(rows, file), format=format, columns=columns)


def open_comparisons(source: Source, *, format: str | None = None, columns: Sequence[str] | None = None) -> Reading:
    """The rows of a source as comparisons, in the layout named by ``format`` or else recognised from all rows.

    Raises :class:`DataError` where there is no row, no row has a known layout, layouts are mixed, or a column of
    ``columns`` (``NAME=COLUMN``) is nowhere; :class:`ConfigError` for an unknown layout or NAME. A single bad row (a
    missing field, an unknown role) is a :class:`Problem` instead.
    """
    named = named_layout(format) if format is not None else None
    given = parse_columns(columns)
    found = recognise(source.rows(), source.name, named, given)
    return Reading(source, source.name, found.layout, given, found)
