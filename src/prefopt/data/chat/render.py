"""From a comparison to a group: chat template, token ids, trained masks.

Each response is rendered with its prompt as one text. What is trained is known in characters first (see
:mod:`prefopt.data.chat.answers`), then in tokens (see :mod:`prefopt.data.chat.encoding`): those that cover the answer,
decoded, are the answer and its end-of-turn token. What a template puts after the last one is neither trained nor kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np

from prefopt.data.chat.answers import Answers
from prefopt.data.chat.encoding import Encoded, Encoder, Layout
from prefopt.data.chat.reasoning import field_reasoning, inline_reasoning, strip_reasoning
from prefopt.data.chat.render_options import Rendering
from prefopt.data.chat.template import ChatTemplate, Turns, Unrenderable
from prefopt.data.chat.truncate import Sequences, Shortener, prompt_excess, truncate, windows
from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.tokenizer import Tokenizer, end_marks, eos_id, leading_ids, tokenizer_digest
from prefopt.data.validate import Problem, Warnings, warning_lines
from prefopt.errors import DataError
from prefopt.records import Comparison, Response

BATCH = 64

NO_TEMPLATE = "the tokenizer has no chat template: turns are written as 'User: ...', 'Assistant: ...'"
NO_END = "the chat template ends no answer with a token of its own: EOS is added"
NO_END_AT_ALL = "the chat template ends no answer with a token of its own, and none is added"
NO_BOS = "the tokenizer puts a BOS before plain text and the chat template puts none: conversations have none"
DATED = "the chat template shows the day's date: cached tokens and reference serve that day only"
NO_FIELD = "the chat template has no place for reasoning: it is written into the answer, as <think>...</think>"
AS_IT_STANDS = (
    "plain text, which no chat template shows: the one given with --chat-template or its variables is not used"
)
SPECIAL = "special tokens written out in the text, read as those tokens"
INTO_FIELD = "reasoning inside of answers is put where the chat template has a field for it"
TURNS_DROPPED = "longer than --max-length: the oldest turns are dropped whole"
TURN_CUT = "longer than --max-length: a turn loses its first words (a system turn its last)"
LEFT_INSIDE = "reasoning inside of answers is shown as part of them, though the chat template has a field for it"
STRIPPED = "reasoning left out, as --reasoning strip says"
APART = "the tokenizer would join the end of the prompt to the answer: they are tokenized apart, as in sampling"
WINDOWS = "texts longer than --max-length, each cut into several rows"
JOINED = "the tokenizer joins the end of the prompt to the answer, which sampling never sees"


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A group, tokens cut from its prompt, and tokens cut from the end of each response.

    ``more``: the groups that follow, where a text was cut into windows.
    """

    group: Group
    prompt_cut: int = 0
    responses_cut: tuple[int, ...] = ()
    more: tuple[Group, ...] = ()


