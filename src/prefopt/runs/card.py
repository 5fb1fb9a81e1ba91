"""The finished model: a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from prefopt.core.files import output_errors
from prefopt.core.model_folder import task_of
from prefopt.model.adapter import nesting_of, write_nested
from prefopt.model.architectures import causal_model
from prefopt.model.load import quiet_loading
from prefopt.model.pictures import tower_names
from prefopt.model.save import apply_umask, save_weights, write_transformers4_fields
from prefopt.model.scorer import PackedModel
from prefopt.parallel.tensors import whole_tensors


class TrainedWeights(Protocol):
    """Weights to be written, by name."""

    masters: dict[str, torch.nn.Parameter]

    def saved(self) -> Iterable[tuple[str, torch.Tensor]]: ...


def save_model(
    folder: Path,
    scorer: PackedModel,
    masters: TrainedWeights,
    tokenizer: PreTrainedTokenizerBase,
    *,
    writes: bool = True,
) -> None:
    """Write weights, tokenizer, template and generation config. Trained weights are written in float32: in bfloat16 the
    changes of a short run would round away. Where weights are in shards all ranks call this, and one ``writes``."""
    model: Any = scorer.model
    causal = causal_model(model)
    weights = whole_tensors(masters.saved(), keep=writes)
    tied = _first_names(causal) if model is causal else {}
    state = model.state_dict() if model is causal else {}
    others = ((name, value) for name, value in state.items() if tied.get(name, name) not in masters.masters)
    rest = whole_tensors(others, keep=writes)  # those that do not train
    if not writes:
        return
    scorer.detach_hook()
    with output_errors(folder), quiet_loading():
        if model is causal:
            dtype = next(weight.dtype for weight in weights.values())
            found = {n: rest[n] if n in rest else weights[tied.get(n, n)] for n in (*state, *tied)}
            towers = tower_names(causal) if scorer.pictures else set()
            save_weights(folder, causal, found, dtype, towers & rest.keys())
        else:
            adapted = {**dict(model.state_dict()), **weights}
            # By default PEFT asks the Hub whether the base's embedding differs, and stores it beside an adapter on the
            # head.
            whole = getattr(model, "prefopt_saves_embedding", False)
            model.save_pretrained(folder, state_dict=adapted, safe_serialization=True, save_embedding_layers=whole)
            if task_of(folder) == "CAUSAL_LM" and (nesting := nesting_of(causal)) is not None:
                write_nested(folder, model, nesting)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        tokenizer.save_pretrained(folder)
        write_transformers4_fields(folder, tokenizer)
        apply_umask(folder)
    scorer.attach_hook()


def _first_names(model: torch.nn.Module) -> dict[str, str]:
    """Each parameter's name, shared ones under every name, to the first name of that parameter."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
