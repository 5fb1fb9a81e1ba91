"""The architectures whose tensors and sizes prefopt writes into GGUF files itself.

llama.cpp computes a named architecture, and a file may only say what that architecture reads. Where a configuration
asks for more (another activation, scaled rotary embeddings, another pattern of windows), it is refused here, since
llama.cpp would load the file and compute something else. Names of tensors are those of the ``gguf`` package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prefopt.errors import ModelError

Array = npt.NDArray[np.float32]
Metadata = dict[str, int | float | str | bool]

GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers by which llama.cpp recognises the model that scales attention by its width per head."""
_MISTRAL_ALONE = ("model_type", "sliding_window", "architectures")
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class GgufArchitecture:
    """``name``: llama.cpp's name. ``metadata``: what it reads of a configuration, by keys behind ``name.``.
    ``convert``: a tensor by its name in transformers, as llama.cpp wants it. ``added``: tensors that no weight has."""

    name: str
    metadata: Callable[[Any], Metadata]
    convert: Callable[[Any, str, Array], Array] = lambda _config, _name, value: value
    added: Callable[[Any], Mapping[str, Array]] = lambda _config: {}


def architecture_of(config: Any) -> GgufArchitecture | str:
    """The architecture of a text model's configuration, or why prefopt cannot write it."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        return f"{config.model_type} is none of {', '.join(ARCHITECTURES)}"
    try:
        found.metadata(config)
    except ModelError as error:
        return str(error)
    return found


def tensors_of(model: Any, architecture: GgufArchitecture) -> Iterator[tuple[str, torch.Tensor, str]]:
    """GGUF's name, the weight, and its name in ``model``, for every weight once. Raises :class:`ModelError` for a
    weight that the architecture has no place for."""
    import gguf

    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(kind, model.config.get_text_config().num_hidden_layers)
    seen: set[int] = set()
    for name, value in model.named_parameters():
        if id(value) in seen:
            continue
        seen.add(id(value))
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"llama.cpp's {architecture.name} has no place for {name}")
        yield target, value.detach(), name


def _require(config: Any, **wanted: Any) -> None:
    """Raise :class:`ModelError` where a field of the configuration is another than llama.cpp computes."""
    for field, value in wanted.items():
        found = getattr(config, field, None)
        if found != value and found is not None:
            raise ModelError(f"{config.model_type} with {field} {found} is not what llama.cpp computes ({value})")


def _rope(config: Any, kind: str | None = None) -> dict[str, Any]:
    """Rotary parameters of all layers, or of those of a ``kind``."""
    rope: dict[str, Any] = config.rope_parameters
    return rope[kind] if kind is not None and kind in rope else rope


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _sizes(config: Any) -> Metadata:
    """What all architectures with rotary embeddings and RMS norms have."""
    width = _head_width(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": width,
    }


def _rope_scaling(config: Any, rope: Mapping[str, Any], allowed: tuple[str, ...]) -> Metadata:
    """Rotary embeddings as metadata. Raises :class:`ModelError` for a scaling that cannot be told in it."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *allowed):
        raise ModelError(f"{config.model_type} with rotary embeddings of the kind {kind} is not written")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{config.model_type} with rotary embeddings on part of a head is not written")
    found: Metadata = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        fixed = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True}
        if own := [name for name, value in fixed.items() if rope.get(name, value) not in (value, None)]:
            raise ModelError(f"{config.model_type} with {own[0]} of its own for yarn is not written")
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        found |= {"rope.scaling.original_context_length": int(before)}
    return found


# -- llama and mistral -----------------------------------------------------------------------------------------


def _llama(config: Any) -> Metadata:
    _require(config, hidden_act="silu")
    found = _sizes(config) | _rope_scaling(config, _rope(config), ("linear", "llama3", "yarn"))
    window = getattr(config, "sliding_window", None)
    if window:  # llama.cpp has none here: within the window the two are the same
        found["context_length"] = min(config.max_position_embeddings, int(window))
    return found


def _llama_tensor(config: Any, name: str, value: Array) -> Array:
    """Queries and keys with the two halves of each head interleaved, as llama.cpp rotates neighbours."""
    if ".q_proj." in name:
        return _interleaved(value, config.num_attention_heads)
    return _interleaved(value, config.num_key_value_heads) if ".k_proj." in name else value


