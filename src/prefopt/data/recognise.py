"""Which layout the rows of a file have: told from all of them, never from the first alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prefopt.config.option import nearest
from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.layout import PLAIN, Columns, Layout
from prefopt.data.layouts.shapes import look
from prefopt.data.layouts.values import kind
from prefopt.data.problem import NAMED_ROWS
from prefopt.errors import ConfigError, DataError

# Kinds of rows (names and looks of their columns) that are remembered; a file has a handful.
REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Recognised:
    """The layout of all rows, how many rows there are, and what a person should know of them."""

    layout: Layout
    count: int
    notes: list[str]


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
        raise ConfigError(f"--format {name!r} is no layout{guess}")
    return LAYOUTS[plain]


def recognise(rows: Iterable[object], file: str, named: Layout | None = None, columns: Columns = PLAIN) -> Recognised:
    """Look at every row. Raises :class:`DataError` as :func:`prefopt.data.formats.open_comparisons` says.

    The layout of a row is the first in :data:`LAYOUTS` whose fields it has. Rows of several layouts are mixed, unless
    those of all others only lack fields of one: then they are rows of that one with a field missing.
    """
    candidates, any_shape = ([named], True) if named else (_candidates(columns), False)
    layouts: dict[str, _Seen] = {}
    odd: tuple[int, object] | None = None
    names: dict[str, None] = {}
    memo: dict[object, str | None] = {}
    number = 0
    for number, row in enumerate(rows, 1):
        found = None
        if isinstance(row, dict):
            signature = tuple((name, look(value)) for name, value in row.items() if value is not None)
            if signature not in memo:
                names.update({str(name): None for name, _ in signature})
                if len(memo) >= REMEMBERED:
                    memo.clear()
                memo[signature] = next((x.name for x in candidates if x.fits(row, columns, any_shape=any_shape)), None)
            found = memo[signature]
        if found is not None:
            layouts.setdefault(found, _Seen()).add(number)
        elif odd is None:
            odd = (number, row)
    if not number:
        raise DataError("holds no rows", file=file)
    for name, column in columns.names.items():
        if column not in names:
            raise DataError(f"no row has the column {column} of --columns {name}={column}; {_has(names)}", file=file)
    layout = _decide(layouts, file)
    if layout is None:
        assert odd is not None
        raise _unknown(*odd, names, file, candidates, columns)
    return Recognised(layout, number, _notes(layout, list(names), columns))


def _candidates(columns: Columns) -> list[Layout]:
    """Layouts that know every name of ``--columns``."""
    found = [x for x in LAYOUTS.values() if all(x.field_of(name) for name in columns.names)]
    if not found:
        raise ConfigError(f"--columns: no layout has {', '.join(columns.names)} together; see docs/formats.md")
    return found


def _decide(layouts: dict[str, _Seen], file: str) -> Layout | None:
    """The one layout of all rows; None where no row has any."""
    if not layouts:
        return None
    for layout in (LAYOUTS[name] for name in layouts):
        others = [LAYOUTS[name] for name in layouts if name != layout.name]
        if all(x.name in layout.also or set(x.fields) < set(layout.fields) for x in others):
            return layout
    parts = "; ".join(f"{name}: {seen}" for name, seen in sorted(layouts.items(), key=lambda item: item[1].first))
    raise DataError(f"mixes layouts ({parts}); give each a file of its own, or name one with --format", file=file)


def _notes(layout: Layout, names: Sequence[str], columns: Columns) -> list[str]:
    read = {*layout.known, *layout.aliases} - {layout.field_of(name) for name in columns.names}
    unread = [name for name in names if name not in read and name not in columns.names.values()]
    unread = [name for name in unread if not (layout.reads and layout.reads(name))]
    return [f"columns not read: {', '.join(unread)}"] if unread else []


def _has(names: Iterable[str]) -> str:
    return f"columns are {', '.join(names) or 'none'}"


def _unknown(
    number: int, row: object, names: Iterable[str], file: str, candidates: Sequence[Layout], columns: Columns
) -> DataError:
    """The error for rows of no layout, with what the nearest one lacks."""
    if not isinstance(row, dict):
        return DataError(f"unknown layout: it is {kind(row)}, not an object with named fields", file=file, row=number)
    lacks = {x.name: [f for f in x.fields if x.column_of(f, row, columns) is None] for x in candidates}
    some = candidates[:1] if len(candidates) == 1 else [x for x in candidates if len(lacks[x.name]) < len(x.fields)]
    near = min(some, key=lambda x: len(lacks[x.name]), default=None)
    hint = f"{near.name} needs {', '.join(lacks[near.name])} as well" if near and lacks[near.name] else ""
    hint = hint or "prefopt data layouts lists what is known"
    what = f"unknown layout: no row has all fields of one; row {number} has {', '.join(map(str, row)) or 'no fields'}"
    return DataError(f"{what}; {hint}, and --columns NAME=COLUMN names columns", file=file)
