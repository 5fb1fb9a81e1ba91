"""Trained spans: where the answers are in a rendered conversation, found by rendering, without knowing the template.

- An answer *starts* where the prompt with its generation prompt ends if the whole text begins with that. What the
  template adds behind it, such as an empty reasoning block, is the model's to write and hence trained. Otherwise the
  answer starts where the template puts the words of its turn.
- It *ends* with the end-of-turn token behind its words or behind its last tool call. That place is found by rendering a
  probe, a word that the row does not hold, in place of the words. The text that a template puts around a probe is
  remembered: where a text is exactly that around the row's own words, no probe is rendered.

An answer of several turns is trained as it was generated: each of its turns is rendered as the last one, behind the
generation prompt that the model was given there. As long as the template shows a turn unchanged when more follow, one
text serves all of them. Where it rewrites a turn (Qwen3, DeepSeek and gpt-oss drop its reasoning, or its end), the
turns from there on are another *step*: a text of its own, in which the rewritten turn is context and not trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count

from prefopt.data.chat.encoding import RenderedText
from prefopt.data.chat.omissions import Omission, find_omission
from prefopt.data.chat.template import (
    EARLIER_REASONING,
    OTHER_TEMPLATE,
    ChatTemplate,
    Turns,
    Unrenderable,
    split_reasoning,
    strip_reasoning,
)
from prefopt.data.validate import texts_of
from prefopt.records import Message

Row = Callable[..., str]  # a conversation of one row as text; each is rendered once

REMEMBERED = 8  # frames of one template; most have one
LONGEST_TAG = 32  # characters
SHAPES = 4096  # conversation shapes whose omissions are remembered
CHANGED = "the chat template changes the words of the answer"
NO_END = "the template does not end an answer with anything that could be told from its words"
ELSEWHERE = "the chat template shows the answer behind something else than its generation prompt"
STEPS = "the chat template changes earlier turns of a response: it is trained in steps, each as it was generated"
NO_REASONING = "the template does not show the reasoning of the answer"
_OPENED = re.compile(r"<think>(\n?)\Z")  # at the end of a generation prompt: the block is the model's to close
_CLOSED = re.compile(r"\s*<?/think>\s*")


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
    about the current row. ``as_shown``: a response is one text, as the finished conversation shows it.
    """

    def __init__(
        self,
        template: ChatTemplate,
        marks: Sequence[str],
        eos: str | None,
        report: Callable[[str], None],
        *,
        as_shown: bool = False,
    ) -> None:
        self._template, self._marks, self._eos, self._report = template, tuple(marks), eos, report
        self._as_shown = as_shown
        self._frames: list[_Frame] = []
        self._omissions: dict[object, Omission] = {}

    def render(self, prompt: Turns, responses: Sequence[Turns], tools: Sequence[str]) -> list[list[RenderedText]]:
        """The steps of each response with their prompt. Raises :class:`Unrenderable` where the template refuses one."""
        row: Row = cache(partial(self._template.apply, tools=tools))
        for response in responses if self._as_shown else ():
            self.check_omissions(prompt + response, tools)
        prompt_text = row(prompt, generation=True)
        self.check_inline_reasoning(prompt, prompt_text)
        if self._as_shown:
            return [[self._whole(row, prompt, response, prompt_text)] for response in responses]
        return [self._steps(row, prompt, response, prompt_text, tools) for response in responses]

    def check_omissions(self, turns: Turns, tools: Sequence[str], *, context: int | None = None) -> None:
        """Refuse or report what the template leaves out; looked up once for all rows of one shape.

        Dropped reasoning is reported for the first ``context`` turns (default: all but the last) and for turns that
        are not trained; that of the last turn is refused.
        """
        held = [(m.role, not m.content or m.content.isspace(), m.reasoning is None, len(m.tool_calls)) for m in turns]
        shape = (bool(tools), *held)
        if shape not in self._omissions:
            if len(self._omissions) >= SHAPES:
                self._omissions.clear()
            self._omissions[shape] = find_omission(self._template, turns, tools)
        found, last = self._omissions[shape], len(turns) - 1
        if found.refused:
            raise Unrenderable(found.refused)
        if last in found.reasoning:
            raise Unrenderable(f"{NO_REASONING}; use --reasoning strip, or {OTHER_TEMPLATE}")
        first = last if context is None else context
        if any(i < first or (i < last and not turns[i].trained) for i in found.reasoning):
            self._report(EARLIER_REASONING)

    def check_inline_reasoning(self, prompt: Turns, prompt_text: str) -> None:
        """Report whether the template drops reasoning from the text of earlier answers."""
        for turn in prompt:
            inline = turn.role == "assistant" and "</think" in turn.content
            if inline and split_reasoning(turn.content)[0] not in prompt_text:
                self._report(EARLIER_REASONING)

    def _steps(
        self, row: Row, prompt: Turns, response: Turns, prompt_text: str, tools: Sequence[str]
    ) -> list[RenderedText]:
        """The response as it was generated; see the module's docstring."""
        turns, steps = prompt + response, list[RenderedText]()
        answers = [j for j in range(len(prompt), len(turns)) if turns[j].role == "assistant" and turns[j].trained]
        for j in answers:
            before = prompt_text if j == len(prompt) else row(turns[:j], generation=True)
            until = turns[: j + 1]
            step = self._behind_opened(row, until, before, tools, len(prompt))
            if step is None:
                # What is left out of all turns shows at the last one; reasoning may be dropped there by design.
                if until[-1].reasoning is not None or j == answers[-1]:
                    self.check_omissions(until, tools, context=len(prompt))
                step = self._last_turn(row, until, before)
            so_far = steps[-1] if steps else None
            if so_far is None or not step.text.startswith(so_far.text):
                steps.append(replace(step, further=so_far is not None))
                continue
            spans = so_far.spans
            if so_far.eos:
                # What follows an answer without an end is where the model must stop, if it is a token (as in GLM).
                start, end = spans[-1]
                mark = next((m for m in self._marks if step.text.startswith(m, end)), "")
                spans = (*spans[:-1], (start, end + len(mark)))
            steps[-1] = replace(step, spans=(*spans, *step.spans), shared=so_far.shared, further=so_far.further)
        if not steps:
            raise Unrenderable("the response has no assistant turn to train")
        if len(steps) > 1:
            self._report(STEPS)
        return [replace(s, shared=self._shared(s, prompt_text)) for s in steps]

    def _shared(self, step: RenderedText, prompt_text: str) -> int:
        begins = step.text.startswith(prompt_text) and len(prompt_text) <= step.spans[0][0]
        return len(prompt_text) if begins else 0

    def _behind_opened(
        self, row: Row, turns: Turns, before: str, tools: Sequence[str], context: int
    ) -> RenderedText | None:
        """The last of ``turns`` with its reasoning behind a generation prompt that opens the block for it, where the
        template does not show it there (DeepSeek's remove it from every finished answer); None elsewhere."""
        j, opened = len(turns) - 1, _OPENED.search(before)
        reasoning = turns[j].reasoning or split_reasoning(turns[j].content)[0]
        if not opened or not reasoning:
            return None
        shown = row(turns)
        if shown.startswith(before) and shown[len(before) :].lstrip().startswith(reasoning.strip()):
            return None
        bare = (*turns[:j], strip_reasoning(turns[j]))
        self.check_omissions(bare, tools, context=context)
        full = row(bare)
        start, end, close, ended = self._span(row, bare, j, full, before, elsewhere=False)
        self._check_words(bare[j], full[start:end], last=True)
        rest = full[found.end() : end] if (found := _CLOSED.match(full, start, end)) else full[start:end]
        text = before + reasoning + ("\n</think>\n\n" if opened[1] else "</think>") + rest
        return RenderedText(text, ((len(before), len(text)),), eos=not ended, close=close)

    def _last_turn(self, row: Row, turns: Turns, before: str) -> RenderedText:
        """The last of ``turns`` as the model writes it behind ``before``."""
        j, full = len(turns) - 1, row(turns)
        start, end, close, ended = self._span(row, turns, j, full, before, elsewhere=False)
        self._check_words(turns[j], full[start:end], last=True)
        text = full[:end]
        if not full.startswith(before):
            if at := _behind_cue(row, turns, full, before):
                text, start = before + full[at:end], len(before)
            else:
                self._report(ELSEWHERE)
        return RenderedText(text, ((start, len(text)),), eos=not ended, close=close)

    def _whole(self, row: Row, prompt: Turns, response: Turns, prompt_text: str) -> RenderedText:
        """The response as the finished conversation shows it."""
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
        text = RenderedText(full[: spans[-1][1]], tuple(spans), eos=not ended, close=close)
        return replace(text, shared=self._shared(text, prompt_text))

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

    def _span(
        self, row: Row, turns: Turns, j: int, full: str, before: str, *, elsewhere: bool = True
    ) -> tuple[int, int, int, bool]:
        """Trained characters [start, end) of turn j in ``full``, how many of them close the turn behind its words or
        calls, and whether an end-of-turn token is among those. ``before``: the turns before it with the generation
        prompt. ``elsewhere``: report where ``full`` does not begin with that."""
        turn, begins = turns[j], full.startswith(before)
        simple = begins and not turn.tool_calls and turn.reasoning is None
        for frame in self._frames if simple else ():
            if (end := _framed(full, len(before), turn.content, frame, last=j == len(turns) - 1)) is not None:
                return len(before), end, frame.close, frame.ended
        texts = (full, *(text for m in turns for text in texts_of(m)))
        probe = _probe(texts)
        start = len(before)
        if not begins:
            if elsewhere:
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


