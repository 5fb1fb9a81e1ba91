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

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np

from prefopt.data.findings import Findings, lines
from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.rendering import Rendering
from prefopt.data.template import ChatTemplate, Turns, Unrenderable
from prefopt.data.tokenizer import OffsetArray, Tokenizer, encode, end_marks, eos_id, leading_ids, tokenizer_digest
from prefopt.data.truncate import truncate
from prefopt.data.validate import Problem
from prefopt.errors import DataError
from prefopt.records import Comparison

BATCH = 64


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


class Renderer:
    """Turns comparisons into groups with one tokenizer.

    A conversation goes through the chat template, or, where there is none, through the plain layout ``User: ...``,
    ``Assistant: ...`` (see :func:`plain_template`). A ``text`` comparison is prompt and response as they stand, BOS
    before them where the tokenizer wants it. ``template`` is the source that a model trained on conversations should
    carry, where its tokenizer has another or none. ``findings`` collects what a person should be told: what is said,
    and the rows it concerns (none: it is said once); see :func:`prefopt.data.findings.lines`.
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
        self.max_length, self.add_eos = self.rendering.max_length, self.rendering.add_eos
        self.tokenizer = tokenizer
        self.findings: Findings = {}
        self._template = ChatTemplate(tokenizer, self.rendering)
        self.template: str | None = self._template.carried
        self._lead = leading_ids(tokenizer)
        self._marks = end_marks(tokenizer)
        self._mark_pattern = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")

    @property
    def notes(self) -> list[str]:
        """What to tell a person once, about all rows rendered so far."""
        return lines(self.findings)

    def digest(self) -> str:
        """16 bytes in hexadecimal that name all that ids and masks depend on beside the rows: a cache key.

        Tokenizer, template, its variables, length and reasoning; and the date where the template shows it.
        """
        date = datetime.date.today().isoformat() if self._template.reads_date else ""
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
            texts = [layout.text for row in laid if not isinstance(row, Problem) for layout in row]
            encoded = iter(encode(self.tokenizer, texts))
            for comparison, row in zip(batch, laid, strict=True):
                if isinstance(row, Problem):
                    yield row
                else:
                    yield self._group(comparison, [self._sequence(x, *next(encoded)) for x in row])

    def prompts(self, comparisons: Iterable[Comparison]) -> Iterator[IntArray | Problem]:
        """Token ids [P] up to where an answer begins, generation prompt included, or why there are none, in order.

        What a model is given to sample from. It is how the trained sequence begins, unless the tokenizer joins the
        end of the prompt and the start of an answer into one token, or the template shows a finished answer behind
        something else than its generation prompt (an opened reasoning block, say). Responses are not looked at, and
        nothing is truncated.
        """
        rows = iter(comparisons)
        while batch := list(islice(rows, BATCH)):
            laid = [self._lay_out_prompt(c) for c in batch]
            encoded = iter(encode(self.tokenizer, [x.text for x in laid if not isinstance(x, Problem)]))
            for c, layout in zip(batch, laid, strict=True):
                if isinstance(layout, Problem):
                    yield layout
                    continue
                ids, _ = self._sequence(layout, *next(encoded))
                yield ids if len(ids) else Problem("empty prompt", c.row, "the prompt has no token", c.file)

    def _lay_out_prompt(self, c: Comparison) -> Layout | Problem:
        if c.text:
            return Layout("".join(m.content for m in c.prompt), (), bos=True)
        try:
            return Layout(self._template.show(c.prompt, c.tools, generation=True), ())
        except Unrenderable as error:
            return Problem("chat template", c.row, str(error), c.file)

    def _say(self, what: str, c: Comparison | None = None) -> None:
        """Note what a person should be told, of a row or once."""
        rows = self.findings.setdefault(what, [])
        if c is not None:
            rows.append(c.row)

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
            group = Group.from_sequences(sequences, c.row, c.pairs)
            weights = None if c.votes is None else tuple(weight for *_, weight in c.votes)
            group = replace(group, weights=weights, tiers=c.tiers, scores=c.scores, labels=c.labels)
            return Rendered(group, prompt_cut, responses_cut)
        except ValueError as error:
            return Problem("nothing to train", c.row, str(error), c.file)

    def _lay_out(self, c: Comparison) -> list[Layout] | Problem:
        eos = str(self.tokenizer.eos_token)
        contents = [m.content.removesuffix(eos) for r in (c.prompt, *(x.messages for x in c.responses)) for m in r]
        if any(self._mark_pattern.search(content) for content in contents):
            self._say("special tokens written out in the text, read as those tokens", c)
        if c.text:
            prompt = "".join(m.content for m in c.prompt)
            return [self._text(prompt, "".join(m.content for m in r.messages)) for r in c.responses]
        if self._template.plain:
            self._say("the tokenizer has no chat template: turns are written as 'User: ...', 'Assistant: ...'")
        shown: dict[tuple[Turns, bool], str] = {}
        try:
            return [self._conversation(c, r.messages, shown) for r in c.responses]
        except Unrenderable as error:
            return Problem("chat template", c.row, str(error), c.file)

    def _text(self, prompt: str, response: str) -> Layout:
        text = prompt + response
        eos = self.add_eos and not text.endswith(str(self.tokenizer.convert_ids_to_tokens(eos_id(self.tokenizer))))
        return Layout(text, ((len(prompt), len(text)),), bos=True, eos=eos)

    def _conversation(self, c: Comparison, response: Turns, shown: dict[tuple[Turns, bool], str]) -> Layout:
        def show(turns: Turns, generation: bool) -> str:
            """What the responses of one prompt have in common is rendered once."""
            if (turns, generation) not in shown:
                shown[turns, generation] = self._template.show(turns, c.tools, generation=generation)
            return shown[turns, generation]

        whole = c.prompt + response
        full = show(whole, False)
        spans, ended = [], False
        for j in range(len(c.prompt), len(whole)):
            if whole[j].role == "assistant" and whole[j].trained:
                start, end, ended = self._turn(whole, j, full, show)
                spans.append((start, end))
        if not spans:
            raise Unrenderable("a response has no turn of the assistant to train")
        if not ended and self.add_eos:
            eos_id(self.tokenizer)
            self._say("the chat template ends no answer with a token of its own: EOS is added")
        return Layout(full[: spans[-1][1]], tuple(spans), eos=not ended and self.add_eos)

    def _turn(self, whole: Turns, j: int, full: str, show: Callable[[Turns, bool], str]) -> tuple[int, int, bool]:
        """Trained characters [start, end) of turn j in ``full``, and whether an end-of-turn token is among them."""
        mark = _probe(full, *(m.content for m in whole))
        around = show((*whole[:j], replace(whole[j], content=mark), *whole[j + 1 :]), False).split(mark)
        if len(around) != 2:
            raise Unrenderable(f"the template shows an answer {len(around) - 1} times instead of once")
        head, tail = around
        words_end = len(full) - len(tail)
        asked = show(whole[:j], True)
        if full.startswith(asked):
            start = len(asked)
        else:
            start = _common(full, head)
            before = show(whole[:j], False)
            if full.startswith(before) and asked.startswith(before):
                start = min(start, _common(full, asked))
        if not full.endswith(tail) or start >= words_end:
            raise Unrenderable("the template gives an answer no place of its own that could be told from its prompt")
        rest = tail.lstrip()
        end = next((m for m in self._marks if rest.startswith(m)), None)
        if end is None:
            return start, words_end, False
        return start, words_end + len(tail) - len(rest) + len(end), True


def _probe(*texts: str) -> str:
    """What stands in for the words of a turn, to see where a template puts them: in none of the texts."""
    return next(probe for n in count() if not any((probe := f"prefopt{n}probe") in text for text in texts))


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
