"""Which layout the rows of a file have: told from all of them, never from the first alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from prefopt.core.options import nearest
from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.columns import responses_among, single_messages, suggestion
from prefopt.data.layouts.layout import PLAIN, SIDES, Columns, Layout
from prefopt.data.layouts.shapes import look
from prefopt.data.layouts.values import kind
from prefopt.data.validate import NAMED_ROWS
from prefopt.errors import ConfigError, DataError

NAMED_COLUMNS = 20
NONE: Mapping[str, str] = MappingProxyType({})
# Kinds of rows (names and looks of their columns) that are remembered; a file has a handful.
REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Recognised:
    """The layout of all rows, how many rows there are, and what a person should know of them; ``lost`` as in
    :class:`prefopt.data.comparisons.Reading`."""

    layout: Layout
    count: int
    notes: list[str]
    lost: str = ""


@dataclass(slots=True)
class _Seen:
    """Rows of one layout: how many, and the first of them."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < NAMED_ROWS:
            self.first.append(number)

    def __str__(self) -> str:
        rows = f"row{'s' * (self.count > 1)} {', '.join(map(str, self.first))}"
        return rows + (f", ..., {self.count} in all" if self.count > len(self.first) else "")


def named_layout(name: str) -> Layout:
    """The layout of ``--format``; dashes, spaces and underscores are one. Raises :class:`ConfigError`."""
    plain = "-".join(name.replace("_", " ").replace("-", " ").split()).lower()
    if plain not in LAYOUTS:
        known = list(LAYOUTS)
        guess = nearest(plain, known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"{name!r} is no layout{guess}")
    return LAYOUTS[plain]


def recognise(
    rows: Iterable[object],
    file: str,
    named: Layout | None = None,
    columns: Columns = PLAIN,
    *,
    asked: Mapping[str, str] = NONE,
    why: str = "",
) -> Recognised:
    """Look at every row. Raises :class:`DataError` as :func:`prefopt.data.comparisons.open_comparisons` says.

    ``named`` is the layout where it is known, and ``why`` says how; ``asked`` are ``--columns`` that must be there.

    The layout of a row is the first in :data:`LAYOUTS` whose fields it has. Rows of several layouts are mixed, unless
    those of all others only lack fields of one: then they are rows of that one with a field missing.
    """
    survey = _Survey([named] if named else _candidates(columns), columns, any_shape=named is not None)
    for row in rows:
        survey.see(row)
    if not survey.count:
        raise DataError("holds no rows", file=file)
    if named and (strange := [name for name in asked if name in columns.names and not named.field_of(name)]):
        known = ", ".join(dict.fromkeys([*named.fields, *named.optional, *named.aliases, *named.words]))
        raise ConfigError(f"--columns {strange[0]}: {named.name} rows have no such column; they have {known}")
    for name, column in asked.items():
        if name in columns.names and column not in survey.names:
            has = listed(list(survey.names)) or "none"
            raise DataError(f"no row has the column {column}, --columns {name}={column}; there are {has}", file=file)
    if named is None and (said := single_messages(survey.names)):
        raise DataError(f"{said}; --format raw-text learns each as plain text", file=file)
    layout = _decide(survey.layouts, file)
    if layout is None:
        raise _unknown(survey, file, why)
    if gone := [name for name in columns.ignored if name not in survey.names]:
        has = listed(list(survey.names)) or "none"
        raise DataError(f"no row has the column {gone[0]}, --ignore-columns {gone[0]}; there are {has}", file=file)
    unread = _unread(layout, survey.names, columns)
    notes = [f"columns not read: {listed(unread)}"] if unread else []
    return Recognised(layout, survey.count, [layout.note] * bool(layout.note) + notes, _lost(unread, survey.names))


class _Survey:
    """What was seen of the rows: ``layouts``, the first row of none, and the columns with the look of their values."""

    def __init__(self, candidates: Sequence[Layout], columns: Columns, *, any_shape: bool) -> None:
        self.candidates, self.columns, self.any_shape = candidates, columns, any_shape
        self.layouts: dict[str, _Seen] = {}
        self.names: dict[str, str] = {}
        self.odd: tuple[int, object] | None = None
        self.count = 0
        self._memo: dict[object, str | None] = {}

    @property
    def alone(self) -> bool:
        """Whether there is one layout that the rows may have."""
        return len(self.candidates) == 1

    def see(self, row: object) -> None:
        """Count one row."""
        self.count += 1
        found = self._layout(row) if isinstance(row, dict) else None
        if found is not None:
            self.layouts.setdefault(found, _Seen()).add(self.count)
        elif self.odd is None:
            self.odd = (self.count, row)

    def _layout(self, row: Mapping[str, object]) -> str | None:
        signature = tuple((name, look(value)) for name, value in row.items() if value is not None)
        if signature not in self._memo:
            self.names.update({str(name): looks for name, looks in signature})
            if len(self._memo) >= REMEMBERED:
                self._memo.clear()
            fits = (x.name for x in self.candidates if x.fits(row, self.columns, any_shape=self.any_shape))
            self._memo[signature] = next(fits, None)
        return self._memo[signature]


