"""Arithmetic of a DPO step on the benchmark's model, counted in matrix products."""

from __future__ import annotations

from llama_40m import CONFIG
from pairs import Pair

WIDTH, LAYERS = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
BODY = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * CONFIG["intermediate_size"])
HEAD = WIDTH * CONFIG["vocab_size"]
TRAIN = 3  # forward once, backward twice that


def needed_flops(pair: Pair) -> int:
    """What the step of one pair needs: the prompt once, no padding, the head at response tokens, causal attention."""
    prompt, responses = len(pair.prompt_ids), pair.responses
    tokens = prompt + sum(responses)
    attended = prompt * (prompt + 1) // 2 + sum(r * prompt + r * (r + 1) // 2 for r in responses)
    return TRAIN * (2 * BODY * tokens + 2 * HEAD * sum(responses) + 4 * WIDTH * LAYERS * attended)


def padded_flops(pairs: list[Pair]) -> int:
    """What a trainer does that pads the 2n sequences of one micro-batch to the longest and projects every position."""
    rows, length = 2 * len(pairs), max(pair.longest for pair in pairs)
    attended = length * (length + 1) // 2
    return TRAIN * rows * (2 * (BODY + HEAD) * length + 4 * WIDTH * LAYERS * attended)
