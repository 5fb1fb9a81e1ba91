"""``benchmarks/scaling.py`` counts what the closed formulas say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from parallel.ranks import on_ranks

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
RANKS, NODE = 8, 4


def _counted(hybrid: bool, checkpointing: bool) -> dict[str, Any]:
    script = runpy.run_path(str(SCRIPT))
    found = script["count_shape"](SHAPE, RANKS, hybrid=hybrid, checkpointing=checkpointing, node=NODE)
    return {"calls": found.calls, "bytes": found.bytes, "held": found.shard_bytes, "largest": found.largest_gathered}


@pytest.mark.parametrize(("hybrid", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_collectives_of_shards_are_those_of_the_formulas(hybrid: bool, checkpointing: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    weights = sum(p.numel() for p in model.parameters())
    layers = sum(p.numel() for p in model.model.layers.parameters())
    root, count = weights - layers, int(SHAPE["num_hidden_layers"])
    (found,) = on_ranks(1, _counted, hybrid, checkpointing)
    # Each layer in bfloat16 for the forward pass and again for the backward pass; the rest is kept meanwhile.
    wanted_bytes = {"gather forward": 2 * weights, "gather backward": 2 * layers, "reduce-scatter": 4 * weights}
    wanted_calls = {"gather forward": count + 1, "gather backward": count, "reduce-scatter": count + 1}
    if hybrid:  # the shard that a rank holds, in float32
        wanted_bytes["all-reduce"], wanted_calls["all-reduce"] = 4 * weights // NODE, count + 1
    assert found["bytes"] == wanted_bytes
    assert found["calls"] == wanted_calls
    assert found["held"] == 4 * weights // (NODE if hybrid else RANKS)
    assert found["largest"] == 2 * max(root, layers // count)
