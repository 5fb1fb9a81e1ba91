"""Where the answers lie in a rendered conversation, found by rendering and not by knowing templates.

- The answer of a turn *starts* where the prompt with its generation prompt ends, if the whole text begins with that
  (what the template adds behind it, such as an empty reasoning block, is the model's to write, hence trained), else
  where the template puts the words of that turn.
- It *ends* where the text behind its words, or behind its last tool call, begins, plus the end-of-turn token that
  stands there. That place is seen by rendering a probe, a word that no row holds, in their stead. What a template has
  once been seen to put around a probe is looked for first: where the text is exactly that around the row's own words,
  no probe is rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.chat.coverage import OTHER_TEMPLATE, Hidden, hidden, shape
from prefopt.data.chat.encoding import Layout
from prefopt.data.chat.reasoning import split_reasoning
from prefopt.data.chat.template import ChatTemplate, Turns, Unrenderable
from prefopt.data.table import GroupTable
from prefopt.data.tokenizer import Tokenizer, end_marks
from prefopt.errors import DataError, ModelError
from prefopt.records import Comparison, Message

REMEMBERED = 8  # ways of a template to frame an answer; most have one
SHAPES = 4096  # of conversations, of which it is known whether the template shows all they hold
EARLIER_REASONING = "the chat template leaves out the reasoning of earlier answers"
CHANGED = "the chat template shows the words of the answer otherwise than they are written"
NO_END = "the template gives an answer no end of its own that could be told from its words"
ELSEWHERE = "the chat template shows the answer behind something else than its generation prompt"


@dataclass(frozen=True, slots=True)
class _Frame:
    """Text between prompt and words, text behind the words of a last turn, how much of that is the answer's."""

    lead: str
    tail: str
    close: int
    ended: bool


