"""A model to sample from with its tokenizer and stop tokens, its prompts as token ids, and its samples as text."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from prefopt.core.model_folder import NOT_QUANTISED
from prefopt.data.chat.ends import end_of_turn
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.content import DAMAGED, damaged, look
from prefopt.data.files.sources import MemoryOrigin, Source, find_sources
from prefopt.data.group import IntArray, PicturedIds
from prefopt.data.tokenizer import Tokenizer, tokenizer_digest
from prefopt.data.validate import Problem, check, convert, describe, refuse, refused_rows
from prefopt.errors import ConfigError, DataError
from prefopt.generate.sampler import Ids
from prefopt.model.architectures import context_length
from prefopt.model.load import base_and_adapter, load_config, load_model
from prefopt.model.pictures import picture_token
from prefopt.model.precision import MasterWeights, disable_dropout, resolve_device, resolve_dtype
from prefopt.model.quantised import check_quantisable, chosen
from prefopt.model.save import end_tokens, ids_of
from prefopt.model.scorer import Scorer
from prefopt.records import Comparison, Message
from prefopt.reference.cache import Identity
from prefopt.reference.identity import adapter_line, identity_of_folder, identity_of_model, tokenizer_of_name

CONTEXT_TOKENS = 8
"""Prompt tokens that are decoded along with a response: some tokenizers write a token otherwise at the start of a
text."""


class SampledModel:
    """A folder, a Hub name, or a model ``given`` in Python with its tokenizer. Weights are loaded when first used.

    ``source`` and ``adapter`` are local folders (empty and None for a given model), ``context`` is the model's context
    length, ``label`` its name in messages, ``note`` a line about an adapter, ``quantise`` how the weights are quantised
    at loading.
    """

    def __init__(
        self,
        name: str,
        *,
        adapter: str | None = None,
        quantise: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        given: Any = None,
        tokenizer: Any = None,
    ) -> None:
        """Raises :class:`ModelError` and :class:`ConfigError` as loading does."""
        self.name, self._given = name, given
        self.label = f"{name} with {Path(adapter).name}" if adapter else name
        self.generation_config: Any
        if given is not None:
            self.device, self.dtype = next(given.parameters()).device, given.dtype
            self.source, self.adapter, self.note, self.quantise = "", None, None, None
            self.tokenizer: Tokenizer = copy.deepcopy(tokenizer)
            config, self.generation_config = given.config, getattr(given, "generation_config", None)
        else:
            self.device = resolve_device(device)
            self.dtype = resolve_dtype(dtype, self.device)
            if self.device.type == "mps" and self.dtype == torch.float64:
                raise ConfigError("--dtype float64: mps has none; take --device cpu")
            self.source, self.adapter = base_and_adapter(name, adapter)
            self.quantise = chosen(quantise, self.adapter)
            self.note = adapter_line(name, adapter, self.quantise)
            self.tokenizer = tokenizer_of_name(name, adapter)
            config, self.generation_config = load_config(self.source), None
            check_quantisable(self.quantise, config, name, self.device, self.dtype)
            with suppress(Exception):  # absent, or refused by transformers: the tokenizer's EOS is enough
                self.generation_config = GenerationConfig.from_pretrained(self.source)
        self.context, self._picture_token = context_length(config), picture_token(config)

    @classmethod
    def of(cls, config: Any, *, given: Any = None, tokenizer: Any = None) -> SampledModel:
        """The model that the options of a run name (``model``, ``adapter``, ``quantise``, ``device``, ``dtype``), or
        ``given``. Raises as the constructor does."""
        names = ("adapter", "quantise", "device", "dtype")
        return cls(config.model, given=given, tokenizer=tokenizer, **{name: getattr(config, name) for name in names})

    pictures = False
    """Whether the model is loaded to take pictures."""

    @cached_property
    def scorer(self) -> Scorer:
        """The model, frozen, in the requested precision."""
        if self._given is not None:
            disable_dropout(self._given)
            return Scorer(self._given)
        quantise = self.quantise or NOT_QUANTISED
        options: dict[str, Any] = {"adapter": self.adapter, "quantise": quantise, "pictures": self.pictures}
        model = load_model(self.source, dtype=self.dtype, device=self.device, **options)
        model.requires_grad_(False)
        MasterWeights(model, self.dtype)  # adapters are loaded in the precision they were saved in
        return Scorer(model)

    def identity(self) -> Identity:
        """What decides its log-probabilities."""
        if self._given is not None:
            return identity_of_model(self._given, name=self.name)
        return identity_of_folder(self.source, adapter=self.adapter, quantise=self.quantise or NOT_QUANTISED)

    def generation_digest(self) -> str:
        """SHA-256 (hex) of what decides its responses: log-probabilities, tokenizer with chat template, stop tokens."""
        stop = self.stop_ids(renderer_for(self.tokenizer))
        whole = json.dumps([self.identity().digest, tokenizer_digest(self.tokenizer), stop])
        return hashlib.sha256(whole.encode()).hexdigest()

    def release(self) -> None:
        """Give a model from Python its own attention back, and forget one that was loaded; either may be used again."""
        if (scorer := self.__dict__.pop("scorer", None)) is not None:
            scorer.detach_hook()

    @property
    def never_drawn(self) -> tuple[int, ...]:
        """The token in whose place features of pictures go, where the model is given some."""
        return () if self._picture_token is None or not self.pictures else (self._picture_token,)

    def stop_ids(self, renderer: Renderer) -> tuple[int, ...]:
        """Every token that ends a response: EOS, those of the generation config, the template's end of turn."""
        found = [self.tokenizer.eos_token_id, *ids_of(getattr(self.generation_config, "eos_token_id", None))]
        found += [end_of_turn(renderer), *((self.adapter and end_tokens(self.adapter)) or ())]
        return tuple(sorted({i for i in found if isinstance(i, int)}))


