"""Trained spans: where the answers are in a rendered conversation, found by rendering, without knowing the template.

- An answer *starts* where the prompt with its generation prompt ends if the whole text begins with that. What the
  template adds behind it, such as an empty reasoning block, is the model's to write and hence trained. Otherwise the
  answer starts where the template puts the words of its turn.
- It *ends* with the end-of-turn token behind its words or behind its last tool call. That place is found by rendering a
  probe, a word that the row does not hold, in place of the words. The text that a template puts around a probe is
  remembered: where a text is exactly that around the row's own words, no probe is rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from prefopt.data.chat.template import Turns, Unrenderable
from prefopt.data.validate import texts_of

Row = Callable[..., str]  # a conversation of one row as text; each is rendered once

REMEMBERED = 8  # frames of one template; most have one
LONGEST_TAG = 32  # characters
NO_END = "the template does not end an answer with anything that can be told from its words"
ELSEWHERE = "the chat template puts something other than its generation prompt before the answer"


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

    def __init__(self, marks: Sequence[str], eos: str | None, report: Callable[[str], None]) -> None:
        self.marks, self._eos, self._report = tuple(marks), eos, report
        self._frames: list[_Frame] = []

    def find(
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
            raise Unrenderable("the template leaves no text of an answer that can be told from its prompt")
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
        while mark := next((m for m in self.marks if tail.startswith(m, at)), ""):
            at += len(mark)
            found.append((mark, at))
        return next((f for f in found if f[0] == self._eos), found[0] if found else ("", 0))

    def _closing_calls(self, tail: str, usual: str) -> tuple[str, int]:
        """The same in the text behind tool calls, up to the end of their turn; it closes the calls first.

        The token is the one that ends answers without calls if it is there, else the last one.
        """
        places = {mark: tail.rfind(mark) for mark in self.marks if mark in tail}
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


def behind_cue(row: Row, turns: Turns, full: str, before: str) -> int:
    """Where the answer of the last turn starts in ``full``, which shows earlier turns differently from ``before``
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
