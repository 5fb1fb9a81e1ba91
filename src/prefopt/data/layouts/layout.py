"""What a layout is: how a row of it is told, read into a :class:`Comparison`, and written again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from prefopt.data.layouts.messages import TAGS, Tags
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, always, look
from prefopt.data.layouts.values import BadRow, kind
from prefopt.data.validate import DataKind
from prefopt.errors import DataError
from prefopt.records import Comparison, Message, Response


class CannotHold(Exception):
    """A layout has no place for something that a comparison says; the message says for what."""


def need_chat(c: Comparison) -> None:
    """Refuse the plain text of a base model."""
    if c.text:
        raise CannotHold("plain text: it has turns")


def need_text(c: Comparison) -> None:
    """Refuse a conversation."""
    if not c.text:
        raise CannotHold("turns: it has plain text")


def need_pair(c: Comparison) -> tuple[Response, Response]:
    """Chosen and rejected. Refuses whatever is not one response preferred to another, or as good by its scores."""
    if len(c.responses) != 2:
        raise CannotHold(f"{len(c.responses)} responses: it has a chosen and a rejected one")
    for name, value in (("labels", c.labels), ("votes", c.votes)):
        if value is not None:
            raise CannotHold(name)
    tied = c.scores is not None and c.scores[0] == c.scores[1]
    if c.tiers != (((0, 1),) if tied else ((0,), (1,))):
        raise CannotHold("two responses of which none is preferred")
    return c.responses[0], c.responses[1]


def need_demonstration(c: Comparison) -> Response:
    """The one response. Refuses several, and whatever was said of it."""
    if len(c.responses) != 1:
        raise CannotHold(f"{len(c.responses)} responses: it has one")
    need_no_preference(c)
    return c.responses[0]


def need_label(c: Comparison) -> tuple[Response, bool]:
    """The one response and its label."""
    if len(c.responses) != 1 or c.labels is None:
        raise CannotHold(f"{len(c.responses)} responses, or none with a label: it has one with a label")
    need_no_preference(replace(c, labels=None))
    return c.responses[0], c.labels[0]


def need_no_preference(c: Comparison) -> None:
    """Refuse tiers, scores, labels and votes."""
    for name, value in (("an order", c.tiers or None), ("scores", c.scores), ("labels", c.labels), ("votes", c.votes)):
        if value is not None:
            raise CannotHold(name)


def need_user(c: Comparison) -> str:
    """The words of a prompt that is one turn of the user."""
    need_chat(c)
    if len(c.prompt) != 1 or c.prompt[0].role != "user":
        raise CannotHold("a prompt of more than one turn of the user")
    return c.prompt[0].content


def need_one_turn(response: Response) -> str:
    """The words of a response that is one turn of the assistant."""
    if len(response.messages) != 1 or response.messages[0].role != "assistant":
        raise CannotHold("responses of several turns")
    return response.messages[0].content


def words(turns: tuple[Message, ...]) -> str:
    """The words of a prompt or response of plain text."""
    return "".join(m.content for m in turns)


def score_columns(c: Comparison) -> dict[str, object]:
    """The columns :data:`SCORES`, or none where there are no scores."""
    return {} if c.scores is None else dict(zip(SCORES, c.scores, strict=True))


def best_first(c: Comparison) -> Comparison:
    """A pair with the preferred response first, which says the same."""
    if c.tiers != ((1,), (0,)) or len(c.responses) != 2 or c.labels is not None or c.votes is not None:
        return c
    scores = None if c.scores is None else (c.scores[1], c.scores[0])
    return replace(c, responses=(c.responses[1], c.responses[0]), tiers=((0,), (1,)), scores=scores)


# No row that has these is anything but a pair.
SIDES = ("chosen", "rejected")
# What changes the text that a model sees, so that leaving it out would train on something else.
NOT_READ = ("images", "videos", "audios", "image", "video", "audio", "functions")


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns by another name (``{"prompt": "question"}``), and the keys and roles of messages.

    ``refused`` are further columns that a row may not use, such as pictures. ``cells``: the rows are those of a table
    of text, where true, false and numbers are written out. ``means`` says what labels mean (``--label-means``), and
    ``ignored`` are columns that are not read on purpose, whatever the layout knows them as.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    tags: Tags = TAGS
    refused: tuple[str, ...] = ()
    cells: bool = False
    means: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


PLAIN = Columns()


def _as_it_is(c: Comparison) -> Comparison:
    return c


def _read_only(_: Comparison) -> dict[str, object]:
    raise CannotHold("what it was read from: it is read, not written; --layout canonical holds everything")


def with_columns(row: dict[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    """A row and its further columns; raises :class:`CannotHold` where one has the name of a field."""
    if taken := [name for name in extra if name in row]:
        raise CannotHold(f"a further column {taken[0]}, a name it needs for itself")
    return {**row, **extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout of rows.

    ``fields`` must be there (null counts as absent), ``optional`` may be. ``shape`` is given a row that has the fields
    and says whether it looks like this layout, where several have the same fields; ``also`` names layouts whose rows
    this one reads too. ``aliases`` are other names of a field that are read as well; ``words`` are names that only
    ``--columns`` knows it by, such as LLaMA-Factory's. ``reads`` tells columns whose names are not fixed, given the
    look of every column (``cell``: text in a table of text). ``gives`` is what a row can be used for, ``says`` what it
    holds, ``origin`` who writes such rows.

    ``arranged`` is what a comparison looks like after it was written and read (a pair has its best response first), and
    ``finish`` puts further columns where the layout wants them. ``note`` is what a person is told of rows that are read
    so, ``joins``: rows of one prompt that follow each other are one comparison. Without a ``writer``, rows are read so
    and not written.
    """

    name: str
    fields: tuple[str, ...]
    gives: DataKind
    says: str
    origin: str
    example: Mapping[str, object]
    reader: Callable[[Row], Comparison]
    writer: Callable[[Comparison], dict[str, object]] = _read_only
    optional: tuple[str, ...] = ()
    shape: Callable[[Mapping[str, object]], bool] = always
    also: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    reads: Callable[[Mapping[str, str]], Collection[str]] | None = None
    arranged: Callable[[Comparison], Comparison] = _as_it_is
    finish: Callable[[dict[str, object], Mapping[str, object]], dict[str, object]] = with_columns
    verbatim: bool = False
    note: str = ""
    joins: bool = False
    known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", frozenset((*self.fields, *self.optional)))

    @property
    def written(self) -> bool:
        """Whether rows can be written so."""
        return self.writer is not _read_only

    def field_of(self, name: str) -> str | None:
        """The field that ``--columns`` means by a name, or None."""
        return name if name in self.known else self.aliases.get(name) or self.words.get(name)

    def column_of(self, name: str, row: Mapping[str, object], columns: Columns = PLAIN) -> str | None:
        """The column of a row that holds a field, or None where it is absent."""
        for given, column in columns.names.items():
            if self.field_of(given) == name:
                return column if row.get(column) is not None else None
        # A column that was given to another field is that field's alone, whatever its own name is.
        taken = {column for given, column in columns.names.items() if self.field_of(given) is not None}
        taken.update(columns.ignored)
        own = (name, *(a for a, of in self.aliases.items() if of == name))
        return next((c for c in own if c not in taken and row.get(c) is not None), None)

    def own(self, looks: Mapping[str, str], columns: Columns = PLAIN) -> Collection[str]:
        """The columns it reads that have names of their own, given the look of every column under its field's name."""
        if self.reads is None:
            return ()
        text = "cell" if columns.cells else "text"
        left = {name: text if seen == "text" else seen for name, seen in looks.items() if name not in columns.ignored}
        return self.reads(left)

    def fits(self, row: Mapping[str, object], columns: Columns = PLAIN, *, any_shape: bool = False) -> bool:
        """Whether a row has the fields, and the shape too unless ``any_shape`` will do."""
        if any(self.column_of(name, row, columns) is None for name in self.fields):
            return False
        if any_shape:
            return True
        named = self._named(row, columns)
        sides = (side for side in SIDES if side not in self.known and side not in columns.ignored)
        return all(named.get(side) is None for side in sides) and self.shape(named)

    def parse(self, row: object, number: int, file: str, columns: Columns = PLAIN) -> Comparison:
        """The comparison that row ``number`` (from 1) of a file holds; raises :class:`BadRow` where it holds none."""
        if not isinstance(row, dict):
            raise BadRow("not an object", f"is {kind(row)}, not an object with named fields")
        values = self._named(row, columns)
        if missing := [name for name in self.fields if values.get(name) is None]:
            raise BadRow("missing field", f"lacks {', '.join(missing)}")
        tools = () if "tools" in self.known else ("tools",)
        for name in (*NOT_READ, *columns.refused, *tools):
            if values.get(name):
                raise BadRow("field that cannot be used", f"has {name}, which {self.name} rows have no place for")
        own = self.own({str(k): look(v) for k, v in values.items()}, columns) if self.reads is not None else ()
        extra = {str(k): v for k, v in values.items() if k not in self.known and k not in own}
        if columns.ignored:
            values = {k: v for k, v in values.items() if k not in columns.ignored}
        tags = columns.tags.exactly(self.verbatim)
        try:
            sides = [columns.names.get(name, name) for name in ("first", "second")]
            return self.reader(Row(values, number, file, tags, extra, columns.cells, columns.means, sides, own))
        except RecursionError:
            raise BadRow("wrong type", "is nested too deeply") from None

    def write(self, comparison: Comparison) -> dict[str, object]:
        """The row that says the same, extra columns included.

        It is read again before it is given out, so that nothing is lost. Raises :class:`DataError` with the row and
        the reason where the layout cannot hold all that the comparison says.
        """
        c = self.arranged(comparison)
        try:
            row = self.finish(self.writer(c), c.extra)
            try:
                again = self.parse(row, c.row, c.file)
            except BadRow as bad:
                raise CannotHold(f"it so that it can be read again ({bad.what})") from None
            if not self.fits(row):
                raise CannotHold("it so that it is recognised")
            if again != c or again.extra != c.extra:
                raise CannotHold(_difference(c, again))
        except CannotHold as reason:
            what = f"cannot be written as {self.name}, which cannot hold {reason}"
            raise DataError(what, file=c.file or None, row=c.row) from None
        return row

    def _named(self, row: Mapping[str, object], columns: Columns) -> Mapping[str, object]:
        """The row with every column under the name of its field."""
        if not columns.names and not columns.ignored and not (self.aliases and any(a in row for a in self.aliases)):
            return row
        found = {name: self.column_of(name, row, columns) for name in (*self.fields, *self.optional)}
        used = {column for column in found.values() if column is not None}
        values = {column: value for column, value in row.items() if column not in used and column not in found}
        values |= {name: row[column] for name, column in found.items() if column is not None}
        return values


def _difference(c: Comparison, again: Comparison) -> str:
    """What of a comparison would not come back as it was."""
    what = {
        "plain text beside turns": c.text != again.text,
        "that responses were cut off": _cuts(c) != _cuts(again),
        "where its prompt ends and its responses begin": c.prompt != again.prompt or c.responses != again.responses,
        "its scores": c.scores != again.scores,
        "its labels": c.labels != again.labels,
        "its votes": c.votes != again.votes,
        "its order with its ties": c.tiers != again.tiers,
        "its tools": c.tools != again.tools,
        "its other columns": True,
    }
    return next(name for name, differs in what.items() if differs)


def _cuts(c: Comparison) -> list[bool]:
    return [r.cut for r in c.responses]
