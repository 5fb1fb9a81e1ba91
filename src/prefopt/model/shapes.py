"""Shapes of attention layers, from a configuration; in some families (Gemma 4) they differ from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NO_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer: ``heads`` of queries and ``key_heads``, as wide as said, and the window it sees (none: everything)."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    window: int | None


def attention_shapes(config: Any) -> list[AttentionShape]:
    """A shape for every layer that attends."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = (
        getattr(text, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    )
    own = getattr(text, "per_layer_config", None)  # where layers differ, reading the whole one's fields is an error
    return [
        _shape(own[n] if own else text, window if kind == "sliding_attention" else None)
        for n, kind in enumerate(kinds)
        if kind not in _NO_ATTENTION
    ]


def _shape(config: Any, window: int | None) -> AttentionShape:
    heads: int = getattr(config, "num_attention_heads", 0)
    key_heads: int = getattr(config, "num_key_value_heads", None) or heads or 1
    if getattr(config, "qk_nope_head_dim", None) is not None:  # multi-head latent attention
        width: int = config.qk_nope_head_dim + config.qk_rope_head_dim
        return AttentionShape(heads, key_heads, width, config.v_head_dim, window)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return AttentionShape(heads, key_heads, width, width, window)
