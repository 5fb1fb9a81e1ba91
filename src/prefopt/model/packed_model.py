"""A model fed with packed batches: shared prefixes are encoded once, and nothing is padded.

What is read off its last hidden states is the business of those who build on it: token log-probabilities
(:mod:`prefopt.model.scorer`), or one number per response or token (:mod:`prefopt.model.scalar`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from prefopt.errors import ModelError, UserError, first_line
from prefopt.model.costs import Purpose, count_pass
from prefopt.model.kernels.attention import HOOK, TRIAL, HookReached, UnshareableError, gather_plan, kernel_for
from prefopt.model.memory import out_of_memory
from prefopt.model.packing import Layout, PackedBatch, Pass

_SHAREABLE = {"full_attention", "sliding_attention", "sparse", "dense"}


def layout_of(model: PreTrainedModel) -> tuple[Layout, str | None]:
    """How to feed ``model``, and in one line why its prefixes are not shared, where they are not.

    Raises :class:`ModelError` for models that are no causal language models at all.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; prefopt trains causal language models")
    reason = _reason(model, config)
    return Layout(share=reason is None, rope_limit=_rope_limit(config)), reason


def _reason(model: PreTrainedModel, config: Any) -> str | None:
    told = getattr(config, "layer_types", None)
    kinds = sorted(set(told or ()) - _SHAREABLE)
    name = type(model).__name__
    if kinds:
        return f"{name} has layers of type {', '.join(kinds)}, whose state cannot fork at the end of a prompt"
    if getattr(model, "_is_stateful", False) and not told:  # a hybrid family may have attention in every layer
        return f"{name} is recurrent: its state cannot fork at the end of a prompt"
    if getattr(config, "attention_chunk_size", None):
        return f"{name} attends in chunks that only its own mask knows"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return f"{name} adds ALiBi distances to its attention scores"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not offer the attention hook of transformers"
    return None


def _rope_limit(config: Any) -> int | None:
    """Length at which longrope changes its frequencies.

    The type ``dynamic`` changes them only beyond ``max_position_embeddings``, which no row may exceed.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    limits = [
        s.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for s in sets
        if s.get("rope_type") == "longrope"
    ]
    return min((int(x) for x in limits if x), default=None)


def context_length(config: Any) -> int | None:
    """Positions the model has, where its configuration says so."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text, name, None)
        if value:
            return int(value)
    return None


class PackedModel(torch.nn.Module):
    """A transformers model, or one wrapped by PEFT, whose last hidden states are computed of packed batches.

    ``attention`` is ``auto`` or ``loop`` (the plain kernel). ``share=False`` encodes every response in a row of its
    own with the model's own attention, as is done for models that cannot share a prefix.
    """

    def __init__(self, model: torch.nn.Module, *, attention: str = "auto", share: bool = True) -> None:
        super().__init__()
        self.model = model
        causal = causal_model(model)
        self.layout, self.reason = layout_of(causal)
        if not share:
            self.layout, self.reason = Layout(False, self.layout.rope_limit), "sharing is switched off"
        self.attention = attention
        self._configs = _configs(causal)
        self._attention_before = [getattr(c, "_attn_implementation", None) for c in self._configs]
        self.attach_hook()
        if self.layout.share and (reason := self._try_hook()):
            self.separate(reason)

    def separate(self, reason: str) -> None:
        """Score every response in a row of its own from now on, and say why."""
        self.detach_hook()
        self.layout, self.reason = Layout(False, self.layout.rope_limit), reason

    def _try_hook(self) -> str | None:
        """Why the first layer that attends cannot take shared prefixes, in one line; None where it can.

        Two tokens go into the model and get no further than that layer. Raises :class:`NotCausalError`, and
        :class:`ModelError` where it cannot even compute those.
        """
        model = causal_model(self.model)
        device = next(model.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        extra: dict[str, Any] = {"prefix_segments": ((0, 2, 0, 0),), "prefix_kernel": TRIAL}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of checkpointing, that it has nothing to differentiate
                body_of(model)(input_ids=ids, position_ids=torch.arange(2, device=device)[None], **extra)
        except HookReached:
            return None
        except UnshareableError as refusal:
            return str(refusal)
        except UserError:
            raise
        except Exception as error:  # of whatever class: layers compute with what config.json says
            if out_of_memory(error):
                raise
            raise ModelError(
                f"{type(model).__name__} cannot compute two tokens ({first_line(error)}); is its config.json as saved?"
            ) from error
        return f"{type(model).__name__} never asks the attention hook of transformers"

    @property
    def path(self) -> str:
        """``shared`` or ``separate``: part of the key of cached values."""
        return "shared" if self.layout.share else "separate"

    @property
    def kernel(self) -> str:
        """The attention kernel in use: part of the key of cached values."""
        if not self.layout.share:
            return str(self._attention_before[0])
        weight = next(self.model.parameters())
        return kernel_for(weight.device, self.dtype, self.attention)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in."""
        weight: torch.Tensor = causal_model(self.model).get_input_embeddings().weight
        return weight.dtype

    def attach_hook(self) -> None:
        """Put shared-prefix attention under the model, where it can share."""
        if self.layout.share:
            for config in self._configs:
                config._attn_implementation = HOOK

    def detach_hook(self) -> None:
        """Give the model its own attention back, for generation or for its owner."""
        for config, before in zip(self._configs, self._attention_before, strict=True):
            config._attn_implementation = before

    @contextmanager
    def attention_by(self, hook: str | None) -> Iterator[None]:
        """Another attention under the model for a while, by its name in transformers; none: the model's own."""
        now = [getattr(c, "_attn_implementation", None) for c in self._configs]
        wanted = self._attention_before if hook is None else [hook] * len(now)
        try:
            for config, name in zip(self._configs, wanted, strict=True):
                config._attn_implementation = name
            yield
        finally:
            for config, name in zip(self._configs, now, strict=True):
                config._attn_implementation = name

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, H] of all passes laid end to end, as ``batch.read`` and ``batch.last`` index them."""
        return torch.cat([self._hidden(p) for p in batch.passes])

    def count(self, row: Pass) -> None:
        """One forward pass more, see :mod:`prefopt.model.costs`."""
        purpose: Purpose = "train" if torch.is_grad_enabled() else "score"
        count_pass(causal_model(self.model), row.ids.numel(), purpose)

    def _hidden(self, row: Pass) -> torch.Tensor:
        """Last hidden states [T, H] of one row."""
        self.count(row)
        body = body_of(causal_model(self.model))
        extra: dict[str, Any] = {}
        if self.layout.share:
            kernel = self.kernel
            extra = {"position_ids": row.positions[None], "prefix_segments": row.segments, "prefix_kernel": kernel}
            if kernel == "varlen":
                extra["prefix_gather"] = gather_plan(row.segments, row.ids.device)
        out = body(input_ids=row.ids[None], use_cache=False, return_dict=True, **extra)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap is not None else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(inner).__name__} is not a transformers model")
    return inner


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Compute the layers anew in the backward pass; transformers does so in training mode alone."""
    causal: Any = causal_model(model)
    # Older versions of transformers know only the second name, newer ones warn of it.
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """What gives the last hidden state: the model without its head. The model itself where none can be told apart."""
    body = model.base_model
    inner: torch.nn.Module = getattr(model, "model", model)
    return body if body is not model else inner


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configuration, and that of the text part where the model has several: every one a layer may ask."""
    found = [model.config, model.config.get_text_config()]
    found += [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    return list({id(c): c for c in found}.values())
