"""Which architectures share prefixes, and what a hybrid's step costs: python benchmarks/architectures.py [--json OUT]

Two tables:

- every family of ``tests/model/families.py``, built in miniature: shared or separate, and why;
- a step (scores and gradients of ``--groups`` prompts with two responses each) of random hybrids, shared and with a row
  for each response, and of their dense twin, a Llama of the same width and depth. Of tokens alone a prompt of twice the
  response gives 4 / 6. Sides take turns; medians are printed, and the ratio within each round. Seconds are the
  processor's, of one thread: other programs on the machine disturb those least.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.data.group import Group
from prefopt.errors import PrefoptError
from prefopt.model.packing import pack
from prefopt.model.precision import disable_dropout
from prefopt.model.scorer import Scorer

VOCABULARY = 2_048
_MAMBA: dict[str, Any] = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
_LINEAR: dict[str, Any] = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64}


def hybrids(width: int, layers: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Three recurrent layers to one with attention, where a family has both."""
    heads = width // 64
    kinds = ["linear_attention" if n % 4 < 3 else "full_attention" for n in range(layers)]
    mamba2 = {**_MAMBA, "mamba_d_state": 64, "mamba_n_heads": 2 * heads, "mamba_d_head": 64, "mamba_n_groups": 1}
    delta = {**_LINEAR, "linear_num_key_heads": heads, "linear_num_value_heads": 2 * heads, "layer_types": kinds}
    return {
        "dense (Llama)": ("llama", {}),
        "short convolution (LFM2)": ("lfm2", {"layer_types": ["conv" if "lin" in k else k for k in kinds]}),
        "Mamba 2 (Bamba)": ("bamba", {**mamba2, "attn_layer_indices": list(range(3, layers, 4))}),
        "Mamba 2 beside attention (Falcon-H1)": ("falcon_h1", {**mamba2, "mamba_d_ssm": 2 * width}),
        "gated delta (Qwen3.5)": ("qwen3_5_text", delta),
        "Mamba (Jamba)": ("jamba", {**_MAMBA, "attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 1}),
        "Mamba alone": ("mamba", {"state_size": 16}),
        "RG-LRU (RecurrentGemma)": (
            "recurrent_gemma",
            {
                "block_types": ["recurrent", "recurrent", "recurrent", "attention"],
                "lru_width": width,
                "head_dim": 64,
                "attention_window_size": 4_096,
            },
        ),
    }


def build(kind: str, fields: dict[str, Any], width: int, layers: int) -> PreTrainedModel:
    """A random model in float32."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "max_position_embeddings": 8_192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**common, **fields})
    disable_dropout(config)
    return AutoModelForCausalLM.from_config(config)


def count() -> dict[str, str]:
    """``shared``, or why not, for every family that can be built in miniature."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from model.families import FAMILIES, config_of

    found = {}
    for family in FAMILIES:
        config = config_of(family)
        disable_dropout(config)
        try:
            scorer = Scorer(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
            found[family] = scorer.reason or "shared"
        except PrefoptError as error:
            found[family] = f"refused: {error}"
    return found


def pairs(groups: int, response: int, times: float) -> list[Group]:
    """Prompts of ``times`` the response with two responses of about ``response`` tokens."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(groups):
        prefix = rng.integers(3, VOCABULARY, round(times * response))
        lengths = (response + int(rng.integers(-7, 8)), response + int(rng.integers(-7, 8)))
        rows = [np.concatenate([prefix, [3 + k], rng.integers(3, VOCABULARY, n)]) for k, n in enumerate(lengths)]
        made.append(Group.from_sequences([(row, np.arange(len(row)) >= len(prefix)) for row in rows], row=0))
    return made


def step(scorer: Scorer, groups: list[Group]) -> float:
    """Processor seconds of scores and gradients."""
    scorer.model.zero_grad()
    start = time.process_time()
    scored = scorer(pack(groups, scorer.layout))
    assert isinstance(scored, torch.Tensor)
    scored.mean().backward()
    return time.process_time() - start


def timed(model: PreTrainedModel, groups: list[Group], rounds: int) -> dict[str, float]:
    """Median seconds of a step, shared and separate, and the median ratio."""
    seconds: dict[str, list[float]] = {"shared": [], "separate": []}
    for _ in range(rounds + 1):
        for side in seconds:
            scorer = Scorer(model, share=side == "shared")
            assert scorer.path == side, scorer.reason
            seconds[side].append(step(scorer, groups))
            scorer.release()
    kept = {side: values[1:] for side, values in seconds.items()}  # the first warms up
    ratios = [a / b for a, b in zip(kept["shared"], kept["separate"], strict=True)]
    return {side: statistics.median(v) for side, v in kept.items()} | {"ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--response", type=int, default=256, help="tokens of a response")
    parser.add_argument("--times", type=float, default=2.0, help="length of a prompt, in responses")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["count", "time"])
    parser.add_argument("--kind", default="", help="time those alone whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results: dict[str, Any] = {}
    if options.only != "time":
        results["families"] = count()
        for family, found in results["families"].items():
            print(f"{family:28} {found}")
        print(f"shared: {sum(f == 'shared' for f in results['families'].values())} of {len(results['families'])}\n")
    if options.only != "count":
        groups = pairs(options.groups, options.response, options.times)
        print(f"{'':38} {'shared':>9} {'separate':>9} {'ratio':>6}")
        kinds = {n: k for n, k in hybrids(options.width, options.layers).items() if options.kind in n}
        for name, (kind, fields) in kinds.items():
            model = build(kind, fields, options.width, options.layers)
            found = results.setdefault("seconds", {})[name] = timed(model, groups, options.rounds)
            print(f"{name:38} {found['shared']:7.2f} s {found['separate']:7.2f} s {found['ratio']:6.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
