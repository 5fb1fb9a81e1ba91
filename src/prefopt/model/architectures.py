"""Differences between families of architectures: places of layers and head, attention, logits, experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as transformers_logging

from prefopt.errors import ModelError
from prefopt.model.recurrence.mixers import changed_classes, mixers_of

_SHAREABLE = {"full_attention", "sliding_attention", "sparse", "dense"}
_RECURRENT = {"linear_attention", "conv", "mamba", "recurrent", "hybrid"}
"""Types of layers that share where their class is in :data:`prefopt.model.recurrence.mixers.MIXERS`."""
_NO_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent")
MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
"""Fields with the number of layers for multi-token prediction."""
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def weights_in(parameter: torch.Tensor) -> int:
    """Number of weights that a parameter holds: of those of 4 bits, bitsandbytes packs two into a number."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap is not None else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(inner).__name__} is not a transformers model")
    return inner


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head, which gives the last hidden state; the model itself where they are not separate."""
    body = model.base_model
    inner: torch.nn.Module = getattr(model, "model", model)
    return body if body is not model else inner


def takes_pictures(model: PreTrainedModel) -> bool:
    """Whether a model has a vision tower: transformers gives the class of its body ``get_image_features``."""
    return hasattr(body_of(model), "get_image_features")


def towers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The parts of a vision-language model that are neither its language model nor its head."""
    if not takes_pictures(model):
        return []
    text, outputs = model.get_decoder(), model.get_output_embeddings()
    body = body_of(model)
    kept = {id(text), id(outputs), id(model.get_input_embeddings())}
    return [module for module in body.children() if id(module) not in kept and text not in module.modules()]


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that transformers never splits, without those inside another one or a tower: the layers of a language
    model, which every pass goes through."""
    causal = causal_model(model)
    names = set(getattr(causal, "_no_split_modules", None) or ())
    towers = {id(module) for tower in towers_of(causal) for module in tower.modules()}
    found: dict[str, torch.nn.Module] = {}
    for place, module in model.named_modules():
        if id(module) in towers or type(module).__name__ not in names:
            continue
        if not place.startswith(tuple(f"{outer}." for outer in found)):
            found[place] = module
    return list(found.values())


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Recompute layers in the backward pass; transformers does so in training mode alone."""
    causal: Any = causal_model(model)
    # Older versions of transformers know only the second name, newer ones warn of it.
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def checkpoints_activations(model: torch.nn.Module) -> bool:
    """Whether :func:`checkpoint_activations` was called."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def transformers_log_level(level: int) -> Iterator[None]:
    """Set the level of transformers' log in this block."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(level)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def architectures_of(config: Any) -> list[str]:
    """The classes that a configuration names; none where the field holds anything but a list."""
    named = getattr(config, "architectures", None)
    return [str(name) for name in named] if isinstance(named, list | tuple) else []


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def context_length(config: Any) -> int | None:
    """Positions of the model, where its configuration gives them."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    return next((int(value) for name in names if (value := getattr(text, name, None))), None)


def sharing_obstacle(model: PreTrainedModel, config: Any) -> str | None:
    """Why responses to one prompt cannot share its encoding, in one line; None where they can."""
    types = getattr(config, "layer_types", None)
    name, mixers = type(model).__name__, mixers_of(model)
    forking = _RECURRENT if len(mixers) >= sum(t in _RECURRENT for t in types or ()) else set()
    unshareable = sorted(set(types or ()) - _SHAREABLE - forking)
    if changed := changed_classes(model):
        return f"{', '.join(changed)} of this transformers mixes tokens in a way that prefopt does not know"
    if unshareable:
        return f"{name} has layers of type {', '.join(unshareable)}, whose state cannot fork at the end of a prompt"
    if getattr(model, "_is_stateful", False) and not types:  # a hybrid family may have attention in every layer
        return f"{name} is recurrent: its state cannot fork at the end of a prompt"
    if getattr(config, "attention_chunk_size", None):
        return f"{name} attends in chunks that only its own mask knows"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return f"{name} adds ALiBi distances to its attention scores"
    if not mixers and not getattr(model, "_supports_attention_backend", False):  # hybrids have it and do not say so
        return f"{name} does not offer the attention hook of transformers"
    return None


def rope_limit(config: Any) -> int | None:
    """Length at which longrope changes its frequencies. The type ``dynamic`` changes them only beyond
    ``max_position_embeddings``, which no row may exceed."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    common = getattr(config, "original_max_position_embeddings", None)
    limits = [s.get("original_max_position_embeddings") or common for s in sets if s.get("rope_type") == "longrope"]
    return min((int(x) for x in limits if x), default=None)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention layer: query heads, key heads, their widths, and the sliding window (None: full attention)."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    window: int | None