def listed(names: Sequence[str]) -> str:
    """Names in a row; of very many the first, and how many there are. One that would break the line is quoted."""
    more = f", ... ({len(names)} in all)" if len(names) > NAMED_COLUMNS else ""
    return ", ".join(name if name and name.isprintable() else repr(name) for name in names[:NAMED_COLUMNS]) + more


def _candidates(columns: Columns) -> list[Layout]:
    """Layouts that know every name of ``--columns``; those that call a column so themselves go before others."""
    found = [x for x in LAYOUTS.values() if all(x.field_of(name) for name in columns.names)]
    found.sort(key=lambda x: sum(name in x.words for name in columns.names))
    if not found:
        names = " and ".join(columns.names)
        raise ConfigError(f"--columns: no layout has {names} together; prefopt data layouts lists what each has")
    return found


def _decide(layouts: Mapping[str, _Seen], file: str) -> Layout | None:
    """The one layout of all rows; None where no row has any."""
    if not layouts:
        return None
    for layout in (LAYOUTS[name] for name in layouts):
        others = [LAYOUTS[name] for name in layouts if name != layout.name]
        if all(x.name in layout.also or set(x.fields) < set(layout.fields) for x in others):
            return layout
    parts = "; ".join(f"{name}: {seen}" for name, seen in sorted(layouts.items(), key=lambda item: item[1].first))
    raise DataError(f"mixes layouts ({parts}); give each a file of its own, or name one with --format", file=file)


def _lost(unread: Sequence[str], names: Mapping[str, str]) -> str:
    """What is said of columns that seem to hold responses and are not read, or nothing."""
    found = [name for name in responses_among(names) if name in unread]
    if not found:
        return ""
    typed = suggestion(names) or "--columns first=COLUMN second=COLUMN label=COLUMN, or another --format"
    ignore = f"--ignore-columns {' '.join(found)}"
    seem = "seems to hold responses and is" if len(found) == 1 else "seem to hold responses and are"
    return f"{listed(found)} {seem} not read: {typed}; or {ignore}"


def _unread(layout: Layout, names: Mapping[str, str], columns: Columns) -> list[str]:
    meant = {layout.field_of(name): column for name, column in columns.names.items()}
    fields = {str(name): names[column] for name, column in meant.items() if column in names}
    read = {*layout.known, *layout.aliases, *layout.own({**names, **fields}, columns)}
    return [
        name
        for name in names
        if name not in meant.values() and name not in columns.ignored and (meant.get(name) or name not in read)
    ]


def _unknown(survey: _Survey, file: str, why: str) -> DataError:
    """The error for rows of no layout, with what the nearest one lacks."""
    assert survey.odd is not None
    number, row = survey.odd
    if isinstance(row, DataError):
        return row
    if not isinstance(row, dict):
        return DataError(f"unknown layout: it is {kind(row)}, not an object with named fields", file=file, row=number)
    lacks = {x.name: [f for f in x.fields if x.column_of(f, row, survey.columns) is None] for x in survey.candidates}
    some = [
        x
        for x in survey.candidates
        if lacks[x.name] and (survey.alone or x.written) and (survey.alone or len(lacks[x.name]) < len(x.fields))
    ]
    # Of several that lack as much, the one that knows most of the columns; of those the least particular.
    near = min(reversed(some), key=lambda x: (len(lacks[x.name]), -len(x.known & row.keys())), default=None)
    typed = suggestion({str(name): look(value) for name, value in row.items() if value is not None})
    if typed and not all(side in row for side in SIDES):  # what the nearest layout lacks would mislead
        remedy = f"which response is better is not said in words known here: {typed}"
        return DataError(f"unknown layout: row {number} has {listed([str(n) for n in row])}; {remedy}", file=file)
    hint = f"{near.name} needs {', '.join(lacks[near.name])} as well" if near else "prefopt data layouts lists them all"
    remedy = f"{why}; --format names another layout" if why else "--columns NAME=COLUMN names columns"
    columns = listed([str(name) for name in row]) or "no fields"
    what = f"unknown layout: no row has all fields of one; row {number} has {columns}; {hint}; {remedy}"
    return DataError(what, file=file)
