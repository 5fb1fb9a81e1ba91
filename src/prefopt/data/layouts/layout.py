"""What a layout is: how its rows are recognised, read into a :class:`Comparison`, and written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from prefopt.data.layouts.messages import TAGS, Tags
from prefopt.data.layouts.pictures import pictures_of_column, with_pictures
from prefopt.data.layouts.row import RowReader
from prefopt.data.layouts.values import SCORES, BadRow, look, scored_sides, type_name
from prefopt.data.validate import DataKind
from prefopt.errors import DataError
from prefopt.records import Comparison, Message, Response


class CannotHold(Exception):
    """A layout has no column for something in a comparison, which the message names."""


def pair_of(c: Comparison) -> tuple[Response, Response]:
    """Chosen and rejected. Raises :class:`CannotHold` unless there are two responses and one is preferred."""
    if len(c.responses) != 2:
        raise CannotHold(f"{len(c.responses)} responses: it has a chosen and a rejected one")
    if len(c.tiers) < 2 and c.scores is None:
        raise CannotHold("two responses of which none is preferred")
    return c.responses[0], c.responses[1]


def response_of(c: Comparison) -> Response:
    """The only response, or :class:`CannotHold`."""
    if len(c.responses) != 1:
        raise CannotHold(f"{len(c.responses)} responses: it has one")
    return c.responses[0]


def plain_text(turns: tuple[Message, ...]) -> str:
    return "".join(m.content for m in turns)


def score_columns(c: Comparison) -> dict[str, object]:
    return {} if c.scores is None else dict(zip(SCORES, c.scores, strict=True))


# Messages for example rows.
QUESTION = "What is 2 + 2?"
USER = {"role": "user", "content": QUESTION}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "22"}
SIDES = ("chosen", "rejected")
# Columns that change what a model sees: a row without them would train on something else, so they are refused.
NOT_READ = ("images", "videos", "audios", "image", "video", "audio", "functions")
PICTURES = "images"
"""The column with pictures: one, or a list of them."""


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Names of columns (``{"prompt": "question"}``), and the keys and roles of messages.

    ``refused`` are further columns that are refused, such as images. ``cells``: the rows come from a table of text,
    where booleans and numbers are text. ``means`` is the meaning of labels (``--label-means``), ``ignored`` are columns
    that are not read on purpose (``--ignore-columns``).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    tags: Tags = TAGS
    refused: tuple[str, ...] = ()
    cells: bool = False
    means: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


PLAIN = ColumnMap()


def always(_: Mapping[str, object]) -> bool:
    return True


def with_columns(row: dict[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    """A row with further columns. Raises :class:`CannotHold` if one has the name of a field."""
    if taken := [name for name in extra if name in row]:
        raise CannotHold(f"a further column {taken[0]}, a name it needs for itself")
    return {**row, **extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout of rows.

    ``fields`` must be present (null counts as absent), ``optional`` ones may be; by default the fields are the columns
    of the ``example`` that are not optional. ``kind`` is what a row can be used for, ``description`` what it holds,
    ``origin`` who writes such rows, ``example`` a row. ``reader`` makes the comparison; ``writer`` makes the row's
    fields, and a layout without one is only read.

    ``matches`` tells layouts with the same fields apart: it is given a row with all fields and looks at their values.
    ``accepts`` names other layouts whose rows are valid here too. ``aliases`` are other column names of a field;
    ``option_names`` are its names in ``--columns`` only, such as LLaMA-Factory's. ``own_columns`` finds columns without
    a fixed name, given the :func:`look` of every column (``cell`` for text in a table of text); by default, scores of a
    pair under other names. ``add_columns`` adds the unread columns to a written row. ``verbatim`` keeps JSON text as
    it is. ``note`` is shown to the user. ``joins``: consecutive rows with one prompt are one comparison. Every layout
    but those of plain text may have :data:`PICTURES`.
    """

    name: str
    kind: DataKind
    description: str
    origin: str
    example: Mapping[str, object]
    reader: Callable[[RowReader], Comparison]
    writer: Callable[[Comparison], dict[str, object]] | None = None
    fields: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    matches: Callable[[Mapping[str, object]], bool] = always
    accepts: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    option_names: Mapping[str, str] = field(default_factory=dict)
    own_columns: Callable[[Mapping[str, str]], Collection[str]] | None = None
    add_columns: Callable[[dict[str, object], Mapping[str, object]], dict[str, object]] = with_columns
    verbatim: bool = False
    note: str = ""
    joins: bool = False
    known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        fields = self.fields or tuple(name for name in self.example if name not in self.optional)
        object.__setattr__(self, "fields", fields)
        if not self.name.endswith("-text"):
            object.__setattr__(self, "optional", (*self.optional, PICTURES))
            object.__setattr__(self, "aliases", {**self.aliases, "image": PICTURES})
        object.__setattr__(self, "known", frozenset((*fields, *self.optional)))
        if self.own_columns is None and set(SCORES) <= self.known:
            object.__setattr__(self, "own_columns", scored_sides)

    def field_of(self, name: str) -> str | None:
        return name if name in self.known else self.aliases.get(name) or self.option_names.get(name)

    def column_of(self, name: str, row: Mapping[str, object], columns: ColumnMap = PLAIN) -> str | None:
        """The column of a row that holds a field, or None if it is absent."""
        for given, column in columns.names.items():
            if self.field_of(given) == name:
                return column if row.get(column) is not None else None
        # A column that --columns gives to another field is not read under its own name.
        taken = {column for given, column in columns.names.items() if self.field_of(given) is not None}
        taken.update(columns.ignored)
        own = (name, *(a for a, of in self.aliases.items() if of == name))
        return next((c for c in own if c not in taken and row.get(c) is not None), None)

    def own(self, looks: Mapping[str, str], columns: ColumnMap = PLAIN) -> Collection[str]:
        """The columns that :attr:`own_columns` finds among ``looks``, those that are ignored left out."""
        if self.own_columns is None:
            return ()
        text = "cell" if columns.cells else "text"
        left = {name: text if seen == "text" else seen for name, seen in looks.items() if name not in columns.ignored}
        return self.own_columns(left)

    def fits(self, row: Mapping[str, object], columns: ColumnMap = PLAIN, *, fields_only: bool = False) -> bool:
        """Whether a row has the fields and, unless ``fields_only``, :attr:`matches` too."""
        if any(self.column_of(name, row, columns) is None for name in self.fields):
            return False
        named = self._named(row, columns)
        sides = (side for side in SIDES if side not in self.known and side not in columns.ignored)
        return fields_only or (all(named.get(side) is None for side in sides) and self.matches(named))

    def parse(self, row: object, number: int, file: str, columns: ColumnMap = PLAIN) -> Comparison:
        """The comparison in row ``number`` (from 1) of a file. Raises :class:`BadRow` if it cannot be read."""
        if not isinstance(row, dict):
            raise BadRow("not an object", f"is {type_name(row)}, not an object with named fields")
        values = self._named(row, columns)
        if missing := [name for name in self.fields if values.get(name) is None]:
            raise BadRow("missing field", f"lacks {', '.join(missing)}")
        own = self.own({str(k): look(v) for k, v in values.items()}, columns) if self.own_columns is not None else ()
        for name in (*NOT_READ, *columns.refused, "tools"):
            if values.get(name) and name not in own and (name not in ("tools", PICTURES) or name not in self.known):
                raise BadRow("field that cannot be used", f"has {name}, which {self.name} rows cannot have")
        extra = {str(k): v for k, v in values.items() if k not in self.known and k not in own}
        if columns.ignored:
            values = {k: v for k, v in values.items() if k not in columns.ignored}
        tags = columns.tags.exactly(self.verbatim)
        try:
            sides = [columns.names.get(name, name) for name in ("first", "second")]
            c = self.reader(RowReader(values, number, file, tags, extra, columns.cells, columns.means, sides, own))
            column = values.get(PICTURES) if PICTURES in self.known else None
            given = pictures_of_column(column, tags.folder) if column else []
            return with_pictures(c, given) if given or c.pictures else c
        except RecursionError:
            raise BadRow("wrong type", "is nested too deeply") from None

    def write(self, comparison: Comparison) -> dict[str, object]:
        """The row of a comparison, further columns included.

        It is read again and compared, so that nothing is lost. Raises :class:`DataError` with the row and the reason
        if the layout cannot hold all of the comparison.
        """
        c = self.arranged(comparison)
        try:
            if self.writer is None:
                raise CannotHold("anything: it is read, not written")
            row = self.add_columns(self.writer(c), c.extra)
            again = self.parse(row, c.row, c.file)
            if again != c or again.extra != c.extra:
                raise CannotHold(_difference(c, again))
            if not self.fits(row):
                raise CannotHold("it so that it is recognised")
            return row
        except CannotHold as error:
            reason = str(error)
        except BadRow as bad:
            reason = f"it so that it can be read again ({bad.what})"
        what = f"cannot be written as {self.name}, which cannot hold {reason}"
        raise DataError(what, file=c.file or None, row=c.row)

    def arranged(self, c: Comparison) -> Comparison:
        """The comparison as it is read again: pairs are written with the preferred response first."""
        if self.kind != "pairs" or c.tiers != ((1,), (0,)) or c.labels is not None or c.votes is not None:
            return c
        return replace(c, responses=c.responses[::-1], tiers=((0,), (1,)), scores=c.scores and c.scores[::-1])

    def _named(self, row: Mapping[str, object], columns: ColumnMap) -> Mapping[str, object]:
        if not columns.names and not columns.ignored and not (self.aliases and any(a in row for a in self.aliases)):
            return row
        found = {name: self.column_of(name, row, columns) for name in (*self.fields, *self.optional)}
        used = {column for column in found.values() if column is not None}
        values = {column: value for column, value in row.items() if column not in used and column not in found}
        values |= {name: row[column] for name, column in found.items() if column is not None}
        return values


pair_layout = partial(Layout, kind="pairs")
ranking_layout = partial(Layout, kind="ranking")


def _difference(c: Comparison, again: Comparison) -> str:
    """What of a comparison was lost or changed."""
    what = {
        "plain text" if c.text else "turns": c.text != again.text,
        "responses that were cut off": [r.cut for r in c.responses] != [r.cut for r in again.responses],
        "where its prompt ends and its responses begin": c.prompt != again.prompt or c.responses != again.responses,
        "its scores": c.scores != again.scores,
        "its labels": c.labels != again.labels,
        "its votes": c.votes != again.votes,
        "its order with its ties": c.tiers != again.tiers,
        "its tools": c.tools != again.tools,
        "its other columns": True,
    }
    return next(name for name, differs in what.items() if differs)
