"""From a comparison to a group: chat template, token ids, trained masks. The only user of chat templates.

Each response is rendered with its prompt as one text and tokenised once. What is trained is known in characters first,
then in tokens: a token is trained if it covers any character of an answer, so that a merge across the boundary is
trained with the answer it belongs to. An answer ends with its end-of-turn token; what a template puts after the last
one is neither trained nor kept. Where answers lie in the text is found by rendering, not by knowing templates:

- the answer of a turn *starts* where the prompt with its generation prompt ends, if the whole text begins with that
  (what the template adds behind it, such as an empty reasoning block, is the model's to write, hence trained), else
  where the template puts the words of that turn;
- it *ends* where the text behind those words begins, plus the end-of-turn token that stands there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from jinja2 import TemplateError

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.tokenizer import OffsetArray, Tokenizer, encode, end_marks, eos_id, leading_ids, plain_template
from prefopt.data.truncate import check_max_length, truncate
from prefopt.data.validate import NAMED_ROWS, Problem
from prefopt.errors import DataError
from prefopt.records import Comparison, Message

# Stands in for the words of a turn to see where a template puts them.
PROBE = "prefopt9f2c41probe"
BATCH = 64

Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A group, tokens cut from its prompt, and tokens cut from the end of each response."""

    group: Group
    prompt_cut: int = 0
    responses_cut: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """One response with its prompt as text; ``spans`` are the trained characters, [start, end); EOS may follow."""

    text: str
    spans: tuple[tuple[int, int], ...]
    bos: bool = False
    eos: bool = False


class _Unrenderable(Exception):
    pass