class Answers:
    """Finds the answers of one template. ``marks`` are the tokens that may end a turn, longest first, EOS one of them.

    ``said`` is called with what is found about the row at hand.
    """

    def __init__(
        self, template: ChatTemplate, marks: Sequence[str], eos: str | None, said: Callable[[str], None]
    ) -> None:
        self._template, self._marks, self._eos, self._said = template, tuple(marks), eos, said
        self._frames: list[_Frame] = []
        self._hidden: dict[object, Hidden] = {}

    def lay_out(self, prompt: Turns, responses: Sequence[Turns], tools: Sequence[str]) -> list[Layout]:
        """Each response with its prompt. Raises :class:`Unrenderable` where the template will not have it."""
        for response in responses:
            self.check_shown(prompt + response, tools)
        row = _Row(self._template, tools)
        asked = row.show(prompt, generation=True)
        self.check_inline_reasoning(prompt, asked)
        return [self._lay_out(row, prompt, response, asked) for response in responses]

    def check_shown(self, turns: Turns, tools: Sequence[str]) -> None:
        """Refuse, or say, what the template leaves out. Asked once for all rows of one shape."""
        key = shape(turns, tools)
        if key not in self._hidden:
            if len(self._hidden) >= SHAPES:
                self._hidden.clear()
            self._hidden[key] = hidden(self._template, turns, tools)
        if self._hidden[key].problem:
            raise Unrenderable(self._hidden[key].problem)
        if self._hidden[key].earlier_reasoning:
            self._said(EARLIER_REASONING)

    def _lay_out(self, row: _Row, prompt: Turns, response: Turns, asked: str) -> Layout:
        turns = prompt + response
        full = row.show(turns, again=False)
        spans, close, ended = [], 0, False
        for j in range(len(prompt), len(turns)):
            if turns[j].role == "assistant" and turns[j].trained:
                prompted = asked if j == len(prompt) else row.show(turns[:j], generation=True, again=False)
                start, end, close, ended = self._answer(row, turns, j, full, prompted)
                self._check_words(turns[j], full[start:end], last=j == len(turns) - 1)
                spans.append((start, end))
        if not spans:
            raise Unrenderable("a response has no turn of the assistant to train")
        shared = len(asked) if full.startswith(asked) and len(asked) <= spans[0][0] else 0
        return Layout(full[: spans[-1][1]], tuple(spans), eos=not ended, shared=shared, close=close)

    def check_inline_reasoning(self, prompt: Turns, asked: str) -> None:
        """Say whether the template drops reasoning from the text of earlier answers."""
        for turn in prompt:
            if turn.role == "assistant" and "</think" in turn.content:
                reasoning = split_reasoning(turn.content)[0]
                if reasoning not in asked:
                    self._said(EARLIER_REASONING)

    def _check_words(self, turn: Message, shown: str, *, last: bool) -> None:
        """Say, or refuse, what the template makes of the words, if they do not stand there as they are."""
        if turn.content.strip() in shown:
            return
        reasoning, content = split_reasoning(turn.content)
        if content.strip() not in shown:
            self._said(CHANGED)
        if reasoning and reasoning not in shown:
            if last:
                what = "the template does not show the reasoning that stands in the answer"
                raise Unrenderable(f"{what}; --reasoning strip, or {OTHER_TEMPLATE}")
            self._said(EARLIER_REASONING)

    def _answer(self, row: _Row, turns: Turns, j: int, full: str, asked: str) -> tuple[int, int, int, bool]:
        """Trained characters [start, end) of turn j in ``full``, how many of them close the turn behind its words or
        calls, and whether an end-of-turn token is among those."""
        turn, begins = turns[j], full.startswith(asked)
        if begins and not turn.tool_calls and turn.reasoning is None:
            for frame in self._frames:
                if (end := _framed(full, len(asked), turn.content, frame, last=j == len(turns) - 1)) is not None:
                    return len(asked), end, frame.close, frame.ended
        probe = _unused(full, *(text for m in turns for text in _texts(m)))
        if begins:
            start = len(asked)
        else:
            self._said(ELSEWHERE)
            start = _start(row, turns, j, full, asked, probe)
        find = self._end_of_calls if turn.tool_calls else self._end_of_words
        end, frame = find(row, turns, j, full, probe)
        if start >= end - frame.close:
            raise Unrenderable("the template gives an answer no place of its own that could be told from its prompt")
        if begins and not turn.tool_calls and turn.reasoning is None and len(self._frames) < REMEMBERED:
            framed = full[start : end - frame.close]
            known = replace(frame, lead=framed.removesuffix(turn.content))
            if framed.endswith(turn.content) and known not in self._frames:
                self._frames.append(known)
        return start, end, frame.close, frame.ended

    def _end_of_words(self, row: _Row, turns: Turns, j: int, full: str, probe: str) -> tuple[int, _Frame]:
        """Where the answer of turn j ends, and what the template puts behind it (``lead`` is left empty)."""
        tail = _behind(row.show((*turns[:j], replace(turns[j], content=probe), *turns[j + 1 :])), probe, once=True)
        if not full.endswith(tail):
            raise Unrenderable(NO_END)
        mark, close = self._closing(tail)
        frame = _Frame("", tail if j == len(turns) - 1 else tail[:close], close, bool(mark))
        return len(full) - len(tail) + close, frame

    def _end_of_calls(self, row: _Row, turns: Turns, j: int, full: str, probe: str) -> tuple[int, _Frame]:
        """The same for a turn with tool calls. What closes them, and the turn, is seen where the turn is the last."""
        until, rest = (*turns[:j], _probe_calls(turns[j], probe)), turns[j + 1 :]
        plain = _behind(row.show((*turns[:j], _bare(turns[j], probe))), probe, once=True)
        tail = _common_end(row.show(turns[: j + 1]), _behind(row.show(until), probe))
        mark, close = self._closing_calls(tail, self._closing(plain)[0])
        tail_there = _common_end(full, _behind(row.show((*until, *rest)), probe)) if rest else tail
        if not close or not tail_there.startswith(tail[:close]):
            raise Unrenderable(NO_END)
        return len(full) - len(tail_there) + close, _Frame("", "", close, bool(mark))

    def _closing(self, tail: str) -> tuple[str, int]:
        """The end-of-turn token that text behind an answer begins with (or nothing), and where it ends there.

        Of several tokens in a row it is EOS, if that is one of them, else the first.
        """
        at = len(tail) - len(tail.lstrip())
        found: list[tuple[str, int]] = []
        while mark := next((m for m in self._marks if tail.startswith(m, at)), ""):
            at += len(mark)
            found.append((mark, at))
        return next((f for f in found if f[0] == self._eos), found[0] if found else ("", 0))

    def _closing_calls(self, tail: str, usual: str) -> tuple[str, int]:
        """The same in the text behind tool calls, up to the end of their turn. It closes the calls first.

        The token is the one that ends answers without calls, if it is there, else the last one.
        """
        places = {mark: tail.rfind(mark) for mark in self._marks if mark in tail}
        if not places:
            return "", len(tail.rstrip())
        mark = usual if usual in places else max(places, key=lambda m: places[m] + len(m))
        at = tail.find(mark) if mark == usual else places[mark]
        return mark, at + len(mark)