def renderer_for(tokenizer: Tokenizer, chat_template: str | None = None, variables: Any = None) -> Renderer:
    """A renderer of prompts; ``chat_template`` is the text of a template."""
    ends = tokenizer.eos_token_id is not None
    return Renderer(tokenizer, Rendering(None, ends, chat_template, variables or {}))


@dataclass(slots=True)
class PromptSet:
    """Prompts in order: ``rows[i]`` without responses and its token ids ``ids[i]``. Every row read is accounted for:
    ``len(rows) + refused_rows(problems) == read``."""

    rows: list[Comparison] = field(default_factory=list)
    ids: list[IntArray | PicturedIds] = field(default_factory=list)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Lines that a run prints."""
        lines = [f"{self.read} read, {len(self.rows)} kept, {refused_rows(self.problems)} refused"]
        if self.problems:
            lines.append(f"refused: {describe(self.problems)}")
        return lines + self.notes

    def add(self, rows: Iterable[Comparison | Problem], renderer: Renderer, context: int | None, room: int) -> None:
        """Tokenise rows; ``context`` and ``room`` as in :func:`read_prompt_set`."""
        good: list[Comparison] = []
        for row in rows:
            self.read += 1
            problems = [row] if isinstance(row, Problem) else check(row, "prompts")
            prompt = row if isinstance(row, Problem) else convert(row, "prompts")
            if isinstance(prompt, Problem) or problems:
                self.problems += problems
            else:
                good.append(prompt)
        for prompt, ids in zip(good, renderer.prompts(good), strict=True):
            if isinstance(ids, Problem):
                self.problems.append(ids)
            elif context is not None and len(ids) + room > context:
                more = "" if room == 1 else f" --max-new-tokens {room} more are wanted, and"
                what = f"has {len(ids)} tokens,{more or ' and'} the model's context is {context}"
                self.problems.append(Problem("prompt too long", prompt.row, what, prompt.file))
            else:
                self.rows.append(prompt)
                self.ids.append(ids)


def read_prompt_set(
    names: Sequence[str],
    renderer: Renderer,
    *,
    rows: Iterable[Mapping[str, object]] | None = None,
    context: int | None,
    room: int = 1,
    lines: Literal["auto", "user", "text"],
    on_bad_row: str = "refuse",
    **layout: Any,
) -> PromptSet:
    """Read prompts from files of any layout or lines of text, or from ``rows`` in their place, and tokenise them.

    ``context`` is the model's context length, of which a prompt must leave ``room`` tokens. ``lines``: what a line of a
    .txt file is, a user turn or text to continue; a user turn for models with a chat template by default. ``layout``:
    format and columns. Raises :class:`DataError` for bad rows unless they are skipped, and for no prompt at all.
    """
    chats = renderer.rendering.chat_template is not None or renderer.tokenizer.chat_template is not None
    text = lines == "text" or (lines == "auto" and not chats)
    found = PromptSet()
    for source in find_sources(names) if rows is None else [Source("prompts", None, MemoryOrigin(list(rows)))]:
        found.notes += source.notes
        if source.path is not None and source.suffix == ".txt":
            found.add(_lines_of(source, text, found.notes), renderer, context, room)
            continue
        reading = open_comparisons(source, **layout)
        found.add(reading, renderer, context, room)
        found.notes += reading.notes
    found.notes += renderer.notes
    if found.problems and on_bad_row == "refuse":
        raise refuse(found.problems, found.read)
    if not found.rows:
        why = f": {describe(found.problems)}" if found.problems else ""
        raise DataError(f"none of the {found.read} rows of --prompts can be used{why}")
    return found


def _lines_of(source: Source, text: bool, notes: list[str]) -> Iterator[Comparison]:
    """The lines of a file as prompts; adds to ``notes`` how they are taken."""
    assert source.path is not None
    try:
        with look(source.path).opened() as file:
            whole = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start + 1}); save it as UTF-8", file=source.name) from None
    except DAMAGED as error:
        raise damaged(error, source.name) from None
    empty = 0
    for number, line in enumerate(whole.removesuffix("\n").split("\n") if whole else (), 1):
        line = line.rstrip("\r")
        if line.strip():
            yield Comparison((Message("user", line),), (), (), number, source.name, text)
        else:
            empty += 1
    if empty:
        notes.append(f"{source.name}: {empty} empty line{'s' * (empty > 1)} skipped")
    kind = "text to continue, without a chat template" if text else "the user's turns"
    notes.append(f"{source.name}: its lines are taken as {kind} (--lines)")


def decode(tokenizer: Tokenizer, ids: Ids) -> str:
    """The text of tokens, special tokens included."""
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def continuation(tokenizer: Tokenizer, prompt: Ids, ids: Ids) -> str:
    """The text that tokens ``ids`` add to the text of their prompt."""
    before = list(prompt[-CONTEXT_TOKENS:])
    start, whole = decode(tokenizer, before), decode(tokenizer, [*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else decode(tokenizer, ids)


def without_stop(ids: Ids, stop: Sequence[int]) -> list[int]:
    """The tokens without a stop token at their end."""
    kept = [int(i) for i in ids]
    return kept[:-1] if kept and kept[-1] in stop else kept