class Renderer:
    """Turns comparisons into groups with one tokenizer.

    A conversation goes through the chat template, or, where there is none, through the plain layout ``User: ...``,
    ``Assistant: ...`` (see :func:`plain_template`). A ``text`` comparison is prompt and response as they stand, BOS
    before them where the tokenizer wants it. ``template`` is the source that a model trained on conversations should
    carry, where its tokenizer has another or none. ``warnings`` collects what a person should be told: what is said,
    and the rows it concerns (none: it is said once); see :func:`prefopt.data.validate.lines`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        rendering: Rendering | None = None,
        *,
        max_length: int | None = None,
        add_eos: bool = True,
    ) -> None:
        """``max_length`` and ``add_eos`` stand for a rendering of their own.

        Raises :class:`ConfigError` for template variables that the template never reads, :class:`ModelError` for a
        template that is no Jinja and where EOS is needed and not there.
        """
        self.rendering = rendering or Rendering(max_length, add_eos)
        self.tokenizer = tokenizer
        self.warnings: Warnings = {}
        self._template = ChatTemplate(tokenizer, self.rendering)
        self.template: str | None = self._template.carried
        self._encoder = Encoder(tokenizer)
        self._lead = leading_ids(tokenizer)
        marks = end_marks(tokenizer)
        self._end_ids = frozenset(int(i) for i in tokenizer.convert_tokens_to_ids(list(marks)))
        special = sorted({*marks, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._answers = Answers(self._template, marks, tokenizer.eos_token, self._say)
        self._row = 0

    @property
    def notes(self) -> list[str]:
        """What to tell a person once, about all rows rendered so far."""
        return warning_lines(self.warnings)

    def digest(self) -> str:
        """16 bytes in hexadecimal that name all that ids and masks depend on beside the rows: a cache key.

        Tokenizer, template, its variables, length and reasoning; and the date where the template shows it.
        """
        date = self.rendering.date if self._template.reads_date else ""
        parts = [tokenizer_digest(self.tokenizer), self.rendering.digest(), *self._template.sources, date]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

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
            encoded = iter(self._encoder.encode_rows([row for row in laid if not isinstance(row, Problem)]))
            for comparison, row in zip(batch, laid, strict=True):
                if isinstance(row, Problem):
                    yield row
                    continue
                self._row = comparison.row
                parts = zip(row, next(encoded), strict=True)
                sequences = [self._sequence(layout, tokens) for layout, tokens in parts]
                shorter = self._shortened(comparison, sequences)
                rendered = self._group(comparison, shorter)
                if isinstance(rendered, Rendered) and shorter is not sequences:
                    dropped = _longest(sequences) - _longest(shorter)
                    rendered = replace(rendered, prompt_cut=rendered.prompt_cut + dropped)
                yield rendered

    def prompts(self, comparisons: Iterable[Comparison]) -> Iterator[IntArray | Problem]:
        """Token ids [P] up to where an answer begins, generation prompt included, or why there are none, in order.

        What a model is given to sample from. It is how the trained sequences begin, but for rows whose answers the
        template shows behind something else than its generation prompt (``warnings`` of :meth:`render_all` names
        them). Responses are not looked at, and nothing is truncated.
        """
        rows = iter(comparisons)
        while batch := list(islice(rows, BATCH)):
            laid = [self._lay_out_prompt(c) for c in batch]
            encoded = iter(self._encoder.encode([x.text for x in laid if not isinstance(x, Problem)]))
            for c, layout in zip(batch, laid, strict=True):
                if isinstance(layout, Problem):
                    yield layout
                    continue
                ids, _ = self._sequence(layout, next(encoded))
                yield ids if len(ids) else Problem("empty prompt", c.row, "the prompt has no token", c.file)

    def _lay_out_prompt(self, c: Comparison) -> Layout | Problem:
        self._row = c.row
        c = self._reasoned(c)
        if c.text:
            self._say_unused()
            return Layout("".join(m.content for m in c.prompt), (), bos=True)
        self._say_once()
        try:
            asked = self._template.show(c.prompt, c.tools, generation=True)
            self._answers.check_shown(c.prompt, c.tools)
            self._answers.check_inline_reasoning(c.prompt, asked)
            return Layout(asked, ())
        except Unrenderable as error:
            return Problem("chat template", c.row, str(error), c.file)

    def _lay_out(self, c: Comparison) -> list[Layout] | Problem:
        self._row = c.row
        c = self._reasoned(c)
        self._look_for_special_tokens(c)
        turns = [r.messages for r in c.responses]
        if not turns:
            return Problem("no response", c.row, "the row is a prompt without a response", c.file)
        if any(map(_empty, turns)):
            return Problem("empty response", c.row, "an answer holds no words, or nothing but reasoning", c.file)
        if c.text:
            self._say_unused()
            prompt = "".join(m.content for m in c.prompt)
            return [self._text(prompt, r) for r in c.responses]
        self._say_once()
        if not self._template.reads_reasoning and any(m.reasoning for r in turns for m in r):
            self._say(NO_FIELD, once=True)
        try:
            laid = self._answers.lay_out(c.prompt, turns, c.tools)
        except Unrenderable as error:
            return Problem("chat template", c.row, str(error), c.file)
        shown = [_broken_off(x, r) if r.cut else self._ended(x) for x, r in zip(laid, c.responses, strict=True)]
        found = [layout for layout in shown if layout is not None]
        if len(found) < len(shown):
            what = "a response was cut off at a limit, and the chat template does not show where its words end"
            return Problem("cut answer", c.row, what, c.file)
        return found

    def _ended(self, layout: Layout) -> Layout:
        """``eos`` as it is wanted: where the template ends no answer, and none is forbidden."""
        if not layout.eos:
            return layout
        self._say(NO_END if self.rendering.add_eos else NO_END_AT_ALL, once=True)
        return layout if self.rendering.add_eos else replace(layout, eos=False)

    def _text(self, prompt: str, response: Response) -> Layout:
        text = prompt + "".join(m.content for m in response.messages)
        eos = (
            not response.cut
            and self.rendering.add_eos
            and not text.endswith(str(self.tokenizer.convert_ids_to_tokens(self._eos)))
        )
        return Layout(text, ((len(prompt), len(text)),), bos=True, eos=eos)

    def _reasoned(self, c: Comparison) -> Comparison:
        """The row with its reasoning left out, or where the template wants it."""
        keep = self.rendering.reasoning == "keep"
        if keep and (c.text or not self._template.shows_blocks):
            return c
        change = field_reasoning if keep else strip_reasoning
        prompt: Turns = tuple(map(change, c.prompt))
        responses = tuple(replace(r, messages=tuple(map(change, r.messages))) for r in c.responses)
        if keep and any(map(inline_reasoning, (*prompt, *(m for r in responses for m in r.messages)))):
            self._say(LEFT_INSIDE)
        if prompt == c.prompt and responses == c.responses:
            return c
        self._say(INTO_FIELD if keep else STRIPPED)
        return replace(c, prompt=prompt, responses=responses)

    def _look_for_special_tokens(self, c: Comparison) -> None:
        eos, bos = self.tokenizer.eos_token or "", self.tokenizer.bos_token or ""
        for turns in (c.prompt, *(r.messages for r in c.responses)):
            for turn in turns:
                content = turn.content.removesuffix(eos) if turn.role == "assistant" else turn.content
                content = content.removeprefix(bos) if c.text else content
                if self._special.search(content) or (turn.reasoning and self._special.search(turn.reasoning)):
                    self._say(SPECIAL)
                    return

    def _say_unused(self) -> None:
        if self.rendering.chat_template is not None or self.rendering.variables:
            self._say(AS_IT_STANDS)

    def _say_once(self) -> None:
        """What is to be told of a chat template, whatever the rows."""
        if self._template.plain:
            self._say(NO_TEMPLATE, once=True)
        if self._lacks_bos:
            self._say(NO_BOS, once=True)
        if self._template.reads_date:
            self._say(DATED, once=True)

    @cached_property
    def _lacks_bos(self) -> bool:
        if not self._lead:
            return False
        start = "".join(self.tokenizer.convert_ids_to_tokens(self._lead))
        return not self._template.sample().startswith(start)

    @cached_property
    def _eos(self) -> int:
        return eos_id(self.tokenizer)

    def _say(self, what: str, *, once: bool = False) -> None:
        """Note what a person should be told: of the row at hand, or ``once`` for all."""
        rows = self.warnings.setdefault(what, [])
        if not once and rows[-1:] != [self._row]:
            rows.append(self._row)

    def _sequence(self, layout: Layout, tokens: Encoded) -> tuple[IntArray, BoolArray]:
        ids, trained = tokens.ids, tokens.covers(layout.spans)
        if tokens.boundary:
            self._say(APART if tokens.boundary == "apart" else JOINED)
        if layout.bos and ids[: len(self._lead)].tolist() != self._lead:
            ids = np.concatenate([np.array(self._lead, np.int32), ids])
            trained = np.concatenate([np.zeros(len(self._lead), np.bool_), trained])
        if layout.eos:
            ids, trained = np.append(ids, np.int32(self._eos)), np.append(trained, True)
        return ids, trained

    def _shortened(self, c: Comparison, sequences: Sequences) -> Sequences:
        """The sequences of a conversation with a prompt that fits, or with as few of its words as there can be."""
        limit = self.rendering.max_length
        if limit is None or c.text or not prompt_excess(sequences, limit):
            return sequences
        how = Shortener(limit, self._sequences, lambda text: next(iter(self._encoder.encode([text]))), self._special)
        fewer, left = how.drop_turns(c, sequences)
        if fewer is not c:
            self._say(TURNS_DROPPED)
        if prompt_excess(left, limit):
            left = how.cut_words(fewer, left)
            self._say(TURN_CUT)
        return left

    def _sequences(self, c: Comparison) -> Sequences | None:
        laid = self._lay_out(c)
        if isinstance(laid, Problem):
            return None
        encoded = next(iter(self._encoder.encode_rows([laid])))
        return [self._sequence(layout, tokens) for layout, tokens in zip(laid, encoded, strict=True)]

    def _group(self, c: Comparison, sequences: Sequence[tuple[IntArray, BoolArray]]) -> Rendered | Problem:
        def same(one: int, other: int) -> bool:
            return all(np.array_equal(a, b) for a, b in zip(sequences[one], sequences[other], strict=True))

        if any(same(*pair) for pair in c.pairs):
            return Problem("identical responses", c.row, "the responses are the same token for token", c.file)
        prompt_cut, responses_cut = 0, (0,) * len(sequences)
        limit = self.rendering.max_length
        try:
            if self.rendering.windows and limit and c.text and not any(m.content for m in c.prompt):
                parts = [Group.from_sequences([part], c.row, ()) for s in sequences for part in windows(*s, limit)]
                if len(parts) > len(sequences):
                    self._say(WINDOWS)
                return Rendered(parts[0], more=tuple(parts[1:]))
            if limit is not None and max(len(ids) for ids, _ in sequences) > limit:
                bos = self.tokenizer.bos_token_id
                cut = truncate(sequences, limit, bos=bos, ends=self._end_ids, whole_prompt=not c.text)
                sequences, prompt_cut, responses_cut = cut.sequences, cut.prompt, cut.responses
                if any(same(*pair) for pair in c.pairs):
                    what = f"the responses differ only beyond {limit} tokens"
                    return Problem("identical after truncation", c.row, what, c.file)
            if self.rendering.train_on == "all":
                sequences = [(ids, np.ones_like(trained)) for ids, trained in sequences]
            group = Group.from_sequences(sequences, c.row, c.pairs)
        except ValueError as error:
            return Problem("nothing to train", c.row, str(error), c.file)
        weights = None if c.votes is None else tuple(weight for *_, weight in c.votes)
        group = replace(group, weights=weights, tiers=c.tiers, scores=c.scores, labels=c.labels)
        return Rendered(group, prompt_cut, responses_cut)


def _longest(sequences: Sequences) -> int:
    return max(len(ids) for ids, _ in sequences)


def _empty(response: Turns) -> bool:
    """Whether a turn that is to be learned says and calls nothing."""
    return any(m.trained and m.role == "assistant" and not (m.content.strip() or m.tool_calls) for m in response)


def _broken_off(layout: Layout, response: Response) -> Layout | None:
    """The layout up to the end of its last words: nothing of what the template puts behind them is trained.

    None where the last turn is not shown with its words as they are, or holds more than words.
    """
    last, (start, end) = response.messages[-1], layout.spans[-1]
    shown = layout.text[start : end - layout.close].rstrip()
    words = last.content.strip()
    if not words or last.tool_calls or not shown.endswith(words):
        return None
    end = start + len(shown)
    return replace(layout, text=layout.text[:end], spans=(*layout.spans[:-1], (start, end)), eos=False, close=0)