def attention_shapes(config: Any) -> list[AttentionShape]:
    """A shape for every layer with attention."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    types = getattr(text, "layer_types", None) or [default] * text.num_hidden_layers
    per_layer = getattr(text, "per_layer_config", None)  # where layers differ, the common fields must not be read
    return [
        _attention_shape(per_layer[n] if per_layer else text, window if layer == "sliding_attention" else None)
        for n, layer in enumerate(types)
        if layer not in _NO_ATTENTION
    ]


def _attention_shape(config: Any, window: int | None) -> AttentionShape:
    heads: int = getattr(config, "num_attention_heads", 0)
    key_heads: int = getattr(config, "num_key_value_heads", None) or heads or 1
    if getattr(config, "qk_nope_head_dim", None) is not None:  # multi-head latent attention
        width: int = config.qk_nope_head_dim + config.qk_rope_head_dim
        return AttentionShape(heads, key_heads, width, config.v_head_dim, window)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return AttentionShape(heads, key_heads, width, width, window)


def logit_transforms(config: Any) -> list[tuple[float, float | None]]:
    """Scales and soft-caps of logits that the configuration may mean, the likeliest first."""
    scales: list[float] = []
    for name in SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            both = (float(value), 1.0 / float(value))
            scales += reversed(both) if name == "logits_scaling" else both
    found = [getattr(config, name, None) for name in SOFTCAPS]
    caps: list[float | None] = [float(cap) for cap in found if isinstance(cap, int | float) and cap]
    return list(product(dict.fromkeys([*scales, 1.0]), dict.fromkeys([*caps, None])))


def class_logits(
    model: PreTrainedModel, hidden: torch.Tensor, weights: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits [rows, V] of hidden [rows, H] by the class's own forward, float32 or wider, with ``weights`` replaced."""
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    arguments = {"input_ids": ids, "use_cache": False, "return_dict": True}
    with _answering(model, hidden):
        out: Any = model(**arguments) if weights is None else torch.func.functional_call(model, weights, (), arguments)
    logits: torch.Tensor = out.logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The current values of all weights that :func:`class_logits` reads."""
    body = {id(m) for m in body_of(model).modules()}
    return {
        f"{prefix}.{name}" if prefix else name: parameter.data
        for prefix, module in model.named_modules()
        if id(module) not in body
        for name, parameter in module.named_parameters(recurse=False)
    }


class _Answer(BaseModelOutputWithPast):  # type: ignore[misc]
    """The output of a body: hidden states, and None for any other field."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """In this block the layers of ``model`` compute nothing: their last hidden state is ``hidden`` [rows, H]."""
    decoder: Any = model.get_decoder()  # OPT calls it past the body
    body = body_of(model)
    inner = [body, *(m for m in body.modules() if m is decoder and m is not body)]
    asked = []

    def answer(*_: Any, **__: Any) -> _Answer:
        asked.append(True)
        return _Answer(last_hidden_state=hidden[None])

    for module in inner:
        module.forward = answer
    try:
        yield
        assert asked, "logits do not depend on these hidden states"
    finally:
        for module in inner:
            del module.forward


def without_mtp(config: Any) -> None:
    """Remove layers for multi-token prediction from a configuration."""
    for part, count in product((config, config.get_text_config()), MTP_COUNTS):
        if getattr(part, count, None):
            setattr(part, count, 0)


def experts_per_token(config: Any) -> int | None:
    """Experts that one token is sent to, by a text configuration; None without experts."""
    return _number(config, ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"))


def expert_fraction(config: Any) -> float:
    """Fraction of a mixture's experts that one token is sent to, on average; 1 without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts, chosen = _number(config, names), experts_per_token(config)
    if not experts or not chosen:
        return 1.0
    return chosen / (experts + (_number(config, ("zero_expert_num",)) or 0))  # LongCat's zero experts compute nothing


def _number(config: Any, names: Sequence[str]) -> int | None:
    """The first of these fields that has a number; DBRX keeps its own in a part of the configuration."""
    for part in (config, getattr(config, "ffn_config", None)):
        for value in (getattr(part, name, None) for name in names):
            if isinstance(value, list | tuple) and value:  # one for every layer
                value = value[0]
            if isinstance(value, int) and value:
                return value
    return None
