"""One row as its layout names the columns: typed access that raises BadRow, and building the comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefopt.data.layouts.messages import Tags, read_messages, read_tools, read_transcript
from prefopt.data.layouts.values import (
    SCORE_COLUMNS,
    SCORES,
    TRANSCRIPT_STARTS,
    BadRow,
    items_of,
    json_of,
    label_text,
    number_of,
    type_name,
)
from prefopt.records import Comparison, Message, Response

LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(slots=True)
class RowReader:
    """One row, its columns under the names of the layout's fields; every method raises :class:`BadRow`.

    ``extra`` are the columns that the layout does not read, ``own`` the names of those that it reads under other names
    than its fields. ``cells``: values are cells of a table of text, such as "true" and "1". ``means`` is the meaning of
    labels, ``sides`` the column names of the two responses in the file.
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
        return self.values.get(name) is not None

    def given(self, path: str) -> object:
        """The value of a column, or at a path such as ``summaries.0.text``; it must be present."""
        value = value_at(self.values, path)
        if value is None:
            raise BadRow("missing field", f"lacks {path}")
        return value

    def text(self, name: str) -> str:
        value = self.given(name)
        if not isinstance(value, str):
            raise BadRow("wrong type", f"{name} is {type_name(value)}, not text")
        return value

    def items(self, name: str) -> Sequence[object]:
        return items_of(self.given(name), name)

    def number_of(self, value: object, name: str) -> float:
        """A finite number; ``name`` is its place in the row."""
        if self.cells and isinstance(value, str):
            try:
                return number_of(float(value), name)
            except ValueError:
                raise BadRow("wrong type", f"{name} is {value[:20]!r}, not a number") from None
        return number_of(value, name)

    def label_of(self, value: object, name: str) -> bool:
        """True or false, or 1 or 0; ``--label-means`` gives other labels the meaning ``good`` or ``bad``."""
        label = label_text(value)
        if self.means:
            label = {"true": "1", "false": "0"}.get(label, label) if label not in self.means else label
            if self.means.get(label) not in ("good", "bad"):
                known = ", ".join(f"{k}={v}" for k, v in self.means.items())
                raise BadRow("unknown label", f"{name} is {value!r}; --label-means knows {known}")
            return self.means[label] == "good"
        if label not in LABELS or not isinstance(value, (bool, int, float, str)):
            shown = f", {value!r}" if isinstance(value, (int, float)) or (isinstance(value, str) and self.cells) else ""
            what = f"{name} is {type_name(value)}{shown}, not true or false (or 1 or 0)"
            remedy = "give the meaning of other labels, such as --label-means yes=good,no=bad"
            raise BadRow("wrong type", f"{what}; {remedy}")
        return LABELS[label]

    @property
    def labels(self) -> tuple[bool, ...]:
        return (self.label_of(self.given("label"), "label"),)

    def turns(self, name: str) -> tuple[Message, ...]:
        return read_messages(self.given(name), name, self.tags)

    def chat(self, name: str) -> tuple[Message, ...]:
        """A list of messages, after the column ``system`` if there is one."""
        return self.with_system(self.turns(name))

    def response(self, name: str, *, text: bool = False) -> Response:
        """A response: text, one message, or a list of messages; only text if the prompt is plain ``text``."""
        return self.response_of(self.given(name), name, text=text)

    def response_of(self, value: object, name: str, *, text: bool = False) -> Response:
        """As :meth:`response`, for a value at any place in the row, which is called ``name`` in messages."""
        if isinstance(value, str):
            return answer(value)
        if value is None:
            raise BadRow("missing field", f"lacks {name}")
        if text:
            raise BadRow("wrong type", f"{name} should be text, as the prompt is, and is {type_name(value)}")
        return Response(read_messages([value] if isinstance(value, dict) else value, name, self.tags))

    def with_system(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """The turns after the column ``system``, if there is one."""
        if not self.has("system") or not self.text("system"):
            return turns
        if turns and turns[0].role == "system":
            raise BadRow("two system turns", "has a column system and a system turn as well")
        return (Message("system", self.text("system")), *turns)

    def user_prompt(self, name: str) -> tuple[Message, ...]:
        """A prompt of one user turn, after the column ``system`` if there is one."""
        return self.with_system((Message("user", self.text(name)),))

    def demonstration(self, turns: tuple[Message, ...]) -> Comparison:
        """A conversation to train on: the response is all turns from the first of the assistant on."""
        at = next((i for i, m in enumerate(turns) if m.role == "assistant"), len(turns))
        return self.comparison(turns[:at], [Response(turns[at:])] if turns[at:] else ())

    def prompt_at(self, path: str) -> tuple[Message, ...]:
        """A prompt at a path: messages, a transcript as in Anthropic's HH, or the text of a user."""
        value = self.given(path)
        if isinstance(value, (list, tuple)):
            return self.with_system(self.response_of(value, path).messages)
        if not isinstance(value, str):
            raise BadRow("wrong type", f"{path} is {type_name(value)}, not text or messages")
        if not value.startswith(TRANSCRIPT_STARTS):
            return self.with_system((Message("user", value),))
        turns, _ = read_transcript(value)
        if turns[-1].role == "assistant" and not turns[-1].content:
            turns = turns[:-1]
        return self.with_system(turns)

    def texts(self, name: str) -> list[str]:
        """A list of texts, or the JSON text of one: the turns of one side."""
        value = self.given(name)
        texts = items_of(json_of(value, name) if isinstance(value, str) else value, name)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadRow("wrong type", f"{name} should be a list of texts, one for each turn, none of them null")
        return [str(text) for text in texts]

    @property
    def pair_scores(self) -> tuple[float, float] | None:
        """Scores of chosen and rejected from :data:`SCORES`, or from the columns that :func:`scored_sides` found.

        Raises :class:`BadRow` for one score without the other, and if the rejected response has the higher score.
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
            for name, other in (pair for names in SCORE_COLUMNS for pair in (names, names[::-1])):
                if self.has(name) and other in self.values and not self.has(other):
                    self.tags.unread.add(f"{name} where {other} is null")
            return None
        if chosen is None or rejected is None:
            has, lacks = names if rejected is None else names[::-1]
            raise BadRow("missing score", f"has {has} and lacks {lacks}")
        best, worse = self.number_of(chosen, names[0]), self.number_of(rejected, names[1])
        if best < worse:
            what = f"{names[0]} is {best:g} and {names[1]} {worse:g}: the rejected response would be the better"
            raise BadRow("scores against the preference", f"{what}; --ignore-columns {' '.join(names)} leaves both out")
        return best, worse

    def pair(
        self, prompt: tuple[Message, ...], chosen: Response, rejected: Response, *, text: bool = False
    ) -> Comparison:
        """A chosen and a rejected response, with their scores if there are any; equal scores are a tie."""
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
        """The comparison with row number, tools and the columns not read. Turns of a prompt are never trained."""
        if not self.tags.verbatim and not all(m.trained for m in prompt):
            prompt = tuple(replace(m, trained=True) for m in prompt)
        tools = read_tools(self.values.get("tools"), verbatim=self.tags.verbatim)
        if text and tools:
            raise BadRow("field that cannot be used", "has tools, which plain text cannot have")
        sides = tuple(responses)
        return Comparison(prompt, sides, tiers, self.number, self.file, text, self.extra, scores, labels, votes, tools)


def answer(text: str) -> Response:
    return Response((Message("assistant", text),))


def text_prompt(text: str) -> tuple[Message, ...]:
    """The prompt of plain text, which may be empty."""
    return (Message("user", text),)


def value_at(values: Mapping[str, object], path: str) -> object:
    """The value at a path of keys and indices, or None."""
    found: object = values
    for key in path.split("."):
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, (list, tuple)) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found
