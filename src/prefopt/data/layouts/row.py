"""One row as its layout names the columns, with getters that say what is wrong with a value."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefopt.data.layouts.messages import Tags, read_messages, read_tools
from prefopt.data.layouts.shapes import SCORES, SPELT
from prefopt.data.layouts.values import BadRow, items_of, kind, number_of, spelt
from prefopt.records import Comparison, Message, Response

LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(slots=True)
class Row:
    """One row as its layout names the columns; every getter raises :class:`BadRow` for what a value cannot be.

    ``extra`` holds the columns that the layout does not read, ``own`` names those that it reads under names of their
    own. ``cells``: values are the cells of a table of text, where true, false and numbers are written out. ``means``
    says what labels mean, and ``sides`` what the columns of two responses are called in the file.
    """

    values: Mapping[str, object]
    number: int
    file: str
    tags: Tags
    extra: dict[str, object]
    cells: bool = False
    means: Mapping[str, str] = field(default_factory=dict)
    sides: Sequence[str] = ()
    own: Collection[str] = ()

    def has(self, name: str) -> bool:
        """Whether there is a value; null is none."""
        return self.values.get(name) is not None

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
        return self.text(name) if self.has(name) else default

    def items(self, name: str) -> Sequence[object]:
        """A list, which must be there."""
        return items_of(self.given(name), name)

    def number_of(self, value: object, name: str) -> float:
        """A finite number; ``name`` says where it stands."""
        if self.cells and isinstance(value, str):
            try:
                return number_of(float(value), name)
            except ValueError:
                raise BadRow("wrong type", f"{name} is {value[:20]!r}, not a number") from None
        return number_of(value, name)

    def label_of(self, value: object, name: str) -> bool:
        """True or false, which 1 and 0 stand for too; ``--label-means`` may say ``good`` and ``bad`` of others."""
        label = spelt(value)
        if self.means:
            label = {"true": "1", "false": "0"}.get(label, label) if label not in self.means else label
            if self.means.get(label) not in ("good", "bad"):
                known = ", ".join(f"{k}={v}" for k, v in self.means.items())
                raise BadRow("unknown label", f"{name} is {value!r}; --label-means knows {known}")
            return self.means[label] == "good"
        if label not in LABELS or not isinstance(value, (bool, int, float, str)):
            said = f", {value!r}" if isinstance(value, (int, float)) or (isinstance(value, str) and self.cells) else ""
            what = f"{name} is {kind(value)}{said}, not true or false"
            raise BadRow("wrong type", f"{what} (or 1 or 0); --label-means good=good,bad=bad says what others mean")
        return LABELS[label]

    def turns(self, name: str) -> tuple[Message, ...]:
        """A list of messages, which must be there."""
        return read_messages(self.given(name), name, self.tags)

    def chat(self, name: str) -> tuple[Message, ...]:
        """A list of messages, which must be there, after the column ``system`` where that says something."""
        return self.with_system(self.turns(name))

    def response(self, name: str, *, text: bool = False) -> Response:
        """A side: text, one message, or a list of messages; text alone where the prompt is plain ``text``."""
        return self.response_of(self.given(name), name, text=text)

    def response_of(self, value: object, name: str, *, text: bool = False) -> Response:
        """As :meth:`response`, of a value that stands deeper in the row; ``name`` says where."""
        if isinstance(value, str):
            return answer(value)
        if text:
            raise BadRow("wrong type", f"{name} should be text, as the prompt is, and is {kind(value)}")
        return Response(read_messages([value] if isinstance(value, dict) else value, name, self.tags))

    def with_system(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """The turns after the column ``system``, where that says something."""
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

    @property
    def pair_scores(self) -> tuple[float, float] | None:
        """Scores of chosen and rejected from :data:`SCORES`, or else what :func:`scored_sides` found.

        Raises :class:`BadRow` where there is one without the other, and where they say that the rejected is better.
        """
        names: Sequence[str] = tuple(self.own) if len(self.own) == 2 else SCORES
        values, metadata = self.values, self.values.get("metadata")
        if "metadata" in self.own and isinstance(metadata, dict):
            values = metadata
            if rest := {k: v for k, v in metadata.items() if k not in names}:
                self.extra["metadata"] = rest
                self.tags.unread.update(f"metadata.{key}" for key in rest)
        chosen, rejected = (values.get(name) for name in names)
        if chosen is None and rejected is None:
            self.tags.unread.update(self._lone_scores())
            return None
        if chosen is None or rejected is None:
            has, lacks = names if rejected is None else names[::-1]
            raise BadRow("missing score", f"has {has} and lacks {lacks}")
        best, worse = self.number_of(chosen, names[0]), self.number_of(rejected, names[1])
        if best < worse:
            what = f"{names[0]} is {best:g} and {names[1]} {worse:g}: the rejected response would be the better"
            raise BadRow("scores against the preference", f"{what}; --ignore-columns {' '.join(names)} leaves both out")
        return best, worse

    def _lone_scores(self) -> Iterator[str]:
        """Scores of one side that are not read, since that of the other is null."""
        for names in SPELT:
            for name, other in (names, names[::-1]):
                if self.has(name) and other in self.values and not self.has(other):
                    yield f"{name} where {other} is null"

    def pair(
        self, prompt: tuple[Message, ...], chosen: Response, rejected: Response, *, text: bool = False
    ) -> Comparison:
        """A chosen response and a rejected one, with their scores where there are any; equal scores are a tie."""
        scores = self.pair_scores
        tied = scores is not None and scores[0] == scores[1]
        tiers = ((0, 1),) if tied else ((0,), (1,))
        return self.comparison(prompt, (chosen, rejected), tiers, text=text, scores=scores)

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
    ) -> Comparison:
        """What the row says, with its place, tools, and the columns not read. A prompt's turns are never trained."""
        if not self.tags.verbatim and not all(m.trained for m in prompt):
            prompt = tuple(replace(m, trained=True) for m in prompt)
        sides, tools = tuple(responses), self.tools
        if text and tools:
            raise BadRow("field that cannot be used", "has tools, which plain text has no place for")
        return Comparison(prompt, sides, tiers, self.number, self.file, text, self.extra, scores, labels, votes, tools)


def answer(text: str) -> Response:
    """One turn of the assistant."""
    return Response((Message("assistant", text),))


def text_prompt(text: str) -> tuple[Message, ...]:
    """The prompt of a row of plain text; every such row has one, be it empty."""
    return (Message("user", text),)
