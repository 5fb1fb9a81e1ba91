"""Trained spans: where the answers are in a rendered conversation, found by rendering, without knowing the template.

- An answer *starts* where the prompt with its generation prompt ends if the whole text begins with that. What the
  template adds behind it, such as an empty reasoning block, is the model's to write and hence trained. Otherwise the
  answer starts where the template puts the words of its turn.
- It *ends* with the end-of-turn token behind its words or behind its last tool call. That place is found by rendering a
  probe, a word that the row does not hold, in place of the words. The text that a template puts around a probe is
  remembered: where a text is exactly that around the row's own words, no probe is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.chat.encoding import RenderedText
from prefopt.data.chat.template import (
    EARLIER_REASONING,
    OTHER_TEMPLATE,
    ChatTemplate,
    Turns,
    Unrenderable,
    split_reasoning,
)
from prefopt.data.table import GroupTable
from prefopt.data.tokenizer import Tokenizer, end_marks
from prefopt.data.validate import texts_of
from prefopt.errors import DataError, ModelError
from prefopt.records import Comparison, Message

if TYPE_CHECKING:
    from prefopt.data.chat.render import Renderer

Row = Callable[..., str]  # a conversation of one row as text; each is rendered once

REMEMBERED = 8  # frames of one template; most have one
SHAPES = 4096  # conversation shapes whose omissions are remembered
CHANGED = "the chat template changes the words of the answer"
PROBE = "prefoptshown"
NO_END = "the template does not end an answer with anything that could be told from its words"
ELSEWHERE = "the chat template shows the answer behind something else than its generation prompt"


@dataclass(frozen=True, slots=True)
class _Frame:
    """The text between prompt and words, the text behind the words of a last turn, and how much of that is trained."""

    lead: str
    tail: str
    close: int
    ended: bool


class SpanFinder:
    """Finds the trained spans of one template's conversations.

    ``marks`` are the tokens that may end a turn, longest first, EOS one of them. ``report`` is called with warnings
    about the current row.
    """

    def __init__(
        self, template: ChatTemplate, marks: Sequence[str], eos: str | None, report: Callable[[str], None]
    ) -> None:
        self._template, self._marks, self._eos, self._report = template, tuple(marks), eos, report
        self._frames: list[_Frame] = []
        self._omissions: dict[object, str] = {}

    def render(self, prompt: Turns, responses: Sequence[Turns], tools: Sequence[str]) -> list[RenderedText]:
        """Each response with its prompt. Raises :class:`Unrenderable` where the template refuses one."""
        for response in responses:
            self.check_omissions(prompt + response, tools)
        row: Row = cache(partial(self._template.apply, tools=tools))
        prompt_text = row(prompt, generation=True)
        self.check_inline_reasoning(prompt, prompt_text)
        return [self._render(row, prompt, response, prompt_text) for response in responses]

    def check_omissions(self, turns: Turns, tools: Sequence[str]) -> None:
        """Refuse or report what the template leaves out; looked up once for all rows of one shape."""
        held = [(m.role, not m.content or m.content.isspace(), m.reasoning is None, len(m.tool_calls)) for m in turns]
        shape = (bool(tools), *held)
        if shape not in self._omissions:
            if len(self._omissions) >= SHAPES:
                self._omissions.clear()
            self._omissions[shape] = _find_omission(self._template, turns, tools)
        if self._omissions[shape] == EARLIER_REASONING:
            self._report(EARLIER_REASONING)
        elif self._omissions[shape]:
            raise Unrenderable(self._omissions[shape])

    def check_inline_reasoning(self, prompt: Turns, prompt_text: str) -> None:
        """Report whether the template drops reasoning from the text of earlier answers."""
        for turn in prompt:
            inline = turn.role == "assistant" and "</think" in turn.content
            if inline and split_reasoning(turn.content)[0] not in prompt_text:
                self._report(EARLIER_REASONING)

    def _render(self, row: Row, prompt: Turns, response: Turns, prompt_text: str) -> RenderedText:
        turns = prompt + response
        full = row(turns)
        spans, close, ended = [], 0, False
        for j in range(len(prompt), len(turns)):
            if turns[j].role == "assistant" and turns[j].trained:
                before = prompt_text if j == len(prompt) else row(turns[:j], generation=True)
                start, end, close, ended = self._span(row, turns, j, full, before)
                self._check_words(turns[j], full[start:end], last=j == len(turns) - 1)
                spans.append((start, end))
        if not spans:
            raise Unrenderable("the response has no assistant turn to train")
        shared = len(prompt_text) if full.startswith(prompt_text) and len(prompt_text) <= spans[0][0] else 0
        return RenderedText(full[: spans[-1][1]], tuple(spans), eos=not ended, shared=shared, close=close)

    def _check_words(self, turn: Message, shown: str, *, last: bool) -> None:
        """Report or refuse changes that the template makes to the words."""
        if turn.content.strip() in shown:
            return
        reasoning, content = split_reasoning(turn.content)
        if content.strip() not in shown:
            self._report(CHANGED)
        if reasoning and reasoning not in shown:
            if last:
                what = "the template does not show the reasoning inside the answer"
                raise Unrenderable(f"{what}; use --reasoning strip, or {OTHER_TEMPLATE}")
            self._report(EARLIER_REASONING)

    def _span(self, row: Row, turns: Turns, j: int, full: str, before: str) -> tuple[int, int, int, bool]:
        """Trained characters [start, end) of turn j in ``full``, how many of them close the turn behind its words or
        calls, and whether an end-of-turn token is among those. ``before``: the turns before it with the generation
        prompt."""
        turn, begins = turns[j], full.startswith(before)
        simple = begins and not turn.tool_calls and turn.reasoning is None
        for frame in self._frames if simple else ():
            if (end := _framed(full, len(before), turn.content, frame, last=j == len(turns) - 1)) is not None:
                return len(before), end, frame.close, frame.ended
        texts = (full, *(text for m in turns for text in texts_of(m)))
        probe = next(word for n in count() if not any((word := f"prefopt{n}probe") in text for text in texts))
        start = len(before)
        if not begins:
            self._report(ELSEWHERE)
            start = _start(row, turns, j, full, before, probe)
        find = self._end_of_calls if turn.tool_calls else self._end_of_words
        end, frame = find(row, turns, j, full, probe)
        if start >= end - frame.close:
            raise Unrenderable("the template leaves no text of an answer that could be told from its prompt")
        if simple and len(self._frames) < REMEMBERED:
            framed = full[start : end - frame.close]
            known = replace(frame, lead=framed.removesuffix(turn.content))
            if framed.endswith(turn.content) and known not in self._frames:
                self._frames.append(known)
        return start, end, frame.close, frame.ended

    def _end_of_words(self, row: Row, turns: Turns, j: int, full: str, probe: str) -> tuple[int, _Frame]:
        """Where the answer of turn j ends, and what the template puts behind it (``lead`` is left empty)."""
        tail = _behind(row((*turns[:j], replace(turns[j], content=probe), *turns[j + 1 :])), probe, once=True)
        if not full.endswith(tail):
            raise Unrenderable(NO_END)
        mark, close = self._closing(tail)
        frame = _Frame("", tail if j == len(turns) - 1 else tail[:close], close, bool(mark))
        return len(full) - len(tail) + close, frame

    def _end_of_calls(self, row: Row, turns: Turns, j: int, full: str, probe: str) -> tuple[int, _Frame]:
        """The same for a turn with tool calls. What closes them, and the turn, is found with the turn as the last."""
        turn, rest = turns[j], turns[j + 1 :]
        # The probe is the last call's arguments and, in case they follow the call, the words.
        last = replace(turn.tool_calls[-1], arguments=f'{{"{probe}": "{probe}"}}')
        content = probe if turn.content.strip() else turn.content
        until = (*turns[:j], replace(turn, content=content, tool_calls=(*turn.tool_calls[:-1], last)))
        bare = replace(turn, content=probe, reasoning=None, tool_calls=())
        plain = _behind(row((*turns[:j], bare)), probe, once=True)
        tail = common_end(row(turns[: j + 1]), _behind(row(until), probe))
        mark, close = self._closing_calls(tail, self._closing(plain)[0])
        tail_there = common_end(full, _behind(row((*until, *rest)), probe)) if rest else tail
        if not close or not tail_there.startswith(tail[:close]):
            raise Unrenderable(NO_END)
        return len(full) - len(tail_there) + close, _Frame("", "", close, bool(mark))

    def _closing(self, tail: str) -> tuple[str, int]:
        """The end-of-turn token at the start of the text behind an answer (or nothing), and where it ends there.

        Of several tokens in a row it is EOS if that is one of them, else the first.
        """
        at = len(tail) - len(tail.lstrip())
        found: list[tuple[str, int]] = []
        while mark := next((m for m in self._marks if tail.startswith(m, at)), ""):
            at += len(mark)
            found.append((mark, at))
        return next((f for f in found if f[0] == self._eos), found[0] if found else ("", 0))

    def _closing_calls(self, tail: str, usual: str) -> tuple[str, int]:
        """The same in the text behind tool calls, up to the end of their turn; it closes the calls first.

        The token is the one that ends answers without calls if it is there, else the last one.
        """
        places = {mark: tail.rfind(mark) for mark in self._marks if mark in tail}
        if not places:
            return "", len(tail.rstrip())
        mark = usual if usual in places else max(places, key=lambda m: places[m] + len(m))
        at = tail.find(mark) if mark == usual else places[mark]
        return mark, at + len(mark)


def _framed(full: str, at: int, words: str, frame: _Frame, *, last: bool) -> int | None:
    """Where the answer ends, if the text from ``at`` on is ``words`` in ``frame`` and nothing else."""
    begin = at + len(frame.lead)
    end = begin + len(words)
    if not (full.startswith(frame.lead, at) and full.startswith(words, begin)):
        return None
    if last:
        return end + frame.close if full[end:] == frame.tail else None
    return end + frame.close if frame.ended and full.startswith(frame.tail[: frame.close], end) else None


def _start(row: Row, turns: Turns, j: int, full: str, before: str, probe: str) -> int:
    """Where the answer of turn j starts in a text that does not begin with the generation prompt."""
    bare = replace(turns[j], content=probe, reasoning=None, tool_calls=())
    head = row((*turns[:j], bare, *turns[j + 1 :])).partition(probe)[0]
    start = _common(full, head)
    finished = row(turns[:j])
    if full.startswith(finished) and before.startswith(finished):
        start = min(start, _common(full, before))
    return start


def _behind(text: str, probe: str, *, once: bool = False) -> str:
    """The text behind the probe, which must be there (``once``: exactly once)."""
    seen = text.count(probe)
    if not seen or (once and seen > 1):
        raise Unrenderable(f"the template shows an answer {seen} times instead of once")
    return text.rpartition(probe)[2]


def common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    return one[len(one) - _common(one[::-1], other[::-1]) :]


def _common(one: str, other: str) -> int:
    """The length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _find_omission(template: ChatTemplate, turns: Turns, tools: Sequence[str]) -> str:
    """What the template leaves out of a conversation, found by rendering unique words in place of its own.

    Empty where it shows everything; :data:`EARLIER_REASONING`, the design of many thinking models, is no reason to
    refuse the row, everything else is.
    """
    probes, reasoning, required = [], [], dict[str, str]()
    for i, turn in enumerate(turns):
        content, thought = turn.content, None
        if content.strip():
            content = f"{PROBE}c{i}x"
            required[content] = f"the {turn.role} turn"
        if turn.reasoning is not None:
            thought = f"{PROBE}r{i}x"
            reasoning.append(thought)
        calls = tuple(replace(call, name=f"{PROBE}t{i}n{k}x") for k, call in enumerate(turn.tool_calls))
        required.update(dict.fromkeys((call.name for call in calls), "a tool call"))
        probes.append(replace(turn, content=content, reasoning=thought, tool_calls=calls))
    functions = []
    for k, tool in enumerate(tools):
        name = f"{PROBE}f{k}x"
        functions.append(_renamed(tool, name))
        if name in functions[-1]:
            required[name] = "the tools"
    try:
        text = template.apply(tuple(probes), functions)
    except Unrenderable:
        return ""  # it may check names or words; whether it accepts the row itself is seen on rendering that
    missing = list(dict.fromkeys(what for probe, what in required.items() if probe not in text))
    if missing:
        return f"the template does not show {' and '.join(missing)} of the row; {OTHER_TEMPLATE}"
    dropped = [probe for probe in reasoning if probe not in text]
    if dropped and dropped[-1] == reasoning[-1] and turns[-1].reasoning is not None:
        return f"the template does not show the reasoning of the answer; use --reasoning strip, or {OTHER_TEMPLATE}"
    return EARLIER_REASONING if dropped else ""


def _renamed(tool: str, name: str) -> str:
    """The tool, a JSON object as text, under another name; unchanged where it has none."""
    try:
        value = json.loads(tool)
    except ValueError:
        return tool
    function = value.get("function", value) if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        function["name"] = name
    return json.dumps(value)


def trained_ends(table: GroupTable, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that end responses, in ascending order.

    Each is the last trained token of a response that was not truncated, and no trained token ever follows it. A token
    that is followed occurs inside answers too, and ended one that was cut off there by chance when it was sampled.
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
    """The token that the chat template ends an answer with, found on a probe; None where there is none."""
    probe = Comparison.pair([Message("user", "?")], chosen="!", rejected="?", row=0)
    try:
        group = renderer.render(probe).group
    except (DataError, ModelError):  # it wants a conversation of another kind
        return None
    last = int(group.continuations[0].ids[-1])
    return last if renderer.tokenizer.convert_ids_to_tokens(last) in end_marks(renderer.tokenizer) else None
