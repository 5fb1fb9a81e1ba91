"""A model to sample from: its tokenizer and what ends its answers at once, its weights when they are needed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from prefopt.data.chat.answers import end_of_turn
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.render_options import Rendering
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.content import DAMAGED, damaged, layout_name, look
from prefopt.data.files.sources import Source
from prefopt.data.group import IntArray
from prefopt.data.kinds import Problem, check, convert, describe, refuse, refused_rows
from prefopt.data.tokenizer import Tokenizer, tokenizer_digest
from prefopt.errors import ConfigError, DataError
from prefopt.generate.sampler import Ids
from prefopt.model.load import base_and_adapter, load_config, load_model, resolve_device, resolve_dtype
from prefopt.model.packed_model import context_length
from prefopt.model.precision import MasterWeights, silence_dropout
from prefopt.model.save import end_tokens, ids_of
from prefopt.model.scorer import Scorer
from prefopt.records import Comparison, Message
from prefopt.reference.identity import Identity, adapter_line, identity_of_folder, identity_of_model, tokenizer_of_name


class SampledModel:
    """A folder, a Hub name, or a model ``given`` in Python with its tokenizer, which is used as it is.

    ``source`` and ``adapter`` are folders on this machine (empty and none for a model given). ``context`` is how many
    positions the model has, ``said`` its generation config, ``label`` what people call it, ``note`` what to say
    where ``name`` is an adapter's.
    """

    def __init__(
        self,
        name: str,
        *,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        given: Any = None,
        tokenizer: Any = None,
    ) -> None:
        """Raises :class:`ModelError` and :class:`ConfigError` as loading does."""
        self.name, self._given = name, given
        self.device = resolve_device(device) if given is None else next(given.parameters()).device
        self.dtype = resolve_dtype(dtype, self.device) if given is None else given.dtype
        if self.device.type == "mps" and self.dtype == torch.float64:
            raise ConfigError("--dtype float64: mps has none; take --device cpu")
        self.source, self.adapter = ("", None) if given is not None else base_and_adapter(name, adapter)
        self.note = adapter_line(name) if given is None else None
        self.label = f"{name} with {Path(adapter).name}" if adapter else name
        self.tokenizer: Tokenizer = copy.deepcopy(tokenizer) if given is not None else tokenizer_of_name(name, adapter)
        config = given.config if given is not None else load_config(self.source)
        self.context = context_length(config)
        self.said: Any = getattr(given, "generation_config", None) if given is not None else self._generation_config()

    @cached_property
    def scorer(self) -> Scorer:
        """The model, frozen, in the precision asked for."""
        if self._given is not None:
            silence_dropout(self._given)
            return Scorer(self._given)
        model = load_model(self.source, dtype=self.dtype, device=self.device, adapter=self.adapter)
        model.requires_grad_(False)
        MasterWeights(model, self.dtype)  # an adapter comes in the precision it was saved in
        return Scorer(model)

    def identity(self) -> Identity:
        """What decides its log-probabilities."""
        if self._given is not None:
            return identity_of_model(self._given, name=self.name)
        return identity_of_folder(self.source, adapter=self.adapter)

    def generation_digest(self) -> str:
        """SHA-256 (hex) of what decides its answers: its log-probabilities, its tokenizer with the chat template, and
        the tokens that end an answer, which the generation config may add to."""
        stops = self.stop_ids(renderer_for(self.tokenizer))
        whole = json.dumps([self.identity().digest, tokenizer_digest(self.tokenizer), stops])
        return hashlib.sha256(whole.encode()).hexdigest()

    def release(self) -> None:
        """Give the model its own attention back: one given in Python goes back to its owner."""
        if "scorer" in self.__dict__:
            self.scorer.detach_hook()

    def stop_ids(self, renderer: Renderer) -> tuple[int, ...]:
        """Every token that ends an answer: EOS, what the generation config says, the template's end of turn."""
        found = [self.tokenizer.eos_token_id, *ids_of(getattr(self.said, "eos_token_id", None))]
        found += [end_of_turn(renderer), *((self.adapter and end_tokens(self.adapter)) or ())]
        return tuple(sorted({i for i in found if isinstance(i, int)}))

    def _generation_config(self) -> Any:
        try:
            return GenerationConfig.from_pretrained(self.source)
        except Exception:  # it has none, or one that transformers refuses: its tokens say enough
            return None


def renderer_for(tokenizer: Tokenizer, chat_template: str | None = None, variables: Any = None) -> Renderer:
    """A renderer of prompts; ``chat_template`` is the text of a template."""
    ends = tokenizer.eos_token_id is not None
    return Renderer(tokenizer, Rendering(None, ends, chat_template, variables or {}))


TEXT = ".txt"
Lines = Literal["user", "text"]


