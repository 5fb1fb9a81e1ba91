"""Writes the tables of docs/memory.md: python docs/make_memory.py.

What a pass takes is counted on the models' own code, without contents and with the kernels of a GPU
(src/prefopt/model/memory.py); weights and their state are arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.data.group import Group
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.memory import Blueprint, PassMemory
from prefopt.model.offload import HostActivations
from prefopt.model.scorer import Scorer
from prefopt.train.budget import CEILING
from prefopt.train.memory import ENOUGH, SHARE

PAGE = Path(__file__).with_name("memory.md")
TABLES = re.compile(r"(<!-- tables -->\n).*?(<!-- end -->)", re.S)
GB = 10**9
CARDS = (8, 12, 16, 24, 48, 80, 141)
PROMPT, RESPONSE, MANY = 400, 400, 8
RANK = 16


def qwen(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, *, tied: bool) -> dict[str, Any]:
    return {"kind": "qwen2", "rest": (hidden, inner, layers, heads, kv, vocabulary, tied)}


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {"kind": "llama", "rest": (hidden, inner, layers, heads, kv, 128256, False)}


# Shapes as in the config.json of Qwen2.5 and Llama 3.1.
MODELS = {
    "Qwen2.5 0.5B": qwen(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen2.5 1.5B": qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5 3B": qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Llama 3.1 8B": llama(4096, 14336, 32, 32, 8),
    "Qwen2.5 14B": qwen(5120, 13824, 48, 40, 8, 152064, tied=False),
    "Qwen2.5 32B": qwen(5120, 27648, 64, 40, 8, 152064, tied=False),
    "Llama 3.1 70B": llama(8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Way:
    """How a model is trained: with LoRA, its base in 4 bits, in shards over cards, in host memory, by 8-bit AdamW."""

    lora: bool = False
    four_bits: bool = False
    cards: int = 1
    offload: tuple[str, ...] = ()
    eight_bits: bool = False


@cache
def blueprint(name: str, lora: bool, checkpointed: bool, away: bool) -> Blueprint:
    """A model of the full depth, of which two layers are there."""
    kind, (hidden, inner, layers, heads, kv, vocabulary, tied) = MODELS[name].values()
    config = AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if lora:
        model = new_lora(model.requires_grad_(False), rank=RANK, alpha=2 * RANK, dropout=0.0, targets=None)
    scorer = Scorer(model)
    if checkpointed:
        checkpoint_activations(model)
    if away:
        scorer.offload = HostActivations(scorer)
    two = Blueprint.of(scorer, kind="cuda", dtype=torch.bfloat16)
    return replace(two, depth=(0, *[1] * (layers - 1)))


@cache
def counted(name: str, lora: bool, checkpointed: bool, away: bool, pairs: int) -> PassMemory:
    """A pass over pairs of prompts and responses of one length."""
    prompt = np.zeros(PROMPT, np.int32)
    ids = [np.concatenate([prompt, np.full(RESPONSE, k + 1, np.int32)]) for k in range(2)]
    group = Group.from_sequences([(x, np.arange(len(x)) >= PROMPT) for x in ids], row=0)
    return blueprint(name, lora, checkpointed, away).count([group] * pairs)


@cache
def numbers(name: str, lora: bool) -> dict[str, int]:
    """Of the whole model: trained and frozen numbers, those of linear layers in layers, and of the largest of these."""
    drawn = blueprint(name, lora, False, False)
    layers = drawn.scorer.model.get_decoder().layers if not lora else drawn.scorer.model.model.model.layers
    within = [list(layers[i].named_parameters()) for i in (0, 1)]
    ids = {id(p) for some in within for _, p in some}
    every = [p for p in drawn.scorer.parameters() if id(p) not in ids]
    every += [p for i in drawn.depth for _, p in within[i]]
    base = [p for i in drawn.depth for n, p in within[i] if p.ndim == 2 and "lora_" not in n]
    return {
        "trained": sum(p.numel() for p in every if p.requires_grad),
        "frozen": sum(p.numel() for p in every if not p.requires_grad),
        "linear": sum(p.numel() for p in base),
        "largest": max(p.numel() for p in base),
    }


def state(name: str, way: Way) -> tuple[int, int, int]:
    """Bytes on a card of weights, of gradients with optimiser state, and of what a pass needs beside activations."""
    found = numbers(name, way.lora)
    trained, frozen, moment = found["trained"], found["frozen"], 1 + 4 / 256 if way.eight_bits else 4
    if way.cards > 1:  # the model holds its shards of the float32 weights, and of frozen ones in bfloat16
        drawn = blueprint(name, way.lora, False, False)
        return (4 * trained + 2 * frozen) // way.cards, int((4 + 2 * moment) * trained) // way.cards, drawn.gathered()
    # NF4: half a byte, and a float32 scale for 64 numbers; a layer's weights are dequantised for a moment.
    quantised, extra = (found["linear"], 2 * found["largest"]) if way.four_bits else (0, 0)
    weights = 2 * (trained + frozen - quantised) + quantised * (1 / 2 + 4 / 64)
    if "optimizer" in way.offload:
        return int(weights), 0, extra
    return int(weights + 4 * trained), int((4 + 2 * moment) * trained), extra


def of_pass(name: str, way: Way, checkpointed: bool, pairs: int) -> int:
    return counted(name, way.lora, checkpointed, "activations" in way.offload, pairs).peak


def tokens(name: str, way: Way, card: int) -> str:
    """The longest micro-batch in thousands of tokens; with a star where activations are checkpointed."""
    weights, to_come, extra = state(name, way)
    room = SHARE["cuda"] * (card * GB - weights) - to_come - extra
    pair = PROMPT + 2 * RESPONSE
    for checkpointed in (False, True):
        few, many = (of_pass(name, way, checkpointed, n) for n in (1, MANY))
        if few > room:
            continue
        pairs = 1 + int((MANY - 1) * (room - few) / (many - few))
        fits = min(pair * pairs, CEILING["cuda"])
        if fits >= ENOUGH["cuda"]:
            return f"{fits / 1000:.1f}{'*' if checkpointed else ''}"
    return "–"


def table(way: Way) -> str:
    rows = [["", *(f"{card} GB" for card in CARDS)]]
    rows += [[name, *(tokens(name, way, card) for card in CARDS)] for name in MODELS]
    return in_markdown(rows)


def in_markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(['---', *['---:'] * (len(rows[0]) - 1)])} |", *lines[1:]])


def full_8b() -> str:
    """All weights of the 8 B model by part."""
    name, pairs = "Llama 3.1 8B", 7
    ways = {
        "AdamW": Way(),
        "`--optimizer adamw-8bit`": Way(eight_bits=True),
        "`--offload optimizer`": Way(offload=("optimizer",)),
        "`--offload optimizer activations`": Way(offload=("optimizer", "activations")),
        "shards on 2 GPUs": Way(cards=2),
        "shards on 4 GPUs": Way(cards=4),
    }
    rows = [["", "weights", "gradients and state", f"pass of {pairs * (PROMPT + 2 * RESPONSE):,} tokens", "total"]]
    for label, way in ways.items():
        weights, to_come, extra = state(name, way)
        passing = of_pass(name, way, True, pairs) + extra
        sizes = (weights, to_come, passing, weights + to_come + passing)
        rows.append([label, *(f"{size / GB:.1f} GB" for size in sizes)])
    return in_markdown(rows)


def tables() -> Iterator[str]:
    yield "## All weights of an 8 B model, activations checkpointed\n\n" + full_8b()
    sections: dict[str, Callable[[], str]] = {
        "All weights, one GPU": partial(table, Way()),
        "All weights, one GPU, `--offload optimizer`": partial(table, Way(offload=("optimizer",))),
        "LoRA, one GPU": partial(table, Way(lora=True)),
        "QLoRA, one GPU": partial(table, Way(lora=True, four_bits=True)),
        **{f"All weights, shards on {n} GPUs": partial(table, Way(cards=n)) for n in (2, 4, 8)},
    }
    for title, made in sections.items():
        yield f"## {title}\n\n{made()}"


def written(page: str) -> str:
    """The page with the tables between its two marks as they are computed now."""
    body = "\n\n".join(tables())
    return TABLES.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
