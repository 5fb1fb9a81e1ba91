"""Comparisons to groups: chat template, token ids, trained masks, truncation.

Each response is rendered with its prompt as one text. The trained part is found in characters
(:mod:`prefopt.data.chat.responses`), then in tokens (:mod:`prefopt.data.chat.encoding`): the trained tokens, decoded,
are the answer and its end-of-turn token. What a template puts after the last one is neither trained nor kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice

import numpy as np

from prefopt.data.chat.encoding import Encoded, Encoder, RenderedText
from prefopt.data.chat.pictures import PictureProcessor, processor_digest, token_of_pictures
from prefopt.data.chat.placing import all_but, expanded, pictures_of, placed_in, whole_pictures
from prefopt.data.chat.responses import ResponseRenderer, cut_off
from prefopt.data.chat.template import (
    ChatTemplate,
    Rendering,
    Unrenderable,
    field_reasoning,
    inline_reasoning,
    strip_reasoning,
)
from prefopt.data.chat.truncate import (
    Sequences,
    Shortener,
    Tokens,
    by_response,
    identical,
    prompt_excess,
    truncate,
    windows,
    with_room,
)
from prefopt.data.group import Group, IntArray, PicturedIds
from prefopt.data.pictures import BAD_PICTURE, BadPicture
from prefopt.data.tokenizer import Tokenizer, end_marks, eos_id, leading_ids, tokenizer_digest
from prefopt.data.validate import Problem, Warnings, warning_lines
from prefopt.errors import DataError
from prefopt.records import Comparison, Picture, Response

BATCH = 64  # rows whose texts are tokenized in one call

NO_TEMPLATE = "the tokenizer has no chat template: turns are written as 'User: ...', 'Assistant: ...'"
EOS_ADDED = "the chat template does not end answers with an end-of-turn token: EOS is added"
EOS_MISSING = "the chat template does not end answers with an end-of-turn token, and none is added"
NO_BOS = "the tokenizer puts a BOS before plain text, the chat template does not: conversations have none"
DATED = "the chat template shows the current date: cached tokens and reference values are valid for one day"
NO_FIELD = "the chat template has no field for reasoning: it is written into the answer, as <think>...</think>"
PLAIN_TEXT = "plain text, to which --chat-template and its variables do not apply"
SPECIAL = "special tokens written out in the text, read as those tokens"
INTO_FIELD = "reasoning inside answers is moved to the chat template's field for it"
LEFT_INSIDE = "reasoning inside answers stays part of them, although the chat template has a field for it"
STRIPPED = "reasoning removed (--reasoning strip)"
TURNS_DROPPED = "longer than --max-length: the oldest turns are dropped whole"
TURN_CUT = "longer than --max-length: a turn loses its first words (a system turn its last)"
STEPS_DROPPED = "longer than --max-length: the last steps of a response do not fit and are not trained"
WINDOWS = "texts longer than --max-length, each cut into several rows"
APART = "the tokenizer would join the end of the prompt to the answer: they are tokenized apart, as in sampling"
JOINED = "the tokenizer joins the end of the prompt to the answer, which never happens in sampling"


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A group, the tokens cut from its prompt and from the end of each response; ``more``: a text's other windows."""

    group: Group
    prompt_cut: int = 0
    responses_cut: tuple[int, ...] = ()
    more: tuple[Group, ...] = ()


