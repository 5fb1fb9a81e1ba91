"""How many tokens go through the model at once: estimated from its size and the free memory, then tried.

The estimate counts what a transformer layer keeps for backward, in numbers per token: about 20 times the hidden and 4
times the intermediate width. With activation checkpointing only a layer's input stays, and one layer's inside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.data.packer import pack
from prefopt.data.table import GroupTable, IndexArray
from prefopt.errors import RunError
from prefopt.model.logprobs import KEEP_BYTES
from prefopt.model.memory import free_memory, out_of_memory
from prefopt.model.packed import PackedModel, causal_model
from prefopt.model.precision import MasterWeights
from prefopt.train.objective import Objective
from prefopt.train.step import differentiate, same_randomness

SHARE = 0.5
"""Of the free memory, what activations may take: the rest is for gradients, optimiser state and fragmentation."""

# More tokens at once than these gain nothing: matrix products are as fast as they get.
CEILING = {"cpu": 2048, "cuda": 32768, "mps": 4096}


def state_bytes(masters: MasterWeights) -> int:
    """Bytes that gradients and the optimiser's two moments take beside the weights."""
    return 3 * sum(p.numel() * p.element_size() for p in masters.masters.values())


def bytes_per_token(scorer: PackedModel, *, checkpointing: bool) -> int:
    """Estimated bytes of activations that one token leaves for backward."""
    config: Any = causal_model(scorer.model).config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    inner = int(max(inner) if isinstance(inner, (list, tuple)) else inner)
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    layer = 20 * hidden + 4 * inner * experts
    numbers = layers * hidden + layer if checkpointing else layers * layer
    return numbers * scorer.dtype.itemsize


def estimate(scorer: PackedModel, groups: Sequence[Group], *, checkpointing: bool, still_to_come: int) -> int:
    """A token budget for training. ``still_to_come``: bytes that gradients and optimiser state will take."""
    device = next(scorer.model.parameters()).device
    free = free_memory(device) - still_to_come - KEEP_BYTES
    affordable = int(max(0, free) * SHARE) // bytes_per_token(scorer, checkpointing=checkpointing)
    largest = int(scorer.layout.costs(GroupTable.of(groups)).max())
    return max(largest, min(affordable, CEILING[device.type]))


def largest_batch(costs: IndexArray, token_budget: int) -> list[int]:
    """The groups that strain the memory most: the largest, as many as go into one micro-batch."""
    order = np.argsort(-costs, kind="stable")
    smallest = int(costs[order[-1]])
    taken: list[int] = []
    room = token_budget
    for i, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        if taken and cost > room:
            continue
        taken.append(i)
        room -= cost
        if room < smallest:
            break
    return taken


def try_largest(
    scorer: PackedModel, masters: MasterWeights, objective: Objective, groups: Sequence[Group], token_budget: int
) -> tuple[int, float]:
    """Run forward and backward on the largest micro-batch, halving the budget where memory ends.

    Returns the budget that works and the tokens per second it ran at. Weights and random states stay as they were.
    """
    device = next(scorer.model.parameters()).device
    scorer.train()
    costs = scorer.layout.costs(GroupTable.of(groups))
    largest = int(costs.max())
    while True:
        part = largest_batch(costs, token_budget)
        batch = pack([groups[i] for i in part], scorer.layout).to(device)
        started = time.monotonic()
        try:
            with same_randomness(device):
                differentiate(scorer, objective, part, lambda: [(part, batch)])  # noqa: B023
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return token_budget, batch.tokens / (time.monotonic() - started)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if token_budget <= largest:
                raise RunError(
                    f"the largest pair, of {token_budget} tokens, does not fit into the device's memory; give"
                    " --gradient-checkpointing, --lora or a smaller --max-length"
                ) from error
            token_budget = max(largest, token_budget // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        finally:
            masters.zero_grad()
