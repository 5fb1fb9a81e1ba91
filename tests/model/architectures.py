"""Small models of every architecture that prefopt names as supported, and of those that it must recognise."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.model.precision import disable_dropout

VOCABULARY, WINDOW, POSITIONS = 97, 8, 128

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_UNGROUPED = {k: v for k, v in _BASE.items() if k != "num_key_value_heads"}
_EXPERTS = {"head_dim": 8, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# name: (type in transformers, fields of its configuration)
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**_GPT2, **_IDS}),
    "llama": ("llama", _BASE),
    "mistral": ("mistral", {**_BASE, "sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_BASE, **_SLIDING, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**_BASE, **_SLIDING, "head_dim": 8}),
    "qwen2": ("qwen2", _BASE),
    "qwen3": ("qwen3", {**_BASE, "head_dim": 16}),
    "phi3": ("phi3", _BASE),
    "olmo2": ("olmo2", _BASE),
    "smollm3": ("smollm3", {**_BASE, "num_hidden_layers": 4}),
    "gpt_neox": ("gpt_neox", _UNGROUPED),
    "opt": ("opt", {**_UNGROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "granite": ("granite", {**_BASE, "logits_scaling": 3.0, "attention_multiplier": 0.3}),
    "cohere": ("cohere", _BASE),
    "mixtral": ("mixtral", {**_BASE, "num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {**_BASE, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "gpt_oss": ("gpt_oss", {**_BASE, **_EXPERTS, **_SLIDING, "num_local_experts": 4}),
    # Shapes that are easy to get wrong.
    "odd heads": (
        "llama",
        {**_BASE, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
    ),
    "six on two heads": ("llama", {**_BASE, "hidden_size": 36, "num_attention_heads": 6, "head_dim": 8}),
    "five on one head": (
        "llama",
        {**_BASE, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64},
    ),
    "wide heads": ("mistral", {**_BASE, "num_attention_heads": 2, "head_dim": 256, "sliding_window": WINDOW}),
    "head with bias": ("phi", {**_BASE, "partial_rotary_factor": 0.5}),
    "latent attention": (
        "deepseek_v3",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
}

_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2 = {**_MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
_PURE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, **_IDS}
_MIXTURE = {**_EXPERTS, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}
# Recurrent layers, alone or beside attention, that share prefixes. name: (type, fields)
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", {**_BASE, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "granite hybrid": (
        "granitemoehybrid",
        {**_BASE, **_MIXTURE, **_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "qwen3.5": ("qwen3_5_text", {**_BASE, **_LINEAR, "linear_num_value_heads": 4}),
    "mamba": ("mamba", {**_PURE, "state_size": 4}),
    "jamba": (
        "jamba",
        {**_BASE, **_MIXTURE, **_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "recurrent gemma": (
        "recurrent_gemma",
        {
            **_BASE,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": WINDOW,
            "logits_soft_cap": 2.0,
            "lru_width": 32,
            "head_dim": 8,
        },
    ),
    "minimax": (
        "minimax",
        {**_BASE, **_MIXTURE, "layer_types": ["linear_attention", "full_attention"], "block_size": WINDOW},
    ),
}

# name: (type, fields, a word of the reason)
SEPARATE: dict[str, tuple[str, dict[str, Any], str]] = {
    "xlstm": ("xlstm", {**_PURE, "num_heads": 4, "embedding_dim": 32}, "fork"),
    "zaya": ("zaya", {**_BASE, **_MIXTURE, "num_experts_per_tok": 1}, "hybrid"),
    "llama4": (
        "llama4_text",
        {**_BASE, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW},
        "chunked_attention",
    ),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS}, "ALiBi"),
    "falcon": ("falcon", {**_UNGROUPED, "alibi": True, "ffn_hidden_size": 48}, "ALiBi"),
}


def build(
    name: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, silent: bool = True, **changes: Any
) -> PreTrainedModel:
    """A random model of SHARED, HYBRIDS or SEPARATE, its norms and biases random too, with eager attention.

    ``silent``: dropout off. ``changes``: other fields of its configuration.
    """
    kind, fields = (SHARED | HYBRIDS)[name] if name in SHARED | HYBRIDS else SEPARATE[name][:2]
    config = AutoConfig.for_model(kind, **{**fields, **changes})
    if silent:
        disable_dropout(config)
    extra = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    torch.manual_seed(seed)
    # Drawn in float64, so that a seed gives the same weights in every dtype.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float64, **extra
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.to(dtype).eval()


class Float64Throughout(TorchFunctionMode):
    """Takes the float32 out of float64 models, so that two ways of scoring can be compared to the last digits.

    Norms and eager attention ask for float32 whatever the model is in; the rounding differs with the order of sums.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()}
        return func(*args, **kwargs)


def with_exact_rotary(model: PreTrainedModel) -> PreTrainedModel:
    """Make every rotary module read its cosines and sines from one table.

    They are float32 even in a float64 model, and their last digit depends on where in the row a position stands.
    """
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.forward = _from_table(module.forward)  # type: ignore[method-assign]
    return model


def _from_table(compute: Any) -> Any:
    tables: dict[Any, Any] = {}

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        if layer_type not in tables:
            more = {} if layer_type is None else {"layer_type": layer_type}
            tables[layer_type] = compute(x, torch.arange(POSITIONS)[None], **more)
        table = tables[layer_type]
        if position_ids.dim() == 3:  # of time, height and width, which are one for text
            assert (position_ids == position_ids[:1]).all()
            position_ids = position_ids[0]
        if isinstance(table, torch.Tensor):  # complex numbers (Llama 4)
            return table[0][position_ids]
        return tuple(part[0][position_ids] for part in table)

    return forward
