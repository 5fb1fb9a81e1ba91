"""What a layout is: how a row of it is told, read into a :class:`Comparison`, and written again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefopt.data.layouts.messages import TAGS, Tags, read_messages, read_tools
from prefopt.data.layouts.shapes import always
from prefopt.data.layouts.values import BadRow, items_of, kind, number_of
from prefopt.errors import DataError
from prefopt.records import Comparison, Message, Response

# What changes the text that a model sees, so that leaving it out would train on something else.
NOT_READ = ("images", "videos", "audios", "image", "video", "audio", "functions")


class CannotHold(Exception):
    """A layout has no place for something that a comparison says; the message says for what."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns by another name (``{"prompt": "question"}``), and the keys and roles of messages."""

    names: Mapping[str, str] = field(default_factory=dict)
    tags: Tags = TAGS


PLAIN = Columns()


@dataclass(slots=True)
class Row:
    """One row as its layout names the columns; every getter raises :class:`BadRow` for what it cannot be.

    ``extra`` holds the columns that the layout does not read.
    """

    values: Mapping[str, object]
    number: int
    file: str
    tags: Tags
    extra: dict[str, object]

    def get(self, name: str) -> object:
        """The value, or None where it is absent or null."""
        return self.values.get(name)

    def given(self, name: str) -> object:
        """The value, which must be there."""
        value = self.values.get(name)
        if value is None:
            raise BadRow("missing field", f"lacks {name}")
        return value

    def text(self, name: str) -> str:
        """Text, which must be there."""
        value = self.given(name)
        if not isinstance(value, str):
            raise BadRow("wrong type", f"{name} is {kind(value)}, not text")
        return value

    def text_or(self, name: str, default: str = "") -> str:
        """Text, or the default where there is none."""
        return default if self.values.get(name) is None else self.text(name)

    def items(self, name: str) -> Sequence[object]:
        """A list, which must be there."""
        return items_of(self.given(name), name)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        return tuple(number_of(item, f"an item of {name}") for item in self.items(name))

    def label(self, name: str) -> bool:
        """True or false. Numbers are refused: 0 and 1 may be classes or ratings as well."""
        value = self.given(name)
        if not isinstance(value, bool):
            raise BadRow("wrong type", f"{name} is {kind(value)}, not true or false")
        return value

    def messages(self, name: str) -> tuple[Message, ...]:
        """A list of messages, which must be there."""
        return read_messages(self.given(name), name, self.tags)

    def response(self, name: str, *, text: bool = False) -> Response:
        """A side: text, one message, or a list of messages; text alone where the prompt is plain ``text``."""
        return self.response_of(self.given(name), name, text=text)

    def response_of(self, value: object, name: str, *, text: bool = False) -> Response:
        """As :meth:`response`, of a value that stands deeper in the row; ``name`` says where."""
        if isinstance(value, str):
            return Response((Message("assistant", value),))
        if text:
            raise BadRow("wrong type", f"prompt is text, so {name} should be text too, not {kind(value)}")
        return Response(read_messages([value] if isinstance(value, dict) else value, name, self.tags))

    def with_system(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """The turns with the column ``system`` before them, where it says something."""
        system = self.text_or("system")
        if not system:
            return turns
        if turns and turns[0].role == "system":
            raise BadRow("two system turns", "has a column system and a system turn as well")
        return (Message("system", system), *turns)

    @property
    def tools(self) -> tuple[str, ...]:
        """The functions that the model may call, as JSON objects."""
        return read_tools(self.values.get("tools"), verbatim=self.tags.verbatim)

    def comparison(
        self,
        prompt: tuple[Message, ...],
        responses: Sequence[Response],
        tiers: tuple[tuple[int, ...], ...] = (),
        *,
        text: bool = False,
        scores: tuple[float, ...] | None = None,
        labels: tuple[bool, ...] | None = None,
        votes: tuple[tuple[int, int, float], ...] | None = None,
        tools: tuple[str, ...] = (),
    ) -> Comparison:
        """What the row says, with its place and the columns that were not read. A prompt's turns are never trained."""
        if not self.tags.verbatim and not all(m.trained for m in prompt):
            prompt = tuple(replace(m, trained=True) for m in prompt)
        return Comparison(
            prompt, tuple(responses), tiers, self.number, self.file, text, self.extra, scores, labels, votes, tools
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout of rows.

    ``fields`` must be there (null counts as absent), ``optional`` may be. ``shape`` is given a row that has the fields
    and says whether it looks like this layout, where several have the same fields. ``aliases`` are other names of a
    field that are read as well; ``words`` are names that only ``--columns`` knows it by, such as LLaMA-Factory's.
    ``also`` names layouts whose rows this one reads too, ``reads`` tells columns whose names are not fixed.
    """

    name: str
    fields: tuple[str, ...]
    example: Mapping[str, object]
    origin: str
    reader: Callable[[Row], Comparison]
    writer: Callable[[Comparison], dict[str, object]]
    optional: tuple[str, ...] = ()
    shape: Callable[[Mapping[str, object]], bool] = always
    aliases: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    reads: Callable[[str], bool] | None = None
    verbatim: bool = False

    @property
    def known(self) -> frozenset[str]:
        """Names of columns that it reads."""
        return frozenset((*self.fields, *self.optional))

    def field_of(self, name: str) -> str | None:
        """The field that ``--columns`` means by a name, or None."""
        return name if name in self.known else self.aliases.get(name) or self.words.get(name)

    def column_of(self, name: str, row: Mapping[str, object], columns: Columns = PLAIN) -> str | None:
        """The column of a row that holds a field, or None where it is absent."""
        for given, column in columns.names.items():
            if self.field_of(given) == name:
                return column if row.get(column) is not None else None
        if row.get(name) is not None:
            return name
        return next((a for a, of in self.aliases.items() if of == name and row.get(a) is not None), None)

    def fits(self, row: Mapping[str, object], columns: Columns = PLAIN, *, any_shape: bool = False) -> bool:
        """Whether a row has the fields, and the shape too unless ``any_shape`` will do."""
        if any(self.column_of(name, row, columns) is None for name in self.fields):
            return False
        return any_shape or self.shape(self._named(row, columns))

    def parse(self, row: object, number: int, file: str, columns: Columns = PLAIN) -> Comparison:
        """The comparison that row ``number`` (from 1) of a file holds; raises :class:`BadRow` where it holds none."""
        if not isinstance(row, dict):
            raise BadRow("not an object", f"is {kind(row)}, not an object with named fields")
        values = self._named(row, columns)
        missing = [name for name in self.fields if values.get(name) is None]
        if missing:
            raise BadRow("missing field", f"lacks {', '.join(missing)}")
        known = self.known
        for name in NOT_READ if "tools" in known else (*NOT_READ, "tools"):
            if values.get(name):
                raise BadRow("field that cannot be used", f"has {name}, which this layout has no place for")
        extra = {str(k): v for k, v in values.items() if k not in known and not (self.reads and self.reads(str(k)))}
        try:
            return self.reader(Row(values, number, file, columns.tags.exactly(self.verbatim), extra))
        except RecursionError:
            raise BadRow("wrong type", "is nested too deeply") from None

    def write(self, comparison: Comparison) -> dict[str, object]:
        """The row that says the same, extra columns included.

        It is parsed again before it is given out, so that nothing is lost. Raises :class:`DataError` with the row and
        the reason where the layout cannot hold all that the comparison says.
        """
        c = comparison
        try:
            row = self.writer(c)
            if taken := [name for name in c.extra if name in row]:
                raise CannotHold(f"a column {taken[0]} that the layout needs for itself")
            row |= c.extra
            try:
                again = self.parse(row, c.row, c.file)
            except BadRow as bad:
                raise CannotHold(f"a row that could not be read again ({bad.what})") from None
            if again != c or again.extra != c.extra:
                raise CannotHold(_difference(c, again))
        except CannotHold as reason:
            what = f"cannot be written as {self.name}, which does not hold {reason}"
            raise DataError(what, file=c.file or None, row=c.row) from None
        return row

    def _named(self, row: Mapping[str, object], columns: Columns) -> Mapping[str, object]:
        """The row with every column under the name of its field."""
        if not columns.names and not (self.aliases and any(a in row for a in self.aliases)):
            return row
        found = {name: self.column_of(name, row, columns) for name in (*self.fields, *self.optional)}
        used = {column for column in found.values() if column is not None}
        values = {column: value for column, value in row.items() if column not in used and column not in found}
        values |= {name: row[column] for name, column in found.items() if column is not None}
        return values


def _difference(c: Comparison, again: Comparison) -> str:
    """What of a comparison would not come back as it was."""
    what = {
        "the text of a base model beside turns": c.text != again.text,
        "where its prompt ends and its responses begin": c.prompt != again.prompt or c.responses != again.responses,
        "its scores": c.scores != again.scores,
        "its labels": c.labels != again.labels,
        "its votes": c.votes != again.votes,
        "its order with its ties": c.tiers != again.tiers,
        "its tools": c.tools != again.tools,
        "its other columns": True,
    }
    return next(name for name, differs in what.items() if differs)