class _Row:
    """One row's template calls. What may be wanted ``again``, for another response, is kept."""

    def __init__(self, template: ChatTemplate, tools: Sequence[str]) -> None:
        self._template, self._tools = template, tools
        self._shown: dict[tuple[Turns, bool], str] = {}

    def show(self, turns: Turns, *, generation: bool = False, again: bool = True) -> str:
        if not again:
            return self._template.show(turns, self._tools, generation=generation)
        if (turns, generation) not in self._shown:
            self._shown[turns, generation] = self._template.show(turns, self._tools, generation=generation)
        return self._shown[turns, generation]


def _framed(full: str, at: int, words: str, frame: _Frame, *, last: bool) -> int | None:
    """Where the answer ends, if the text from ``at`` on is ``words`` in ``frame`` and nothing else."""
    begin = at + len(frame.lead)
    end = begin + len(words)
    if not (full.startswith(frame.lead, at) and full.startswith(words, begin)):
        return None
    if last:
        return end + frame.close if full[end:] == frame.tail else None
    return end + frame.close if frame.ended and full.startswith(frame.tail[: frame.close], end) else None


def _start(row: _Row, turns: Turns, j: int, full: str, asked: str, probe: str) -> int:
    """Where the answer of turn j starts in a text that does not begin with the generation prompt."""
    head = row.show((*turns[:j], _bare(turns[j], probe), *turns[j + 1 :])).partition(probe)[0]
    start = _common(full, head)
    before = row.show(turns[:j])
    if full.startswith(before) and asked.startswith(before):
        start = min(start, _common(full, asked))
    return start


def _bare(turn: Message, words: str) -> Message:
    return replace(turn, content=words, reasoning=None, tool_calls=())


def _probe_calls(turn: Message, probe: str) -> Message:
    """The probe in place of the last call's arguments and, lest they stand behind it, of the words."""
    last = replace(turn.tool_calls[-1], arguments=f'{{"{probe}": "{probe}"}}')
    content = probe if turn.content.strip() else turn.content
    return replace(turn, content=content, tool_calls=(*turn.tool_calls[:-1], last))


def _behind(text: str, probe: str, *, once: bool = False) -> str:
    """What stands behind the probe, which a template must show (``once``: not more often than that)."""
    seen = text.count(probe)
    if not seen or (once and seen > 1):
        raise Unrenderable(f"the template shows an answer {seen} times instead of once")
    return text.rpartition(probe)[2]


def _texts(turn: Message) -> Iterator[str]:
    yield from (turn.content, turn.reasoning or "")
    for call in turn.tool_calls:
        yield from (call.name, call.arguments)


def _unused(*texts: str) -> str:
    """A word that none of the texts holds."""
    return next(word for n in count() if not any((word := f"prefopt{n}probe") in text for text in texts))


def _common_end(one: str, other: str) -> str:
    """The text that both end with."""
    return one[len(one) - _common(one[::-1], other[::-1]) :]


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


if TYPE_CHECKING:
    from prefopt.data.chat.render import Renderer


def trained_ends(table: GroupTable, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that end responses, in ascending order: each is the last trained token of one that truncation
    left whole, and no trained token ever follows it.

    What is followed stands inside answers too, and ended one that was cut off there by chance, when it was sampled.
    """
    marks = list(map(int, tokenizer.convert_tokens_to_ids(list(end_marks(tokenizer)))))
    ending: set[int] = set()
    inside: set[int] = set()
    for part in table.parts:
        c = part.columns
        ids_T, trained_T = c["ids_T"], c["trained_T"]
        last_N = np.repeat(np.cumsum(c["prefix_G"], dtype=np.int64), c["responses_G"])
        last_N += np.cumsum(c["length_N"], dtype=np.int64) - 1
        whole_N = (c["cut_N"] == 0) & trained_T[last_N]
        ending.update(ids_T[last_N[whole_N]].tolist())
        others = np.setdiff1d(np.flatnonzero(np.isin(ids_T, marks)), last_N)
        inside.update(ids_T[others[trained_T[others] & trained_T[others + 1]]].tolist())
    return tuple(sorted(ending.intersection(marks) - inside))


def end_of_turn(renderer: Renderer) -> int | None:
    """The token that the chat template ends an answer with, as it shows on one; none where it has none."""
    probe = Comparison.pair([Message("user", "?")], chosen="!", rejected="?", row=0)
    try:
        group = renderer.render(probe).group
    except (DataError, ModelError):  # it wants a conversation of another kind
        return None
    last = int(group.continuations[0].ids[-1])
    return last if renderer.tokenizer.convert_ids_to_tokens(last) in end_marks(renderer.tokenizer) else None