def _interleaved(value: Array, heads: int) -> Array:
    """Rows [heads, 2, width / 2] of a projection in the order [heads, width / 2, 2]."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))


def _llama_added(config: Any) -> Mapping[str, Array]:
    """Divisors of the frequencies, for the scaling of Llama 3.1."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_width(config)
    plain = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return {"rope_freqs.weight": (plain / scaled.double()).float().numpy()}


# -- qwen ------------------------------------------------------------------------------------------------------


def _qwen(config: Any) -> Metadata:
    _require(config, hidden_act="silu", use_sliding_window=False)
    return _sizes(config) | _rope_scaling(config, _rope(config), ("linear", "yarn"))


def _qwen3(config: Any) -> Metadata:
    _require(config, attention_bias=False)
    return _qwen(config)


# -- gpt2 ------------------------------------------------------------------------------------------------------


def _gpt2(config: Any) -> Metadata:
    _require(config, activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _gpt2_tensor(config: Any, name: str, value: Array) -> Array:
    """GPT-2 stores its matrices transposed."""
    matrix = value.ndim == 2 and (".c_" in name)
    return np.ascontiguousarray(value.T) if matrix else value


# -- gemma -----------------------------------------------------------------------------------------------------


def _gemma(config: Any, period: int) -> Metadata:
    """``period``: every so many layers one attends to everything."""
    _require(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False, use_bidirectional_attention=False)
    pattern = [_FULL if (i + 1) % period == 0 else _SLIDING for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != pattern:
        raise ModelError(f"{config.model_type} with another pattern of sliding windows is not what llama.cpp computes")
    return _sizes(config) | {"attention.sliding_window": int(config.sliding_window)}


def _gemma2(config: Any) -> Metadata:
    caps = {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    if lacking := [name for name, cap in caps.items() if cap is None]:
        raise ModelError(f"gemma2 without {lacking[0]} is not what llama.cpp computes")
    return _gemma(config, 2) | _rope_scaling(config, _rope(config), ()) | {n: float(c) for n, c in caps.items()}


def _gemma3(config: Any) -> Metadata:
    _require(config, attn_logit_softcapping=None, final_logit_softcapping=None)
    local = _rope(config, _SLIDING)
    if local.get("rope_type", "default") != "default" or float(local["rope_theta"]) != 10_000.0:
        raise ModelError("gemma3 with other rotary embeddings inside its windows is not what llama.cpp computes")
    return _gemma(config, 6) | _rope_scaling(config, _rope(config, _FULL), ("linear",))


def _gemma_tensor(config: Any, name: str, value: Array) -> Array:
    """Norms as factors, and the scale of attention where it is not llama.cpp's in the weights before it."""
    scale = np.float32((_gemma_width(config) / config.query_pre_attn_scalar) ** 0.5)
    found = value + np.float32(1) if name.endswith("norm.weight") else value
    scaled = ".q_proj." if config.model_type == "gemma2" else ".q_norm."
    return found * scale if scaled in name and scale != 1 else found


def _gemma_width(config: Any) -> int:
    """llama.cpp divides attention's scores by the root of this."""
    wide = config.num_hidden_layers == GEMMA_27B["gemma2" if config.model_type == "gemma2" else "gemma3"]
    return int(config.hidden_size // config.num_attention_heads) if wide else _head_width(config)


def config_in_file(config: Any) -> Any:
    """The configuration with which transformers computes what a GGUF file of a model of ``config`` holds: the scale of
    Gemma's attention is in its weights there, and a Mistral is a Llama."""
    found = copy.deepcopy(config)
    if config.model_type in ("gemma2", "gemma3_text"):
        found.query_pre_attn_scalar = _gemma_width(config)
    if config.model_type == "mistral":
        fields = {name: value for name, value in config.to_dict().items() if name not in _MISTRAL_ALONE}
        found = LlamaConfig(**fields)
    return found


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", _llama, _llama_tensor, _llama_added),
    "mistral": GgufArchitecture("llama", _llama, _llama_tensor, _llama_added),
    "qwen2": GgufArchitecture("qwen2", _qwen),
    "qwen3": GgufArchitecture("qwen3", _qwen3),
    "gpt2": GgufArchitecture("gpt2", _gpt2, _gpt2_tensor),
    "gemma2": GgufArchitecture("gemma2", _gemma2, _gemma_tensor),
    "gemma3_text": GgufArchitecture("gemma3", _gemma3, _gemma_tensor),
}
"""By the model type of a text model's configuration in transformers."""