def _probe(texts: Sequence[str]) -> str:
    """A word that no text holds."""
    return next(word for n in count() if not any((word := f"prefopt{n}probe") in text for text in texts))


def _behind_cue(row: Row, turns: Turns, full: str, before: str) -> int:
    """Where the answer of the last turn starts in ``full``, which shows earlier turns otherwise than ``before`` does
    (gpt-oss drops the reasoning of a chain of calls once the answer is there): behind the same generation prompt. 0
    where that is not found."""
    finished = row(turns[:-1])
    cue = before.removeprefix(finished)
    if not before.startswith(finished) or not cue.strip():
        return 0
    probe = _probe((full, *(text for m in turns for text in texts_of(m))))
    bare = replace(turns[-1], content=probe, reasoning=None, tool_calls=())
    last = f"{probe}last"
    heads = [row((*turns[:-2], m, bare)).rpartition(probe)[0] for m in (turns[-2], replace(turns[-2], content=last))]
    at, behind = (head.rfind(cue) for head in heads)
    # The generation prompt of this very turn: the turn before it stands before that.
    found = at >= 0 and full.startswith(heads[0][: at + len(cue)]) and last in heads[1][:behind]
    return at + len(cue) if found else 0


def _start(row: Row, turns: Turns, j: int, full: str, before: str, probe: str) -> int:
    """Where the answer of turn j starts in a text that does not begin with the generation prompt."""
    bare = replace(turns[j], content=probe, reasoning=None, tool_calls=())
    head = row((*turns[:j], bare, *turns[j + 1 :])).partition(probe)[0]
    start = _common(full, head)
    finished = row(turns[:j])
    if full.startswith(finished) and before.startswith(finished):
        start = min(start, _common(full, before))
        tag = full.rfind("<", start - LONGEST_TAG if start > LONGEST_TAG else 0, start)
        start = tag if tag >= 0 and ">" not in full[tag:start] else start  # never within <think> and </think>
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
