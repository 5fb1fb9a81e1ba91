"""Which models can share a prefix, told from their configuration before anything runs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prefopt.data.packer import Layout
from prefopt.errors import ModelError

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
