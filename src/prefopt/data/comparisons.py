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
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from prefopt.data.files.content import layout_name
from prefopt.data.files.read import CSV_NAMES, read_rows
from prefopt.data.layouts import LAYOUTS, named_layout
from prefopt.data.layouts.columns import column_map, find_dataset_info, parse_column_options, shared_column
from prefopt.data.layouts.layout import ColumnMap, Layout
from prefopt.data.layouts.recognise import listed, recognise
from prefopt.data.layouts.values import BadRow
from prefopt.data.problems import Problem
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison, tiers_of

# Nobody rates more responses to one prompt; more rows of one prompt are begun anew, so that memory has a bound.
MOST = 64


def joined(rows: Iterable[Comparison | Problem]) -> Iterator[Comparison | Problem]:
    """Comparisons with all responses of consecutive rows of one prompt, each under the number of its first row."""
    held: list[Comparison] = []
    for row in rows:
        same = isinstance(row, Comparison) and held and row.prompt == held[0].prompt and len(held) < MOST
        if held and not same:
            yield _one(held)
            held = []
        if isinstance(row, Comparison):
            held.append(row)
        else:
            yield row
    if held:
        yield _one(held)


def _one(rows: list[Comparison]) -> Comparison:
    first = rows[0]
    if len(rows) == 1:
        return first
    scores = tuple(score for row in rows for score in row.scores or ())
    responses = tuple(response for row in rows for response in row.responses)
    extra: dict[str, object] = {name: [row.extra.get(name) for row in rows] for name in first.extra}
    return replace(first, responses=responses, scores=scores, tiers=tiers_of(scores), extra=extra)


class Source(Protocol):
    """Rows that can be read again and again, as :class:`prefopt.data.files.sources.Source`."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    @property
    def path(self) -> Path | None:
        """The file, where it is one."""

    def rows(self, *, keep_going: bool = False) -> Iterator[object]:
        """The rows from the first on, as JSON gives them; one that cannot be read may be a :class:`DataError`."""


class Reading:
    """The rows of one source as comparisons.

    Iterating gives one :class:`Comparison` or :class:`Problem` for each row, in order; each pass reads the source
    again. ``layout`` is the name of the rows' layout, ``count`` how many there are. ``notes`` says what was passed
    over, such as columns that nothing reads; keys inside of columns are added to it by the first full pass. ``lost``
    says which columns seem to hold responses and are not read, and what to type: preference methods refuse them.
    ``joined``: rows of one prompt that follow each other are one comparison, and counted as one.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        columns: ColumnMap,
        count: int,
        notes: Sequence[str],
        lost: str = "",
    ) -> None:
        self.file, self.layout, self.count = source.name, layout.name, count
        self.joined, self.lost = layout.joins, lost
        self.notes = [f"{self.file}: {note}" for note in notes]
        self._source, self._layout, self._columns = source, layout, columns
        self._said, self._rows = False, count
        if layout.joins:
            self.count = sum(1 for _ in joined(self._each()))
            what = "rows of one prompt that follow each other are compared"
            self.notes.append(f"{self.file}: {count} rows are {self.count} prompts: {what}")

    def __iter__(self) -> Iterator[Comparison | Problem]:
        yield from joined(self._each()) if self.joined else self._each()

    def _each(self) -> Iterator[Comparison | Problem]:
        number = 0
        for number, row in enumerate(_rows(self._source, self._columns), 1):
            yield self._parsed(row, number)
        if number != self._rows:
            raise DataError(f"had {self._rows} rows and now has {number}: it changed while it was read", file=self.file)
        if not self._said and (unread := self._columns.tags.unread):
            self.notes.append(f"{self.file}: keys inside of columns not read: {listed(sorted(unread))}")
        self._said = True

    def _parsed(self, row: object, number: int) -> Comparison | Problem:
        if isinstance(row, DataError):
            return Problem("unreadable", number, row.what, self.file)
        try:
            return self._layout.parse(row, number, self.file, self._columns)
        except BadRow as bad:
            return Problem(bad.kind, number, bad.what, self.file)

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


class _File:
    """One file of rows."""

    def __init__(self, path: str | Path) -> None:
        self.name, self.path = str(path), Path(path)

    def rows(self, *, keep_going: bool = False) -> Iterator[object]:
        return read_rows(self.path, keep_going=keep_going)


class _Headless:
    """Separated values whose first line is a row: columns are called by their places, from 1."""

    def __init__(self, source: Source, cells: bool) -> None:
        if source.path is None or not cells:
            raise ConfigError(f"--header none is about .csv and .tsv files, and {source.name} is none")
        self.name, self.path = source.name, source.path

    def rows(self, *, keep_going: bool = False) -> Iterator[object]:
        return read_rows(self.path, keep_going=keep_going, header=False)


class _Memory:
    """Rows in memory."""

    path = None

    def __init__(self, rows: Iterable[object], name: str) -> None:
        self.name = name
        self._rows = rows if isinstance(rows, Sequence) else list(rows)

    def rows(self, *, keep_going: bool = False) -> Iterator[object]:
        return iter(self._rows)


def read_comparisons(path: str | Path) -> Reading:
    """Read one file of rows; as :func:`open_comparisons`."""
    return open_comparisons(_File(path))


def parse_comparisons(
    rows: Iterable[object], file: str, *, format: str | None = None, columns: Sequence[str] | None = None
) -> Reading:
    """Comparisons from rows in memory; ``file`` names their origin in messages. As :func:`open_comparisons`."""
    return open_comparisons(_Memory(rows, file), format=format, columns=columns)


def open_comparisons(source: Source, *, format: str | None = None, columns: Sequence[str] | None = None) -> Reading:
    """The rows of a source as comparisons.

    Their layout is named by ``format``; or by a ``dataset_info.json`` beside the file that lists it; or recognised from
    all rows. ``columns`` (``NAME=COLUMN``) says what is called otherwise, and goes before what ``dataset_info.json``
    says.

    Raises :class:`DataError` where there is no row, no row has a known layout, layouts are mixed, or a column of
    ``columns`` is nowhere; :class:`ConfigError` for an unknown layout or NAME. A single bad row (a missing field, an
    unknown role) is a :class:`Problem` instead.
    """
    named = named_layout(format) if format is not None else None
    said = parse_column_options(columns)
    given = said.pairs
    entry = find_dataset_info(source.path) if named is None else None
    cells = source.path is not None and layout_name(source.path) in CSV_NAMES
    pairs, refused = ({**entry.pairs, **given}, entry.media) if entry else (given, ())
    if entry and (clash := shared_column(pairs)):
        who = "dataset_info.json beside it, with --columns," if given else "dataset_info.json beside it"
        raise DataError(f"{who} gives {clash} (entry {entry.name}); put it right", file=source.name)
    means = {**(entry.means if entry else {}), **said.means}
    understood = column_map(pairs, refused=refused, cells=cells, means=means, ignored=said.ignored)
    if said.headless:
        source = _Headless(source, cells)
    named = LAYOUTS[entry.layout] if entry else named
    rows = _rows(source, understood)
    found = recognise(rows, source.name, named, understood, asked=given, why=entry.note if entry else "")
    notes = [entry.note, *found.notes] if entry else found.notes
    return Reading(source, found.layout, understood, found.count, notes, found.lost)


def _rows(source: Source, columns: ColumnMap) -> Iterator[object]:
    """Rows, the empty cells of a table of text as null."""
    rows = source.rows(keep_going=True)
    if not columns.cells:
        return rows
    return ({k: None if v == "" else v for k, v in r.items()} if isinstance(r, dict) else r for r in rows)