class Renderer:
    """Turns comparisons into groups with one tokenizer.

    A conversation goes through the tokenizer's chat template, or, where it has none, through the plain layout
    ``User: ...``, ``Assistant: ...`` (see :func:`plain_template`); ``template`` holds it then. A ``text`` comparison is
    prompt and response as they stand, BOS before them where the tokenizer wants it. ``add_eos`` ends answers with EOS
    wherever no template does. ``notes`` collects what a person should be told once.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int | None = None, add_eos: bool = True) -> None:
        """Raises :class:`ConfigError` for a length under 2, :class:`ModelError` where EOS is needed and not there."""
        check_max_length(max_length)
        self.tokenizer, self.max_length, self.add_eos = tokenizer, max_length, add_eos
        self.plain = tokenizer.chat_template is None
        self.template: str | None = plain_template(tokenizer, add_eos=add_eos) if self.plain else None
        self._lead = leading_ids(tokenizer)
        self._marks = end_marks(tokenizer)
        self._mark_pattern = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self._said: dict[str, None] = {}
        self._rows_with_marks: dict[tuple[str, int], None] = {}

    @property
    def notes(self) -> list[str]:
        """What to tell a person once, about all rows rendered so far."""
        notes = list(self._said)
        if rows := [row for _, row in self._rows_with_marks]:
            first = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
            notes.append(f"{len(rows)} rows write special tokens out in their text, read as those tokens: rows {first}")
        return notes

    def render(self, comparison: Comparison) -> Rendered:
        """One comparison as a group. Raises :class:`DataError` where it cannot be one."""
        result = next(self.render_all([comparison]))
        if isinstance(result, Problem):
            raise DataError(f"{result.kind}: {result.what}", file=result.file or None, row=result.row)
        return result

    def render_all(self, comparisons: Iterable[Comparison]) -> Iterator[Rendered | Problem]:
        """Each comparison as a group, or the problem that keeps it from being one, in order."""
        rows = iter(comparisons)
        while batch := list(islice(rows, BATCH)):
            laid = [self._lay_out(c) for c in batch]
            texts = [layout.text for row in laid if not isinstance(row, Problem) for layout in row]
            encoded = iter(encode(self.tokenizer, texts))
            for comparison, row in zip(batch, laid, strict=True):
                if isinstance(row, Problem):
                    yield row
                else:
                    yield self._group(comparison, [self._sequence(x, *next(encoded)) for x in row])

    def _sequence(self, layout: Layout, ids: IntArray, offsets: OffsetArray) -> tuple[IntArray, BoolArray]:
        trained = covered(offsets, layout.spans, len(layout.text))
        if layout.bos and ids[: len(self._lead)].tolist() != self._lead:
            ids = np.concatenate([np.array(self._lead, np.int32), ids])
            trained = np.concatenate([np.zeros(len(self._lead), np.bool_), trained])
        if layout.eos:
            ids, trained = np.append(ids, np.int32(eos_id(self.tokenizer))), np.append(trained, True)
        return ids, trained

    def _group(self, c: Comparison, sequences: Sequence[tuple[IntArray, BoolArray]]) -> Rendered | Problem:
        def same(one: int, other: int) -> bool:
            return all(np.array_equal(a, b) for a, b in zip(sequences[one], sequences[other], strict=True))

        if any(same(*pair) for pair in c.pairs):
            return Problem("identical responses", c.row, "the responses are the same token for token", c.file)
        prompt_cut, responses_cut = 0, (0,) * len(sequences)
        try:
            if self.max_length is not None and max(len(ids) for ids, _ in sequences) > self.max_length:
                bos = self.tokenizer.bos_token_id
                cut = truncate(sequences, self.max_length, bos=bos)
                sequences, prompt_cut, responses_cut = cut.sequences, cut.prompt, cut.responses
                if any(same(*pair) for pair in c.pairs):
                    what = f"the responses differ only beyond {self.max_length} tokens"
                    return Problem("identical after truncation", c.row, what, c.file)
            return Rendered(Group.from_sequences(sequences, c.row, c.pairs), prompt_cut, responses_cut)
        except ValueError as error:
            return Problem("nothing to train", c.row, str(error), c.file)

    def _lay_out(self, c: Comparison) -> list[Layout] | Problem:
        eos = str(self.tokenizer.eos_token)
        contents = [m.content.removesuffix(eos) for r in (c.prompt, *(x.messages for x in c.responses)) for m in r]
        if any(self._mark_pattern.search(content) for content in contents):
            self._rows_with_marks[c.file, c.row] = None
        if c.text:
            prompt = "".join(m.content for m in c.prompt)
            return [self._text(prompt, "".join(m.content for m in r.messages)) for r in c.responses]
        if self.plain:
            self._said["the tokenizer has no chat template: turns are written as 'User: ...', 'Assistant: ...'"] = None
        shown: dict[tuple[Turns, bool], str] = {}
        try:
            return [self._conversation(c.prompt, r.messages, shown) for r in c.responses]
        except _Unrenderable as error:
            return Problem("chat template", c.row, str(error), c.file)

    def _text(self, prompt: str, response: str) -> Layout:
        text = prompt + response
        eos = self.add_eos and not text.endswith(str(self.tokenizer.convert_ids_to_tokens(eos_id(self.tokenizer))))
        return Layout(text, ((len(prompt), len(text)),), bos=True, eos=eos)

    def _conversation(self, prompt: Turns, response: Turns, shown: dict[tuple[Turns, bool], str]) -> Layout:
        whole = prompt + response
        full = self._show(whole, False, shown)
        spans, ended = [], False
        for j in range(len(prompt), len(whole)):
            if whole[j].role == "assistant":
                start, end, ended = self._turn(whole, j, full, shown)
                spans.append((start, end))
        if not spans:
            raise _Unrenderable("a response has no turn of the assistant")
        if not ended and self.add_eos:
            eos_id(self.tokenizer)
            self._said["the chat template ends no answer with a token of its own: EOS is added"] = None
        return Layout(full[: spans[-1][1]], tuple(spans), eos=not ended and self.add_eos)

    def _turn(self, whole: Turns, j: int, full: str, shown: dict[tuple[Turns, bool], str]) -> tuple[int, int, bool]:
        """Trained characters [start, end) of turn j in ``full``, and whether an end-of-turn token is among them."""
        probe = (*whole[:j], replace(whole[j], content=PROBE), *whole[j + 1 :])
        around = self._show(probe, False, shown).split(PROBE)
        if len(around) != 2:
            raise _Unrenderable(f"the template shows an answer {len(around) - 1} times instead of once")
        head, tail = around
        words_end = len(full) - len(tail)
        asked = self._show(whole[:j], True, shown)
        if full.startswith(asked):
            start = len(asked)
        else:
            start = _common(full, head)
            before = self._show(whole[:j], False, shown)
            if full.startswith(before) and asked.startswith(before):
                start = min(start, _common(full, asked))
        if not full.endswith(tail) or start >= words_end:
            raise _Unrenderable("the template gives an answer no place of its own that could be told from its prompt")
        rest = tail.lstrip()
        mark = next((m for m in self._marks if rest.startswith(m)), None)
        if mark is None:
            return start, words_end, False
        return start, words_end + len(tail) - len(rest) + len(mark), True

    def _show(self, turns: Turns, generation: bool, shown: dict[tuple[Turns, bool], str]) -> str:
        """The template applied; ``shown`` keeps what the responses of one prompt have in common."""
        if (turns, generation) not in shown:
            messages = [{"role": m.role, "content": m.content} for m in turns]
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=generation
                )
            except (TemplateError, TypeError, ValueError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise _Unrenderable(f"the template refuses the conversation: {reason}") from None
            shown[turns, generation] = str(text)
        return shown[turns, generation]


def covered(offsets: OffsetArray, spans: Sequence[tuple[int, int]], length: int) -> BoolArray:
    """Which tokens [L] cover any character of the spans; ``offsets`` [L, 2), text of ``length`` characters.

    A token that covers nothing goes with the character at its place.
    """
    inside = np.zeros(length + 1, np.bool_)
    for start, end in spans:
        inside[start:end] = True
    before = np.concatenate([[0], np.cumsum(inside)])
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    trained: BoolArray = before[np.minimum(ends, length + 1)] > before[starts]
    return trained


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
