"""A model to sample from: its tokenizer and what ends its answers at once, its weights when they are needed."""

from __future__ import annotations

import copy
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from prefopt.data.chat.render import Renderer
from prefopt.data.chat.render_options import Rendering
from prefopt.data.chat.spans import end_of_turn
from prefopt.data.tokenizer import Tokenizer, tokenizer_digest
from prefopt.errors import ConfigError
from prefopt.model.architectures import context_length
from prefopt.model.load import base_and_adapter, load_config, load_model
from prefopt.model.precision import MasterWeights, disable_dropout, resolve_device, resolve_dtype
from prefopt.model.save import end_tokens, ids_of
from prefopt.model.scorer import Scorer
from prefopt.reference.cache import Identity
from prefopt.reference.identity import adapter_line, identity_of_folder, identity_of_model, tokenizer_of_name


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
            disable_dropout(self._given)
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

    def answering(self) -> str:
        """SHA-256 (hex) of what decides its answers: its log-probabilities, its tokenizer with the chat template, and
        the tokens that end an answer, which the generation config may add to."""
        stops = self.stops(renderer_for(self.tokenizer))
        whole = json.dumps([self.identity().digest, tokenizer_digest(self.tokenizer), stops])
        return hashlib.sha256(whole.encode()).hexdigest()

    def release(self) -> None:
        """Give the model its own attention back: one given in Python goes back to its owner."""
        if "scorer" in self.__dict__:
            self.scorer.detach_hook()

    def stops(self, renderer: Renderer) -> tuple[int, ...]:
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
