"""A tiny random twin of a model: the same architecture in float64, small enough to check by brute force at load."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

VOCABULARY, WINDOW, CONTEXT = 61, 8, 128
_SMALL = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 4,
}
LARGEST = 5_000_000
"""Parameters of a twin at most: the check must stay a matter of a second."""


def tiny_clone(config: PreTrainedConfig) -> PreTrainedModel | None:
    """A float64 model with random weights (norms too), one period of the layer types and a window of 8.

    None where the architecture cannot be built that small.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    state = torch.random.get_rng_state()
    try:
        for heads_too in (True, False):
            try:
                return _build(_shrunk(config, heads_too))
            except Exception:  # whatever a configuration refuses: the caller says that it went unchecked
                continue
        return None
    finally:
        torch.random.set_rng_state(state)
        transformers_logging.set_verbosity(level)


def _build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        model(input_ids=torch.arange(5)[None], use_cache=False)
    return model


def _shrunk(config: PreTrainedConfig, heads_too: bool) -> Any:
    small: Any = copy.deepcopy(config.get_text_config())
    old_layers = small.num_hidden_layers
    kinds = getattr(small, "layer_types", None)
    layers = _period(kinds) if kinds else min(2, old_layers)
    for name, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == old_layers:
            setattr(small, name, value[:layers])
    _set(small, num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        try:
            setattr(small, token, None)
        except Exception:  # some families must have one, and each kind of check has an error of its own
            setattr(small, token, 0)
    if getattr(small, "sliding_window", None):
        small.sliding_window = WINDOW
    for name, value in _SMALL.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(value, getattr(small, name)))
    if heads_too:
        _shrink_heads(small)
    return small


def _shrink_heads(small: Any) -> None:
    heads = small.num_attention_heads
    shared = getattr(small, "num_key_value_heads", None)
    width = 16
    _set(small, num_attention_heads=4, hidden_size=4 * width)
    if isinstance(getattr(small, "num_kv_heads", None), int):  # Falcon
        small.num_kv_heads = _shared_heads(small.num_kv_heads, heads)
    if shared is not None:
        small.num_key_value_heads = _shared_heads(shared, heads)
    if vars(small).get("head_dim") is not None:  # where it is a property (Falcon), it follows from the rest
        small.head_dim = width
    if getattr(small, "word_embed_proj_dim", None) is not None:
        small.word_embed_proj_dim = small.hidden_size


def _shared_heads(shared: int, heads: int) -> int:
    """Key heads for four query heads, of the kind that the model has: one each, in groups, or one for all."""
    return 4 if shared == heads else 2 if shared > 1 else 1


def _set(config: Any, **values: Any) -> None:
    """Set what the configuration has, under the names it gives these things."""
    for name, value in values.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _period(kinds: list[str]) -> int:
    """Layers until every type has been seen, at least two where there are two."""
    n = max(kinds.index(kind) for kind in set(kinds)) + 1
    return max(n, min(2, len(kinds)))