class Renderer:
    """Turns comparisons into groups with one tokenizer.

    A conversation goes through the chat template or :func:`plain_template`; a ``text`` comparison is prompt and
    response, after a BOS where the tokenizer wants it. ``template`` is the source to save with a model trained on
    conversations where its tokenizer has another or none. ``warnings`` maps each to the rows concerned (empty: all).
    ``scored``: rows are scored and not trained on, and a sampled answer that is empty is its end token.
    """

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering | None = None, *, scored: bool = False) -> None:
        """Raises :class:`ConfigError` and :class:`ModelError` as :class:`ChatTemplate`."""
        self.rendering = rendering or Rendering()
        self.tokenizer, self.scored = tokenizer, scored
        self.warnings: Warnings = {}
        self._template = ChatTemplate(tokenizer, self.rendering)
        self.template: str | None = self._template.carried
        self._encoder = Encoder(tokenizer)
        self._lead = leading_ids(tokenizer)
        marks = end_marks(tokenizer)
        self._end_ids = frozenset(int(i) for i in tokenizer.convert_tokens_to_ids(list(marks)))
        special = sorted({*marks, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        earlier = "as-shown" if self.rendering.train_on == "all" else self.rendering.earlier_turns
        self._responses = ResponseRenderer(self._template, marks, tokenizer.eos_token, self._report, earlier)
        self._processor = processor_digest(tokenizer.name_or_path)
        self._picture_token = token_of_pictures(tokenizer.name_or_path) if self._processor else None
        self._row = 0

    @property
    def notes(self) -> list[str]:
        """The warnings about all rows rendered so far, one line each."""
        return warning_lines(self.warnings)

    def digest(self) -> str:
        """A cache key, 32 hex digits: tokenizer, template, options, the settings of a processor of pictures, and the
        date where the template shows it."""
        options = asdict(self.rendering)
        options["date"] *= self._template.reads_date
        parts = [tokenizer_digest(self.tokenizer), options, self._template.sources]
        parts += [self._processor] if self._processor else []
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @cached_property
    def pictures(self) -> PictureProcessor:
        """The processor of pictures in the tokenizer's folder. Raises :class:`ModelError` where there is none."""
        return PictureProcessor(self.tokenizer.name_or_path, self.tokenizer)

    def render(self, comparison: Comparison) -> Rendered:
        """One comparison as a group. Raises :class:`DataError` where that is not possible."""
        result = next(self.render_all([comparison]))
        if isinstance(result, Problem):
            raise DataError(f"{result.kind}: {result.what}", file=result.file or None, row=result.row)
        return result

    def render_all(self, comparisons: Iterable[Comparison]) -> Iterator[Rendered | Problem]:
        """Each comparison as a group or the problem that prevents it, in order."""
        for c, sequences in self._tokenized(comparisons, self._render):
            if isinstance(sequences, Problem):
                yield sequences
                continue
            limit = self.rendering.max_length
            if limit and c.pictures and prompt_excess(sequences, limit):
                longest = max(len(s.ids) for s in sequences)
                what = f"has {longest:,} tokens with its pictures, which are not cut; --max-length is {limit:,}"
                yield Problem("pictures too long", c.row, what, c.file)
                continue
            shorter = sequences if c.pictures else self._shortened(c, sequences)
            result = self._group(c, shorter)
            if isinstance(result, Rendered):
                longest, left = (max(len(s.ids) for s in some) for some in (sequences, shorter))
                result = replace(result, prompt_cut=result.prompt_cut + longest - left)
            yield result

    def prompts(self, comparisons: Iterable[Comparison]) -> Iterator[IntArray | PicturedIds | Problem]:
        """Token ids [P] of each prompt with its generation prompt, or the problem that prevents it, in order.

        This is the input for sampling. Trained sequences begin with it, except in rows with the warning ``ELSEWHERE``.
        Responses are ignored, and nothing is truncated.
        """
        for c, found in self._tokenized(comparisons, self._render_prompt):
            if isinstance(found, Problem):
                yield found
                continue
            ids, _, _, pictures = found[0]
            if len(ids):
                yield PicturedIds(ids, pictures) if pictures else ids
            else:
                yield Problem("empty prompt", c.row, "the prompt has no token", c.file)

    def _tokenized(
        self, comparisons: Iterable[Comparison], render: Callable[[Comparison], list[RenderedText] | Problem]
    ) -> Iterator[tuple[Comparison, Sequences | Problem]]:
        """Each row with its texts as sequences, or the problem that prevents them, in order."""
        rows = iter(comparisons)
        while batch := list(islice(rows, BATCH)):
            texts = [self._with_pictures(c, render(c)) for c in batch]
            encoded = self._encoder.encode_rows([row for row in texts if not isinstance(row, Problem)])
            for c, row in zip(batch, texts, strict=True):
                self._row = c.row
                if isinstance(row, Problem):
                    yield c, row
                    continue
                tokens, pictures = next(encoded), pictures_of(c, len(row))
                yield c, self._without_stray(c, list(map(self._sequence, row, tokens, pictures)))

    def _with_pictures(self, c: Comparison, texts: list[RenderedText] | Problem) -> list[RenderedText] | Problem:
        """The texts with what stands for their pictures in them."""
        if isinstance(texts, Problem) or not c.pictures:
            return texts
        if any(text.further for text in texts):
            what = "pictures in a response that is trained in steps; give --earlier-turns as-shown"
            return Problem("pictures in steps", c.row, what, c.file)
        try:
            pairs = zip(texts, pictures_of(c, len(texts)), strict=True)
            return [expanded(text, pictures, self.pictures) for text, pictures in pairs]
        except (BadPicture, DataError) as error:
            return Problem(BAD_PICTURE, c.row, str(error), c.file, tuple(p.source for p in c.pictures if p.source))

    def _without_stray(self, c: Comparison, sequences: Sequences) -> Sequences | Problem:
        """The sequences, or the problem that the words of one hold the token in whose place a picture's features go."""
        if self._picture_token is None:
            return sequences
        for ids, _, _, pictures in sequences:
            inside = sum(int((ids[p.start : p.stop] == self._picture_token).sum()) for p in pictures)
            if int((ids == self._picture_token).sum()) != inside:
                token = self.tokenizer.convert_ids_to_tokens(self._picture_token)
                what = f"{token} is written out in its words, where the model expects a picture; remove it"
                return Problem("image token in text", c.row, what, c.file)
        return sequences

    def _render_prompt(self, c: Comparison) -> list[RenderedText] | Problem:
        self._row = c.row
        c = self._reasoned(c)
        self._report_template(c.text)
        if c.text:
            return [RenderedText("".join(m.content for m in c.prompt), (), bos=True)]
        try:
            text = self._template.apply(c.prompt, c.tools, generation=True)
            self._responses.check_omissions(c.prompt, c.tools)
            self._responses.check_inline_reasoning(c.prompt, text)
            return [RenderedText(text, ())]
        except Unrenderable as error:
            return Problem("chat template", c.row, str(error), c.file)

    def _render(self, c: Comparison) -> list[RenderedText] | Problem:
        self._row = c.row
        c = self._reasoned(c)
        self._report_special_tokens(c)
        turns = [r.messages for r in c.responses]
        if not turns:
            return Problem("no response", c.row, "the row is a prompt without a response", c.file)
        answers = [m for r in turns for m in r if m.trained and m.role == "assistant"]
        if not self.scored and not all(m.content.strip() or m.tool_calls for m in answers):
            return Problem("empty response", c.row, "an answer holds no words, or nothing but reasoning", c.file)
        self._report_template(c.text)
        if c.text:
            prompt = "".join(m.content for m in c.prompt)
            return [self._plain_text(prompt, r) for r in c.responses]
        if not self._template.reads_reasoning and any(m.reasoning for r in turns for m in r):
            self._report(NO_FIELD, once=True)
        try:
            texts = self._responses.render(c.prompt, turns, c.tools)
        except Unrenderable as error:
            return Problem("chat template", c.row, str(error), c.file)
        found: list[RenderedText] = []
        for steps, response in zip(texts, c.responses, strict=True):
            last = cut_off(steps[-1], response) if response.cut and not self._only_ends(response) else steps[-1]
            if last is None:
                what = (
                    "a response was cut off at a length limit, and the chat template does not show where its text ends"
                )
                return Problem("cut answer", c.row, what, c.file)
            found += (*steps[:-1], last)
        if any(text.eos for text in found):  # the template ends no answer
            self._report(EOS_ADDED if self.rendering.add_eos else EOS_MISSING, once=True)
        return [replace(text, eos=text.eos and self.rendering.add_eos) for text in found]

    def _only_ends(self, response: Response) -> bool:
        """Whether a response to be scored is empty: its end token is then all that can be scored, cut off or not."""
        last = response.messages[-1]
        return self.scored and not last.content.strip() and not last.tool_calls

    def _plain_text(self, prompt: str, response: Response) -> RenderedText:
        answer = "".join(m.content for m in response.messages)
        text = prompt + answer
        eos = self.rendering.add_eos and (not response.cut or (self.scored and not answer))
        eos = eos and not text.endswith(str(self.tokenizer.convert_ids_to_tokens(self._eos)))
        return RenderedText(text, ((len(prompt), len(text)),), bos=True, eos=eos)

    def _reasoned(self, c: Comparison) -> Comparison:
        """The row without its reasoning, or with it in the field that the template reads."""
        keep = self.rendering.reasoning == "keep"
        if keep and (c.text or not self._template.shows_blocks):
            return c
        change = field_reasoning if keep else strip_reasoning
        responses = tuple(replace(r, messages=tuple(map(change, r.messages))) for r in c.responses)
        changed = replace(c, prompt=tuple(map(change, c.prompt)), responses=responses)
        if keep and any(map(inline_reasoning, chain(changed.prompt, *(r.messages for r in responses)))):
            self._report(LEFT_INSIDE)
        if changed != c:
            self._report(INTO_FIELD if keep else STRIPPED)
        return changed

    def _report_special_tokens(self, c: Comparison) -> None:
        eos, bos = self.tokenizer.eos_token or "", self.tokenizer.bos_token or ""
        for turn in chain(c.prompt, *(r.messages for r in c.responses)):
            content = turn.content.removesuffix(eos) if turn.role == "assistant" else turn.content
            content = content.removeprefix(bos) if c.text else content
            if self._special.search(content) or (turn.reasoning and self._special.search(turn.reasoning)):
                self._report(SPECIAL)
                return

    def _report_template(self, text: bool) -> None:
        """Report what concerns all rows, or that a row of plain text does not use the template given."""
        if text:
            if self.rendering.chat_template is not None or self.rendering.variables:
                self._report(PLAIN_TEXT)
            return
        for what in self._about_template:
            self._report(what, once=True)

    @cached_property
    def _about_template(self) -> list[str]:
        start = "".join(self.tokenizer.convert_ids_to_tokens(self._lead))
        lacks_bos = not self._template.sample().startswith(start)
        found = {NO_TEMPLATE: self._template.plain, NO_BOS: lacks_bos, DATED: self._template.reads_date}
        return [what for what, applies in found.items() if applies]

    @cached_property
    def _eos(self) -> int:
        return eos_id(self.tokenizer)

    def _report(self, what: str, *, once: bool = False) -> None:
        """Add a finding about the current row, or ``once`` about all."""
        rows = self.warnings.setdefault(what, [])
        if not once and rows[-1:] != [self._row]:
            rows.append(self._row)

    def _sequence(self, text: RenderedText, tokens: Encoded, pictures: Sequence[Picture]) -> Tokens:
        ids, trained = tokens.ids, tokens.covers(text.spans)
        if tokens.boundary:
            self._report(APART if tokens.boundary == "apart" else JOINED)
        if text.bos and ids[: len(self._lead)].tolist() != self._lead:
            ids = np.concatenate([np.array(self._lead, np.int32), ids])
            trained = np.concatenate([np.zeros(len(self._lead), np.bool_), trained])
        if text.eos:
            ids, trained = np.append(ids, np.int32(self._eos)), np.append(trained, True)
        return Tokens(ids, trained, text.further, placed_in(text, tokens, pictures))

    def _shortened(self, c: Comparison, sequences: Sequences) -> Sequences:
        """The sequences of a conversation with a prompt that fits, or with as few of its words as possible."""
        limit = self.rendering.max_length
        if limit is None or c.text or not prompt_excess(sequences, limit):
            return sequences
        shortener = Shortener(limit, self._tokenize, self._encoder.encode, self._special)
        fewer, left = shortener.drop_turns(c, sequences)
        if fewer is not c:
            self._report(TURNS_DROPPED)
        if prompt_excess(left, limit):
            left = shortener.cut_words(fewer, left)
            self._report(TURN_CUT)
        return left

    def _tokenize(self, c: Comparison) -> Sequences | None:
        ((_, sequences),) = self._tokenized([c], self._render)
        return None if isinstance(sequences, Problem) else sequences

    def _group(self, c: Comparison, sequences: Sequences) -> Rendered | Problem:
        if identical(c, sequences):
            return Problem("identical responses", c.row, "the responses are the same token for token", c.file)
        prompt_cut, responses_cut = 0, (0,) * len(c.responses)
        limit = self.rendering.max_length
        try:
            if self.rendering.windows and limit and c.text and not any(m.content for m in c.prompt):
                cuts = [part for s in sequences for part in windows(s.ids, s.trained, limit)]
                parts = [Group.from_sequences([part], c.row, ()) for part in cuts]
                if len(parts) > len(sequences):
                    self._report(WINDOWS)
                return Rendered(parts[0], more=tuple(parts[1:]))
            if limit is not None and max(len(s.ids) for s in sequences) > limit:
                sequences, prompt_cut, responses_cut = self._truncated(sequences, limit, whole_prompt=not c.text)
                if identical(c, sequences):
                    what = f"the responses differ only beyond {limit} tokens"
                    return Problem("identical after truncation", c.row, what, c.file)
            if self.rendering.train_on == "all":
                sequences = [s._replace(trained=all_but(len(s.ids), s.pictures)) for s in sequences]
            pairs = [(s.ids, s.trained) for s in sequences]
            steps, pictures = list(map(len, by_response(sequences))), [s.pictures for s in sequences]
            group = Group.from_sequences(pairs, c.row, c.pairs, steps, pictures)
        except ValueError as error:
            return Problem("nothing to train", c.row, str(error), c.file)
        weights = None if c.votes is None else tuple(weight for *_, weight in c.votes)
        group = replace(group, weights=weights, tiers=c.tiers, scores=c.scores, labels=c.labels)
        return Rendered(group, prompt_cut, responses_cut)

    def _truncated(
        self, sequences: Sequences, limit: int, *, whole_prompt: bool
    ) -> tuple[Sequences, int, tuple[int, ...]]:
        """The sequences cut to ``limit``, and how many tokens the prompt and each response lost."""
        kept, lost = with_room(sequences, limit)
        if len(kept) < len(sequences):
            self._report(STEPS_DROPPED)
        pairs = [(s.ids, s.trained) for s in kept]
        bos = self.tokenizer.bos_token_id
        cut = truncate(pairs, limit, bos=bos, ends=self._end_ids, whole_prompt=whole_prompt)
        shorter = [
            Tokens(ids, trained, s.further, whole_pictures(s.pictures, len(ids)))
            for (ids, trained), s in zip(cut.sequences, kept, strict=True)
        ]
        of_steps = iter(cut.responses)
        counts = map(len, by_response(shorter))
        responses = (n + sum(islice(of_steps, count)) for n, count in zip(lost, counts, strict=True))
        return shorter, cut.prompt, tuple(responses)
