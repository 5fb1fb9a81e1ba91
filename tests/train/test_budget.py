"""The estimate of activations against the tensors that a forward pass keeps for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from model.architectures import build
from model.families import FAMILIES, config_of
from model.oracle import Draw
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.scorer import Scorer
from prefopt.train.budget import active_width, bytes_per_token

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"intermediate_size": 688}),
    "mixtral": ("mixtral", {"intermediate_size": 512, "num_local_experts": 8}),
    "many narrow experts": (
        "qwen3_moe",
        {"intermediate_size": 688, "moe_intermediate_size": 96, "num_experts": 32, "num_experts_per_tok": 8},
    ),
    # A config keeps the width of dense layers that the model has none of.
    "few experts": (
        "qwen3_moe",
        {"intermediate_size": 2048, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "intermediate_size": 256,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "shared expert": (
        "latent attention",
        {"intermediate_size": 1024, "moe_intermediate_size": 128, "n_routed_experts": 16, "num_experts_per_tok": 4},
    ),
}


def kept(model: torch.nn.Module, scorer: Scorer, batch: PackedBatch) -> int:
    """Bytes of the tensors that backward will read, without weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes again

    def note(x: torch.Tensor) -> torch.Tensor:
        if (storage := x.untyped_storage()).data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        scorer(batch)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        (name, experts)
        for name in MODELS
        for experts in ("eager", "grouped_mm")
        if (name, experts) != ("dense", "eager")
    ],
)
def test_activations_are_not_more_than_estimated(name: str, experts: str) -> None:
    kind, fields = MODELS[name]
    model = build(kind, torch.float32, **WIDE, **fields)
    model.config._experts_implementation = experts
    draw, scorer = Draw(0), Scorer(model)
    batch = pack([draw.group(100, 50, 60) for _ in range(3)], scorer.layout)
    estimated = bytes_per_token(scorer, checkpointing=False)
    counted = kept(model, scorer, batch) / batch.tokens
    assert counted <= estimated <= 1.75 * counted


def test_a_token_is_computed_with_the_experts_it_is_sent_to() -> None:
    def width(kind: str, **fields: Any) -> int:
        return active_width(AutoConfig.for_model(kind, hidden_size=32, intermediate_size=48, **fields))

    few = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    assert width("qwen2_moe", **few, num_experts=4, shared_expert_intermediate_size=24) == 2 * 16 + 24
    assert width("deepseek_v3", **few, n_routed_experts=4, n_shared_experts=2) == 4 * 16
    assert width("mixtral", num_experts_per_tok=2, num_local_experts=4) == 2 * 48
    assert width("llama", num_experts_per_tok=2) == 48, "without experts"
    assert all(active_width(config_of(family).get_text_config()) > 0 for family in FAMILIES)
