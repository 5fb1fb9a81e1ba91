"""Room for an adapter that was trained on a model with more tokens than its base has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prefopt.disk.adapter_folder import read_adapter
from prefopt.disk.vetted import ADAPTER_WEIGHTS
from prefopt.errors import ModelError

ADDED = 1 << 16
"""So many rows may be added for tokens that an adapter names and has no rows of."""
PREFIX = "base_model.model."
"""What PEFT writes before the name of a module."""


def grow_for_adapter(model: Any, folder: str | Path) -> None:
    """Let the embedding and the head of ``model`` have as many rows as the adapter in ``folder`` has of them.

    New rows are zero until the adapter's own are loaded. A model that has room enough stays as it is, and so does one
    of another width: the adapter belongs to another model, and loading says so.
    """
    embedding = model.get_input_embeddings()
    rows = max(_rows(model, Path(folder)), default=0)
    before = int(embedding.weight.shape[0])
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in () if layer is None else layer.parameters():
                if values.shape[0] == rows:  # the weight [rows, H], and a head's bias [rows]
                    values[before:] = 0


def holds_embedding(model: Any, folder: str | Path) -> bool:
    """Whether the adapter in ``folder`` has the embedding or the head of ``model`` whole beside what it trains, as PEFT
    saves them where tokens were added: no base has these rows."""
    trained = ("lora_", "modules_to_save", "original_module", "trainable_tokens")
    names = _ends(model)
    return any(key.startswith(names) and not any(part in key for part in trained) for key, _ in _shapes(Path(folder)))


def _rows(model: Any, folder: Path) -> Iterator[int]:
    """Rows of embedding and head that the adapter speaks of, each time that it does."""
    width = int(model.get_input_embeddings().weight.shape[1])
    most = int(model.get_input_embeddings().weight.shape[0]) + ADDED
    indices = read_adapter(folder).get("trainable_token_indices")
    for several in indices.values() if isinstance(indices, dict) else [indices]:
        for rows in (int(i) + 1 for i in several or ()):
            if rows > most:
                raise ModelError(f"{folder}: it trains token {rows - 1:,}, which the model is far from having")
            yield rows
    names = _ends(model)
    for key, shape in _shapes(folder):
        if not key.startswith(names):
            continue
        if "lora_embedding_A" in key:  # [r, rows]
            yield shape[1]
        elif "lora_B" in key or (shape[1:] == [width] and "lora_" not in key):
            yield shape[0]  # [rows, r] and [rows, H]


def _ends(model: Any) -> tuple[str, ...]:
    """How the names of the weights of embedding and head begin."""
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in ends)


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Names in the model, and shapes, of all weights of an adapter."""
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            yield key.removeprefix(PREFIX), file.get_slice(key).get_shape()
