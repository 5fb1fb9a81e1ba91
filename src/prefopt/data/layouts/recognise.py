"""Recognise the layout of a file from all of its rows, and suggest options where no layout fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefopt.data.layouts import all_layouts
from prefopt.data.layouts.layout import PLAIN, SIDES, ColumnMap, Layout
from prefopt.data.layouts.values import look, type_name
from prefopt.errors import ConfigError, DataError

NAMED_COLUMNS = 20
MAX_SIGNATURES = 4096  # of rows (names and looks of columns) that are remembered; a file has a handful


@dataclass(frozen=True, slots=True)
class Recognised:
    """The layout of all rows, their number, and notes for the user; ``lost`` as in
    :class:`prefopt.data.comparisons.Reading`."""

    layout: Layout
    count: int
    notes: list[str]
    lost: str = ""


def recognise(
    rows: Iterable[object],
    file: str,
    named: Layout | None = None,
    columns: ColumnMap = PLAIN,
    *,
    asked: Mapping[str, str] | None = None,
    why: str = "",
) -> Recognised:
    """Find the layout of all rows. Raises :class:`DataError` as :func:`prefopt.data.comparisons.open_comparisons`.

    ``named`` is the layout if it is known, and ``why`` the reason; ``asked`` are ``--columns`` that must be present.

    A row has the first of :func:`all_layouts` whose fields it has. Rows of several layouts are refused as mixed, unless
    the rows of all others only lack fields of one: then they are rows of that one with a missing field.
    """
    survey = _Survey([named] if named else _candidates(columns), columns, fields_only=named is not None)
    survey.see(rows)
    if not survey.count:
        raise DataError("holds no rows", file=file)
    if named and (strange := [name for name in asked or () if name in columns.names and not named.field_of(name)]):
        known = ", ".join(dict.fromkeys([*named.fields, *named.optional, *named.aliases, *named.option_names]))
        raise ConfigError(f"--columns {strange[0]}: {named.name} rows have no such column; they have {known}")
    has = listed(list(survey.names)) or "none"
    for name, column in (asked or {}).items():
        if name in columns.names and column not in survey.names:
            raise DataError(f"no row has the column {column}, --columns {name}={column}; there are {has}", file=file)
    if named is None and {"parent_id", "role", "text"} <= survey.names.keys():
        what = "each row is one message of a tree (parent_id, role), not a prompt with its replies"
        raise DataError(f"{what}: use OpenAssistant's .trees.jsonl; --format raw-text reads plain text", file=file)
    if not survey.layouts:
        raise _unknown(survey, file, why)
    layout = _decide(survey, file)
    if gone := [name for name in columns.ignored if name not in survey.names]:
        raise DataError(f"no row has the column {gone[0]}, --ignore-columns {gone[0]}; there are {has}", file=file)
    unread = _unread(layout, survey.names, columns)
    notes = [f"columns not read: {listed(unread)}"] if unread else []
    return Recognised(layout, survey.count, [layout.note] * bool(layout.note) + notes, _lost(unread, survey.names))


class _Survey:
    """The number of rows of each layout and the first of them, the first row without a layout, and the columns with the
    look of their values."""

    def __init__(self, candidates: Sequence[Layout], columns: ColumnMap, *, fields_only: bool) -> None:
        self.candidates, self.columns, self.fields_only = candidates, columns, fields_only
        self.layouts = Counter[str]()
        self.first: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.odd: tuple[int, object] | None = None
        self.count = 0
        self._memo: dict[object, str | None] = {}

    def see(self, rows: Iterable[object]) -> None:
        for self.count, row in enumerate(rows, 1):
            found = self._layout(row) if isinstance(row, dict) else None
            if found is not None:
                self.layouts[found] += 1
                self.first.setdefault(found, self.count)
            elif self.odd is None:
                self.odd = (self.count, row)

    def _layout(self, row: Mapping[str, object]) -> str | None:
        signature = tuple((name, look(value)) for name, value in row.items() if value is not None)
        if signature not in self._memo:
            self.names.update({str(name): looks for name, looks in signature})
            if len(self._memo) >= MAX_SIGNATURES:
                self._memo.clear()
            fits = (x.name for x in self.candidates if x.fits(row, self.columns, fields_only=self.fields_only))
            self._memo[signature] = next(fits, None)
        return self._memo[signature]


def listed(names: Sequence[str]) -> str:
    """Names, comma-separated: at most the first 20, with their number. Unprintable ones are quoted."""
    more = f", ... ({len(names)} in all)" if len(names) > NAMED_COLUMNS else ""
    return ", ".join(name if name and name.isprintable() else repr(name) for name in names[:NAMED_COLUMNS]) + more


def _candidates(columns: ColumnMap) -> list[Layout]:
    """Layouts that know every name of ``--columns``; those with a field of that name come before others."""
    found = [x for x in all_layouts().values() if x.fields and all(x.field_of(name) for name in columns.names)]
    found.sort(key=lambda x: sum(name in x.option_names for name in columns.names))
    if not found:
        names = " and ".join(columns.names)
        raise ConfigError(f"--columns: no layout has {names} together; prefopt data layouts lists what each has")
    return found


def _decide(survey: _Survey, file: str) -> Layout:
    """The one layout of all rows."""
    named = {x.name: x for x in survey.candidates}
    found = [named[name] for name in survey.layouts]
    for layout in found:
        others = [x for x in found if x is not layout]
        if all(x.name in layout.accepts or set(x.fields) < set(layout.fields) for x in others):
            return layout
    parts = "; ".join(f"{name}: {n:,} from row {survey.first[name]}" for name, n in survey.layouts.items())
    raise DataError(f"mixes layouts ({parts}); give each a file of its own, or name one with --format", file=file)


def _lost(unread: Sequence[str], names: Mapping[str, str]) -> str:
    """A warning about columns that seem to hold responses and are not read, if there are any."""
    found = [name for name in _response_columns(names) if name in unread]
    if not found:
        return ""
    options = suggestion(names) or "--columns first=COLUMN second=COLUMN label=COLUMN, or another --format"
    seem = "seems to hold responses and is" if len(found) == 1 else "seem to hold responses and are"
    return f"{listed(found)} {seem} not read: {options}; or --ignore-columns {' '.join(found)}"


def _unread(layout: Layout, names: Mapping[str, str], columns: ColumnMap) -> list[str]:
    """The columns, with the looks of their values, that the layout does not read."""
    given = {layout.field_of(name): column for name, column in columns.names.items()}
    fields = {str(name): names[column] for name, column in given.items() if column in names}
    read = {*layout.known, *layout.aliases, *layout.own({**names, **fields}, columns)}
    rest = [name for name in names if name not in given.values() and name not in columns.ignored]
    return [name for name in rest if given.get(name) or name not in read]


def _unknown(survey: _Survey, file: str, why: str) -> DataError:
    """The error for rows without a layout, with the fields that the nearest layout needs."""
    assert survey.odd is not None
    number, row = survey.odd
    if isinstance(row, DataError):
        return row
    if not isinstance(row, dict):
        what = f"unknown layout: it is {type_name(row)}, not an object with named fields"
        return DataError(what, file=file, row=number)
    lacks = {x.name: [f for f in x.fields if x.column_of(f, row, survey.columns) is None] for x in survey.candidates}
    alone = len(survey.candidates) == 1
    some = [x for x in survey.candidates if lacks[x.name] and (alone or len(lacks[x.name]) < len(x.fields))]
    # Of several that lack as many, the one that knows most of the columns; of those the most general.
    near = min(reversed(some), key=lambda x: (len(lacks[x.name]), -len(x.known & row.keys())), default=None)
    typed = suggestion({str(name): look(value) for name, value in row.items() if value is not None})
    if typed and not all(side in row for side in SIDES):  # the fields of the nearest layout would mislead
        remedy = f"no column is known to hold the better response: {typed}"
        return DataError(f"unknown layout: row {number} has {listed([str(n) for n in row])}; {remedy}", file=file)
    hint = f"{near.name} needs {', '.join(lacks[near.name])} as well" if near else "prefopt data layouts lists them all"
    remedy = f"{why}; --format names another layout" if why else "--columns NAME=COLUMN names columns"
    columns = listed([str(name) for name in row]) or "no fields"
    what = f"unknown layout: no row has all fields of a known layout; row {number} has {columns}; {hint}; {remedy}"
    return DataError(what, file=file)


WORD = re.compile(r"[a-z]+|[A-Z][a-z]*")
RESPONSE_WORDS = frozenset(
    "response responses answer answers completion completions output outputs generation generations reply replies"
    " candidate candidates prediction predictions summary summaries chosen rejected preferred dispreferred"
    " better worse good bad pos neg positive negative winner loser".split()
)
# With one of these words, a column is about responses, or holds reference answers.
OTHER_WORDS = frozenset(
    "id ids model models source sources score scores rating ratings rank ranks url urls link links type types label"
    " labels lang language len length tokens token count num n hash time date created at by author name names policy"
    " category tag tags reason rationale rationales feedback critique explanation comment comments note notes quotes"
    " correct incorrect gold reference references expected ground truth final parsed extracted format finish is has"
    " metadata meta info prompt question system safe safety harm severity aspect key keys index start end list style"
    " best example examples processed original raw quality level status choice preference annotator worker"
    " subset domain constraint constraints aliases".split()
)
RESPONSE_LOOKS = ("text", "transcript", "texts", "messages", "replies", "message")
LABELS = "label labels winner choice preference verdict better preferred judgment judgement".split()
WORSE = frozenset("rejected dispreferred worse bad negative neg loser".split())


def _words(name: str) -> set[str]:
    return {word.lower() for word in WORD.findall(name)}


def _response_columns(columns: Mapping[str, str]) -> list[str]:
    """The columns that seem, by name and look, to hold responses. ``winner`` is one beside ``loser``, else a label."""
    labels = () if any(_words(name) & WORSE for name in columns) else LABELS
    found = [name for name, looks in columns.items() if looks in RESPONSE_LOOKS and name.lower() not in labels]
    return [name for name in found if _words(name) & RESPONSE_WORDS and not _words(name) & OTHER_WORDS]


def suggestion(columns: Mapping[str, str]) -> str:
    """Options that read two of these columns as responses, with a label; empty if no two seem to be responses."""
    found = _response_columns(columns)
    prompt = next((n for n in columns if n in ("prompt", "instruction", "question", "query", "input", "context")), "")
    if len(found) != 2:
        return ""
    best, worst = sorted(found, key=lambda name: bool(_words(name) & WORSE))
    if _words(worst) & WORSE and not _words(best) & WORSE:
        return f"--columns {f'prompt={prompt} ' * bool(prompt)}chosen={best} rejected={worst}"
    label = next((n for n in columns if n.lower() in LABELS or n.lower().startswith(("better", "prefer"))), "")
    numbers = columns.get(label) in ("number", "truth")  # text may name a response
    means = " --label-means 0=first,1=second,2=tie (or as in the file)" if numbers else ""
    words = f"prompt={prompt or 'COLUMN'} first={found[0]} second={found[1]} label={label or 'COLUMN'}"
    return f"--columns {words}{means}"
