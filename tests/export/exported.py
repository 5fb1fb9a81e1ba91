"""Small models of every family that is exported, far from their start, and their tokenizers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefopt.model.load import quiet_loading
from small_chat import build_model

LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
ROWS = 768
"""Of the embedding: more than the tokenizer has tokens, as in published models."""
PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 500.0}
_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96, "bos_token_id": None}
_GEMMA = {"sliding_window": 8, "head_dim": 24, "query_pre_attn_scalar": 40}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "head_dim": 24}),
    "llama with scaled rotary embeddings": ("llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama with interpolated positions": ("llama", {"rope_parameters": _LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gpt2": ("gpt2", _GPT2),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 7}),
}


def tokenizer_folder(folder: Path) -> Path:
    """A folder with a byte-level tokenizer and a chat template."""
    rows = (Path(__file__).parents[1] / "pairs.jsonl").read_text("utf-8").splitlines()[:14]
    build_model(folder, [turn["content"] for row in rows for turns in json.loads(row).values() for turn in turns])
    return folder


def family(folder: Path, name: str, tokenizer: Path) -> Path:
    """Write the small model of a family, no weight at its start, with the tokenizer of another folder."""
    kind, fields = FAMILIES[name]
    words = AutoTokenizer.from_pretrained(tokenizer)
    given = {**(PLAIN if kind != "gpt2" else {}), **fields, "vocab_size": ROWS, "eos_token_id": words.eos_token_id}
    config = AutoConfig.for_model(kind, **given)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * (0.1 if weight.ndim < 2 else 0.15))
    with quiet_loading():
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder
