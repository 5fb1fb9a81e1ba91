"""How large a model would be, known before there is memory for it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt.errors import ModelError
from prefopt.model.checkpoint import Checkpoint
from prefopt.model.load_errors import model_errors
from prefopt.model.memory import free_memory
from prefopt.model.quantised import quantisation_of
from prefopt.progress import size

SLACK = 4
"""A configuration may want so many times the parameters that its weights hold: what is missing is said at loading."""
PACKED = 32
"""Weights that one number in a quantised file may hold, at most: bits in 32."""
SMALL = 10_000_000
"""Parameters that need no question."""


def parameters_of(kind: Any, name: str, config: PreTrainedConfig) -> int:
    """Parameters of the model that the auto class ``kind`` makes of a configuration, none of them given memory."""
    state = torch.random.get_rng_state()
    try:
        with model_errors(name), torch.device("meta"):
            made: torch.nn.Module = kind.from_config(copy.deepcopy(config), trust_remote_code=False)
    finally:
        torch.random.set_rng_state(state)
    return sum(p.numel() for p in made.parameters())


def check_size(kind: Any, folder: str, config: PreTrainedConfig) -> None:
    """Raises :class:`ModelError` where a folder's configuration wants far more parameters than its weights hold.

    Only the files that are loaded count: others may be there, and may say anything.
    """
    try:
        tensors = Checkpoint.read(folder).tensors
    except ModelError:  # loading says why
        return
    held = sum(math.prod(stored.shape) for stored in tensors.values())
    wanted = parameters_of(kind, folder, config)
    slack = SLACK * (PACKED if quantisation_of(config) else 1)
    if wanted > slack * held + SMALL:
        raise ModelError(
            f"{folder}: config.json wants {wanted:,} parameters, the weights hold {held:,}; they do not belong together"
        )


def check_fits(kind: Any, folder: str, config: PreTrainedConfig) -> None:
    """Raises :class:`ModelError` where a model with new weights would not fit into the memory, in float32."""
    needed, free = 4 * parameters_of(kind, folder, config), free_memory(torch.device("cpu"))
    if needed > free:
        raise ModelError(f"{folder}: config.json describes a model of {size(needed)}, and {size(free)} are free")
