"""The pairs of a case: the same rows, in the same order, cut in the same way, as text for prefopt and as ids for TRL.

The ids are made here, independently of prefopt; where prefopt's own rendering gave other ones, the log-probabilities of
the first step would differ, which `dpo_throughput.py` checks.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_40m import read_pairs
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MIN_PROMPT = 128


@dataclass(frozen=True)
class Pair:
    """Token ids. An example: prompt [1, 7], chosen [8, 9, 2], rejected [8, 2] is encoded as two sequences
    [1, 7, 8, 9, 2] and [1, 7, 8, 2] by a trainer that shares nothing."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def responses(self) -> tuple[int, int]:
        return len(self.chosen_ids), len(self.rejected_ids)

    @property
    def longest(self) -> int:
        return len(self.prompt_ids) + max(self.responses)


def cut(pair: Pair, max_length: int) -> Pair:
    """Cut to ``max_length``: the prompt from the left, but not below 128 tokens, then the end of the responses."""
    room = max(max_length - max(pair.responses), min(MIN_PROMPT, max_length - 1))
    prompt = pair.prompt_ids[-room:]
    rest = max_length - len(prompt)
    return Pair(prompt, pair.chosen_ids[:rest], pair.rejected_ids[:rest])


def render(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Ids of one row in the explicit conversational layout."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    sides = []
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        if whole[: len(prompt)] != prompt:
            raise AssertionError("the benchmark's template and tokenizer keep the prompt's tokens")
        sides.append(whole[len(prompt) :])
    return Pair(prompt, *sides)


def choose(
    data_root: Path, name: str, model: Path, count: int, longest: bool, max_length: int
) -> tuple[list[dict[str, Any]], list[Pair]]:
    """``count`` rows and their pairs: the longest ones first, or a sample in a fixed random order."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = read_pairs(data_root, name)
    random.Random(0).shuffle(rows)
    if longest:
        rows.sort(key=lambda row: -render(row, tokenizer).longest)
    rows = rows[:count]
    if len(rows) < count:
        raise SystemExit(f"{name} has {len(rows)} pairs, {count} are needed: fewer --steps")
    return rows, [cut(render(row, tokenizer), max_length) for row in rows]


def write(folder: Path, rows: list[dict[str, Any]], pairs: list[Pair]) -> tuple[Path, Path]:
    """The text of the rows (JSON lines) and their ids (JSON)."""
    text, ids = folder / "pairs.jsonl", folder / "ids.json"
    text.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    ids.write_text(json.dumps([vars(pair) for pair in pairs]), encoding="utf-8")
    return text, ids
