"""Responses as texts with trained spans: as they were generated, or as the finished conversation shows them.

A response of several turns is trained *as it was generated* if each of its turns is rendered as the last one, behind
the generation prompt that the model was given there. As long as the template shows a turn unchanged when more follow,
one text serves all of them. Where it rewrites a turn (Qwen3, DeepSeek and gpt-oss drop its reasoning, or its end), the
turns from there on are another *step*: a text of its own, in which the rewritten turn is context and not trained.

*As shown*, it is one text: the finished conversation. ``auto`` does that for a row unless an earlier answer would lose
something of its own there, see :meth:`ResponseRenderer._as_shown`: n answers of which a template rewrites no more than
its own marks (Qwen3 puts an empty reasoning block before the last answer alone) are one text and not n.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

from prefopt.data.chat.encoding import RenderedText
from prefopt.data.chat.omissions import Omission, find_omission
from prefopt.data.chat.spans import ELSEWHERE, Row, SpanFinder, behind_cue
from prefopt.data.chat.template import (
    EARLIER_REASONING,
    OTHER_TEMPLATE,
    ChatTemplate,
    EarlierTurns,
    Turns,
    Unrenderable,
    split_reasoning,
    strip_reasoning,
)
from prefopt.records import Message, Response

SHAPES = 4096  # conversation shapes whose omissions are remembered
CHANGED = "the chat template changes the words of the answer"
STEPS = "the chat template changes earlier turns of a response: it is trained in steps, each as it was generated"
SHOWN = (
    "the chat template marks earlier answers differently from how they were generated, such as without"
    " an empty reasoning block: trained as the finished conversation shows them"
)
NO_REASONING = "the template does not show the reasoning of the answer"
_OPENED = re.compile(r"<think>(\n?)\Z")  # at the end of a generation prompt: the block is the model's to close
_CLOSED = re.compile(r"\s*<?/think>\s*")


class ResponseRenderer:
    """Renders the responses of a row with their prompt, in one template.

    ``marks`` are the tokens that may end a turn, longest first, EOS one of them. ``report`` is called with warnings
    about the current row. ``earlier`` says how the answers of a response are rendered that others follow.
    """

    def __init__(
        self,
        template: ChatTemplate,
        marks: Sequence[str],
        eos: str | None,
        report: Callable[[str], None],
        earlier: EarlierTurns,
    ) -> None:
        self._template, self._report, self._earlier = template, report, earlier
        self._spans = SpanFinder(marks, eos, lambda what: self._report(what))
        self._omissions: dict[object, Omission] = {}

    def render(self, prompt: Turns, responses: Sequence[Turns], tools: Sequence[str]) -> list[list[RenderedText]]:
        """The steps of each response with their prompt. Raises :class:`Unrenderable` where the template refuses one."""
        row: Row = cache(partial(self._template.apply, tools=tools))
        as_shown = self._earlier == "as-shown"
        for response in responses if as_shown else ():
            self.check_omissions(prompt + response, tools)
        prompt_text = row(prompt, generation=True)
        self.check_inline_reasoning(prompt, prompt_text)
        if as_shown:
            return [[self._whole(row, prompt, response, prompt_text)] for response in responses]
        several = any(len(_answers(prompt, response)) > 1 for response in responses)
        if several and self._earlier == "auto":
            with self._held() as findings:
                texts = self._as_shown(row, prompt, responses, prompt_text, tools)
            if texts is not None:
                for what in findings:
                    self._report(what)
                return [[text] for text in texts]
        return [self._generated(row, prompt, response, prompt_text, tools) for response in responses]

    def check_omissions(self, turns: Turns, tools: Sequence[str], *, context: int | None = None) -> None:
        """Refuse or report what the template leaves out; looked up once for all rows of one shape.

        Dropped reasoning is reported for the first ``context`` turns (default: all but the last) and for turns that
        are not trained; that of the last turn is refused.
        """
        found, last = self._omission(turns, tools), len(turns) - 1
        if found.refused:
            raise Unrenderable(found.refused)
        if last in found.reasoning:
            raise Unrenderable(f"{NO_REASONING}; use --reasoning strip, or {OTHER_TEMPLATE}")
        first = last if context is None else context
        if any(i < first or (i < last and not turns[i].trained) for i in found.reasoning):
            self._report(EARLIER_REASONING)

    def _omission(self, turns: Turns, tools: Sequence[str]) -> Omission:
        held = [(m.role, not m.content or m.content.isspace(), m.reasoning is None, len(m.tool_calls)) for m in turns]
        shape = (bool(tools), *held)
        if shape not in self._omissions:
            if len(self._omissions) >= SHAPES:
                self._omissions.clear()
            self._omissions[shape] = find_omission(self._template, turns, tools)
        return self._omissions[shape]

    def check_inline_reasoning(self, prompt: Turns, prompt_text: str) -> None:
        """Report whether the template drops reasoning from the text of earlier answers."""
        for turn in prompt:
            inline = turn.role == "assistant" and "</think" in turn.content
            if inline and split_reasoning(turn.content)[0] not in prompt_text:
                self._report(EARLIER_REASONING)

    @contextmanager
    def _held(self) -> Iterator[list[str]]:
        """What is found about the row meanwhile, not yet reported: it concerns a text that may not be used."""
        report, findings = self._report, list[str]()
        self._report = findings.append
        try:
            yield findings
        finally:
            self._report = report

    def _as_shown(
        self, row: Row, prompt: Turns, responses: Sequence[Turns], prompt_text: str, tools: Sequence[str]
    ) -> list[RenderedText] | None:
        """The responses as the finished conversation shows them; None where that loses something of the row's own.

        That is: reasoning, a tool call or words of a trained answer, the token that ends it, or reasoning of the
        prompt that the model was shown.
        """
        thoughts = {thought for m in prompt if m.role == "assistant" and (thought := _reasoning(m)) in prompt_text}
        texts = []
        try:
            for response in responses:
                turns, answers = prompt + response, _answers(prompt, response)
                lost = self._omission(turns, tools)
                if lost.refused or not lost.reasoning.isdisjoint(answers):
                    return None
                self.check_omissions(turns, tools, context=len(prompt))
                text = self._whole(row, prompt, response, prompt_text)
                if any(thought not in text.text for thought in thoughts):
                    return None
                if not all(self._keeps(row, turns, j, text, span) for j, span in zip(answers, text.spans, strict=True)):
                    return None
                if not self._ends_alike(row, turns, answers, text):
                    return None
                texts.append(text)
        except Unrenderable:
            return None
        return texts

    def _keeps(self, row: Row, turns: Turns, j: int, text: RenderedText, span: tuple[int, int]) -> bool:
        """Whether a finished conversation shows answer j with all that the answer held when it was the last."""
        turn, shown = turns[j], text.text[slice(*span)]
        if _reasoning(turn) not in shown or any(call.name not in shown for call in turn.tool_calls):
            return False
        words = split_reasoning(turn.content)[1].strip()
        # A template may change the words of every answer, also of the last one.
        return words in shown or (j < len(turns) - 1 and words not in row(turns[: j + 1]))

    def _ends_alike(self, row: Row, turns: Turns, answers: Sequence[int], text: RenderedText) -> bool:
        """Whether earlier answers end with the same token as when they were the last; changed marks are reported.

        A template tells answers apart by what they hold and by who follows, so the first of each kind is compared.
        """
        kinds: dict[tuple[bool, bool, str], int] = {}
        for k, j in enumerate(answers[:-1]):
            kinds.setdefault((bool(turns[j].tool_calls), bool(_reasoning(turns[j])), turns[j + 1].role), k)
        for k in kinds.values():
            j, (_, finish) = answers[k], text.spans[k]
            until, before = turns[: j + 1], row(turns[:j], generation=True)
            try:
                last = row(until)
                _, end, close, ended = self._spans.find(row, until, j, last, before, elsewhere=False)
            except Unrenderable:
                continue  # a template may refuse what no one has answered; the finished conversation it has shown
            if text.text.startswith(last[:end]):
                continue
            if ended and not text.text[:finish].rstrip().endswith(last[end - close : end].strip()):
                return False
            self._report(SHOWN)
        return True

    def _generated(
        self, row: Row, prompt: Turns, response: Turns, prompt_text: str, tools: Sequence[str]
    ) -> list[RenderedText]:
        """The response as it was generated; see the top of this file."""
        turns, steps, answers = prompt + response, list[RenderedText](), _answers(prompt, response)
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
                mark = next((m for m in self._spans.marks if step.text.startswith(m, end)), "")
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
        start, end, close, ended = self._spans.find(row, bare, j, full, before, elsewhere=False)
        self._check_words(bare[j], full[start:end], last=True)
        rest = full[found.end() : end] if (found := _CLOSED.match(full, start, end)) else full[start:end]
        text = before + reasoning + ("\n</think>\n\n" if opened[1] else "</think>") + rest
        return RenderedText(text, ((len(before), len(text)),), eos=not ended, close=close)

    def _last_turn(self, row: Row, turns: Turns, before: str) -> RenderedText:
        """The last of ``turns`` as the model writes it behind ``before``."""
        j, full = len(turns) - 1, row(turns)
        start, end, close, ended = self._spans.find(row, turns, j, full, before, elsewhere=False)
        self._check_words(turns[j], full[start:end], last=True)
        text = full[:end]
        if not full.startswith(before):
            if at := behind_cue(row, turns, full, before):
                text, start = before + full[at:end], len(before)
            else:
                self._report(ELSEWHERE)
        return RenderedText(text, ((start, len(text)),), eos=not ended, close=close)

    def _whole(self, row: Row, prompt: Turns, response: Turns, prompt_text: str) -> RenderedText:
        """The response as the finished conversation shows it."""
        turns = prompt + response
        full = row(turns)
        spans, close, ended = [], 0, False
        for j in _answers(prompt, response):
            before = prompt_text if j == len(prompt) else row(turns[:j], generation=True)
            start, end, close, ended = self._spans.find(row, turns, j, full, before)
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


def _answers(prompt: Turns, response: Turns) -> list[int]:
    """The trained turns of a response, as places in the conversation."""
    first = len(prompt)
    return [first + i for i, turn in enumerate(response) if turn.role == "assistant" and turn.trained]


def _reasoning(turn: Message) -> str:
    """The reasoning of a turn, in its field or at the start of its words; empty where it has none."""
    return (turn.reasoning or split_reasoning(turn.content)[0]).strip()


def cut_off(text: RenderedText, response: Response) -> RenderedText | None:
    """The text up to the end of its last words, without what the template puts behind them.

    None where the last turn is not shown with its words as they are, or holds more than words.
    """
    last, (start, end) = response.messages[-1], text.spans[-1]
    shown = text.text[start : end - text.close].rstrip()
    # Its reasoning may stand behind a generation prompt that opens the block, without the tag that the words have.
    words = next((w for m in (last, strip_reasoning(last)) if shown.endswith(w := m.content.strip())), "")
    if not words or last.tool_calls:
        return None
    end = start + len(shown)
    return replace(text, text=text.text[:end], spans=(*text.spans[:-1], (start, end)), eos=False, close=0)
