"""Parse the rows of a source as comparisons: ``open_comparisons``, ``read_comparisons`` and ``parse_comparisons``.

A first pass over all rows recognises their layout (:data:`prefopt.data.layouts.LAYOUTS`) and counts them. Every later
pass reads them again, so memory does not grow with the file.

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

from prefopt.data.files.content import CSV_NAMES
from prefopt.data.files.sources import FileOrigin, MemoryOrigin, Source
from prefopt.data.layouts import LAYOUTS, named_layout
from prefopt.data.layouts.columns import column_map, find_dataset_info, parse_column_options, shared_column
from prefopt.data.layouts.layout import ColumnMap, Layout
from prefopt.data.layouts.recognise import listed, recognise
from prefopt.data.layouts.values import BadRow
from prefopt.data.validate import Problem
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison, tiers_of

# Rows of one prompt that become one comparison, at most; it bounds the memory.
MAX_JOINED_ROWS = 64


class Reading:
    """The rows of one source as comparisons.

    Iterating gives a :class:`Comparison` or :class:`Problem` for each row, in order; each pass reads the source again.
    ``layout`` is the name of the layout, ``count`` the number of rows. ``notes`` names what is not read, such as
    unknown columns; the first full pass adds unknown keys inside columns. ``lost`` describes unread columns that seem
    to hold responses, with the remedy: preference methods refuse them. ``joined``: consecutive rows of one prompt are
    one comparison, and counted as one.
    """

    def __init__(
        self, source: Source, layout: Layout, columns: ColumnMap, count: int, notes: Sequence[str], lost: str = ""
    ) -> None:
        self.file, self.layout, self.count = source.name, layout.name, count
        self.joined, self.lost = layout.joins, lost
        self.notes = [f"{self.file}: {note}" for note in notes]
        self._source, self._layout, self._columns = source, layout, columns
        self._unread_noted, self._rows = False, count
        if layout.joins:
            self.count = sum(1 for _ in self)
            what = "rows of one prompt that follow each other are compared"
            self.notes.append(f"{self.file}: {count} rows are {self.count} prompts: {what}")

    def __iter__(self) -> Iterator[Comparison | Problem]:
        return _join_prompts(self._each()) if self.joined else self._each()

    def _each(self) -> Iterator[Comparison | Problem]:
        number = 0
        for number, row in enumerate(_rows(self._source, self._columns), 1):
            yield self._parsed(row, number)
        if number != self._rows:
            raise DataError(f"had {self._rows} rows and now has {number}: it changed while it was read", file=self.file)
        if not self._unread_noted and (unread := self._columns.tags.unread):
            self.notes.append(f"{self.file}: keys inside of columns not read: {listed(sorted(unread))}")
        self._unread_noted = True

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
        """All problems, held in memory."""
        return [p for p in self._all if isinstance(p, Problem)]


def read_comparisons(path: str | Path) -> Reading:
    """The rows of one file; see :func:`open_comparisons`."""
    return open_comparisons(Source(str(path), Path(path), FileOrigin(Path(path))))


def parse_comparisons(
    rows: Iterable[object], file: str, *, format: str | None = None, columns: Sequence[str] | None = None
) -> Reading:
    """Rows in memory; ``file`` is their name in messages. See :func:`open_comparisons`."""
    held = rows if isinstance(rows, Sequence) else list(rows)
    return open_comparisons(Source(file, None, MemoryOrigin(held)), format=format, columns=columns)


def open_comparisons(source: Source, *, format: str | None = None, columns: Sequence[str] | None = None) -> Reading:
    """The rows of a source as comparisons.

    The layout is the one named by ``format``; or by a ``dataset_info.json`` beside the file that lists it; or it is
    recognised from all rows. ``columns`` (``NAME=COLUMN``) renames columns and has precedence over
    ``dataset_info.json``.

    Raises :class:`DataError` where there is no row, no row has a known layout, layouts are mixed, or a column of
    ``columns`` does not exist; :class:`ConfigError` for an unknown layout or NAME. A bad row (a missing field, an
    unknown role) is a :class:`Problem` instead.
    """
    named = named_layout(format) if format is not None else None
    said = parse_column_options(columns)
    given = said.pairs
    entry = find_dataset_info(source.path) if named is None else None
    cells = source.suffix in CSV_NAMES
    pairs, refused = ({**entry.pairs, **given}, entry.media) if entry else (given, ())
    if entry and (clash := shared_column(pairs)):
        who = "dataset_info.json beside it, with --columns," if given else "dataset_info.json beside it"
        raise DataError(f"{who} gives {clash} (entry {entry.name}); put it right", file=source.name)
    means = {**(entry.means if entry else {}), **said.means}
    understood = column_map(pairs, refused=refused, cells=cells, means=means, ignored=said.ignored)
    if said.headless:
        if source.path is None or not cells:
            raise ConfigError(f"--header none is about .csv and .tsv files, and {source.name} is none")
        source = replace(source, origin=FileOrigin(source.path, header=False))
    named = LAYOUTS[entry.layout] if entry else named
    rows = _rows(source, understood)
    found = recognise(rows, source.name, named, understood, asked=given, why=entry.note if entry else "")
    notes = [entry.note, *found.notes] if entry else found.notes
    return Reading(source, found.layout, understood, found.count, notes, found.lost)


def _rows(source: Source, columns: ColumnMap) -> Iterator[object]:
    """Rows; empty cells of separated values are null."""
    rows = source.rows(keep_going=True)
    if not columns.cells:
        return rows
    return ({k: None if v == "" else v for k, v in r.items()} if isinstance(r, dict) else r for r in rows)


def _join_prompts(rows: Iterable[Comparison | Problem]) -> Iterator[Comparison | Problem]:
    """One comparison for consecutive rows of one prompt, with the number of the first row."""
    held: list[Comparison] = []
    for row in rows:
        same = isinstance(row, Comparison) and held and row.prompt == held[0].prompt and len(held) < MAX_JOINED_ROWS
        if held and not same:
            yield _joined(held)
            held = []
        if isinstance(row, Comparison):
            held.append(row)
        else:
            yield row
    if held:
        yield _joined(held)


def _joined(rows: list[Comparison]) -> Comparison:
    first = rows[0]
    if len(rows) == 1:
        return first
    scores = tuple(score for row in rows for score in row.scores or ())
    responses = tuple(response for row in rows for response in row.responses)
    extra: dict[str, object] = {name: [row.extra.get(name) for row in rows] for name in first.extra}
    return replace(first, responses=responses, scores=scores, tiers=tiers_of(scores), extra=extra)
