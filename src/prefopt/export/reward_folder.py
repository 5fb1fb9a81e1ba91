"""A reward model as servers of sequence classifiers load it: transformers' class with one label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from prefopt.core.files import output_errors
from prefopt.core.model_folder import base_of, is_adapter
from prefopt.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from prefopt.errors import ModelError
from prefopt.export.scores import Floats
from prefopt.model.load import local_folder, quiet_loading
from prefopt.model.save import apply_umask, save_weights, write_transformers4_fields
from prefopt.model.scalar import has_scalar_head, load_scalar

WHOLE = "vLLM and TGI serve it as it is, and --to gguf and ollama convert it"


def load_reward(name: str, device: torch.device) -> tuple[Any, Tokenizer]:
    """The reward model of a folder or Hub name in float32, an adapter merged, and its tokenizer. Raises
    :class:`ModelError` for a language model."""
    folder = local_folder(name)
    if not has_scalar_head(folder):
        served = "export it --to merged, vllm-lora or gguf" if is_adapter(folder) else WHOLE
        raise ModelError(f"{name} is a language model, not a reward model: {served}")
    own = folder if has_tokenizer(folder) or not is_adapter(folder) else base_of(folder)
    tokenizer = load_tokenizer(own)
    return load_scalar(folder, dtype=torch.float32, device=device, tokenizer=tokenizer), tokenizer


def write_reward(model: Any, tokenizer: Tokenizer, output: Path, dtype: torch.dtype) -> None:
    """Write a model of :func:`load_reward` in ``dtype``; its weights, in float32 still, are rounded in place."""
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
    with output_errors(output), quiet_loading():
        save_weights(output, model, state, dtype)
        tokenizer.save_pretrained(output)
        write_transformers4_fields(output, tokenizer)
        apply_umask(output)


def reload(output: Path) -> Any:
    """The written model as transformers alone loads it, in float32. Raises :class:`ModelError` where it does not."""
    kind: Any = AutoModelForSequenceClassification
    named = json.loads((output / "config.json").read_text("utf-8")).get("architectures") or ["no class"]
    if not str(named[0]).endswith("ForSequenceClassification"):
        raise ModelError(f"{output} names {named[0]}, which is not a sequence classifier; please report this")
    with quiet_loading():
        found: torch.nn.Module = kind.from_pretrained(output, dtype=torch.float32, trust_remote_code=False)
    return found.eval()


@torch.no_grad()
def rewards(model: Any, ids: Sequence[Sequence[int]]) -> list[Floats]:
    """The head's output [1] at the last token of each sequence, before the reward shift."""
    device = next(model.parameters()).device
    rows = (model(input_ids=torch.tensor([row], device=device)).logits[0] for row in ids)
    return [np.asarray(row.double().cpu().numpy(), np.float64) for row in rows]