@dataclass(slots=True)
class PromptSet:
    """Prompts in order: ``rows[i]`` without responses, and its token ids ``ids[i]``. What became of every row is
    counted: ``len(rows) + refused_rows(problems) == read``."""

    rows: list[Comparison] = field(default_factory=list)
    ids: list[IntArray] = field(default_factory=list)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Lines that a run prints."""
        lines = [f"{self.read} read, {len(self.rows)} kept, {refused_rows(self.problems)} refused"]
        if self.problems:
            lines.append(f"refused: {describe(self.problems)}")
        return lines + self.notes


class PromptReader:
    """Reads and renders; ``context`` is how many positions the model has, of which a prompt must leave ``room``."""

    def __init__(
        self, renderer: Renderer, *, context: int | None, lines: Lines, on_bad_row: str, room: int = 1
    ) -> None:
        self._renderer, self._context, self._room = renderer, context, room
        self._lines, self._on_bad_row = lines, on_bad_row
        self.found = PromptSet()

    def read(
        self, sources: Sequence[Source], *, format: str | None = None, columns: Sequence[str] | None = None
    ) -> PromptSet:
        """All sources. Raises :class:`DataError` for bad rows unless they are to be skipped, and where none is left."""
        for source in sources:
            self.found.notes += source.notes
            if source.path is not None and layout_name(source.path) == TEXT:
                self._take(self._text_rows(source))
                continue
            reading = open_comparisons(source, format=format, columns=columns)
            self._take(reading)
            self.found.notes += reading.notes
        return self._finish()

    def take(self, rows: Iterable[Comparison | Problem], notes: Sequence[str] = ()) -> PromptSet:
        """Rows that are in memory."""
        self._take(rows)
        self.found.notes += notes
        return self._finish()

    def _finish(self) -> PromptSet:
        found = self.found
        found.notes += self._renderer.notes
        if found.problems and self._on_bad_row == "refuse":
            raise refuse(found.problems, found.read)
        if not found.rows:
            why = f": {describe(found.problems)}" if found.problems else ""
            raise DataError(f"none of the {found.read} rows of --prompts can be used{why}")
        return found

    def _take(self, rows: Iterable[Comparison | Problem]) -> None:
        good: list[Comparison] = []
        for row in rows:
            self.found.read += 1
            wrong = [row] if isinstance(row, Problem) else check(row, "prompts")
            bare = row if isinstance(row, Problem) else convert(row, "prompts")
            if isinstance(bare, Problem) or wrong:
                self.found.problems += wrong
            else:
                good.append(bare)
        for bare, ids in zip(good, self._renderer.prompts(good), strict=True):
            if isinstance(ids, Problem):
                self.found.problems.append(ids)
            elif self._context is not None and len(ids) + self._room > self._context:
                more = "" if self._room == 1 else f" --max-new-tokens {self._room} more are wanted, and"
                what = f"has {len(ids)} tokens,{more or ' and'} the model's context is {self._context}"
                self.found.problems.append(Problem("prompt too long", bare.row, what, bare.file))
            else:
                self.found.rows.append(bare)
                self.found.ids.append(ids)

    def _text_rows(self, source: Source) -> Iterator[Comparison]:
        assert source.path is not None
        try:
            with look(source.path).opened() as file:
                text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 (byte {error.start + 1}); save it as UTF-8", file=source.name) from None
        except DAMAGED as error:
            raise damaged(error, source.name) from None
        empty = 0
        for number, line in enumerate(text.split("\n"), 1):
            words = line.rstrip("\r")
            if words.strip():
                yield Comparison((Message("user", words),), (), (), number, source.name, self._lines == "text")
            else:
                empty += 1
        empty -= text.endswith("\n") or not text  # what follows the last line end is no line
        if empty:
            self.found.notes.append(f"{source.name}: {empty} empty line{'s' * (empty > 1)} passed over")
        kind = "the user's turns" if self._lines == "user" else "text to continue, without a chat template"
        self.found.notes.append(f"{source.name}: its lines are taken as {kind} (--lines)")


BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8
"""Tokens of the prompt that are decoded along: some tokenizers write a token otherwise at the start of a text."""
LONGEST = 8
"""Tokens of a character at most; beyond that, what cannot be decoded is shown as it is."""


def decode(tokenizer: Tokenizer, ids: Ids) -> str:
    """The text of tokens, special ones and all."""
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def continuation(tokenizer: Tokenizer, prompt: Ids, ids: Ids) -> str:
    """What sampled tokens add to the text of their prompt."""
    before = list(prompt[-CONTEXT:])
    start, whole = decode(tokenizer, before), decode(tokenizer, [*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else decode(tokenizer, ids)


def without_stop(ids: Ids, stop: Sequence[int]) -> list[int]:
    """The tokens without the stop token at their end."""
    kept = [int(i) for i in ids]
    return kept[:-1] if kept and kept[-1] in stop else kept
