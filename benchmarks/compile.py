"""What compiled layers save: python benchmarks/compile.py [--dtype bfloat16 --rows 6 --rounds 5 --lora --json OUT]

Forward and backward passes of the benchmark's Llama (40M parameters, random weights) over packed pairs, by the layers
as they are and compiled, in turn in one process: the ratio is that of the medians, and holds on a busy machine too. The
rows differ in length and in the number of pairs, so that graphs that depend on shapes would be recompiled; how many
were made, and how far values and gradients are apart, is printed as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_40m import CONFIG
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.data.group import Group
from prefopt.model.adapter import new_lora
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer


def model_of(options: argparse.Namespace) -> torch.nn.Module:
    """The model, in training mode: all weights train, or with ``--lora`` an adapter of rank 16."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIG), dtype=torch.float32)
    if options.lora:
        frozen = model.requires_grad_(False)
        model = new_lora(frozen, rank=16, alpha=32, dropout=0.0, targets=["all-linear"], task="CAUSAL_LM")
    MasterWeights(model, getattr(torch, options.dtype))
    trained: torch.nn.Module = model.to(options.device).train()
    return trained


def row_of(seed: int, tokens: int, scorer: Scorer) -> PackedBatch:
    """Pairs of random tokens, about ``tokens`` in all: a third of each is its prompt."""
    draw = np.random.default_rng(seed)
    groups, size = [], 0
    while size < tokens:
        prompt, *answers = (int(n) for n in draw.integers(60, 240, 3))
        start = draw.integers(0, 32_000, prompt)
        ids = [np.concatenate([start, draw.integers(0, 32_000, n)]) for n in answers]
        groups.append(Group.from_sequences([(x, np.arange(len(x)) >= prompt) for x in ids], row=0))
        size += prompt + sum(answers)
    return pack(groups, scorer.layout).to(next(scorer.model.parameters()).device)


def passed(scorer: Scorer, row: PackedBatch) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
    """Seconds of a forward and backward pass, log-probabilities and gradients."""
    trained = [p for p in scorer.model.parameters() if p.requires_grad]
    cuda = row.target.device.type == "cuda"
    started = time.perf_counter()
    logp_M: Any = scorer(row)
    grads = torch.autograd.grad(logp_M.sum(), trained)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, logp_M.detach(), list(grads)


def apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Norm of the difference relative to the norm."""
    difference = sum(float((a.double() - b.double()).norm() ** 2) for a, b in zip(found, wanted, strict=True))
    return float((difference / sum(float(b.double().norm() ** 2) for b in wanted)) ** 0.5)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both ways over all rows, in turn."""
    scorer = Scorer(model_of(options))
    rows = [row_of(seed, options.tokens + 150 * seed, scorer) for seed in range(options.rows)]
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    scorer.compile_layers(backend=options.backend)
    compiled, first, errors = scorer.compiled, 0.0, [0.0, 0.0]
    for turn in range(options.rounds + 1):  # the first compiles, and is compared instead of timed
        for row in rows:
            taken = {}
            for way in seconds:
                scorer.compiled = compiled if way == "compiled" else None
                taken[way] = passed(scorer, row)
                if turn:
                    seconds[way].append(taken[way][0])
            if not turn:
                first = max(first, taken["compiled"][0])
                found = [
                    apart([taken["compiled"][1]], [taken["eager"][1]]),
                    apart(taken["compiled"][2], taken["eager"][2]),
                ]
                errors = [max(a, b) for a, b in zip(errors, found, strict=True)]
    assert compiled is not None
    median = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "dtype": options.dtype,
        "lora": options.lora,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": [row.tokens for row in rows],
        "failure": compiled.failure,
        "graphs": int(counters["stats"]["unique_graphs"]),
        "breaks": sum(counters["graph_break"].values()),
        "first pass, seconds": round(first, 1),
        "median seconds": {way: round(value, 4) for way, value in median.items()},
        "eager / compiled": round(median["eager"] / median["compiled"], 3),
        "difference of values": errors[0],
        "difference of gradients": errors[1],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the shortest row")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
