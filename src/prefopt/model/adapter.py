"""PEFT adapters: saved ones put on a model, and new ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prefopt.disk.adapter_folder import require_adapter
from prefopt.disk.vetted import ADAPTER_WEIGHTS, vet_folder
from prefopt.errors import ConfigError, ModelError, first_line
from prefopt.model.dropout import silence_dropout
from prefopt.model.grown_vocabulary import PREFIX, grow_for_adapter, holds_embedding
from prefopt.model.load_errors import model_errors
from prefopt.model.lora_targets import lora_targets
from prefopt.model.nested_adapter import as_of_text
from prefopt.model.scorer import causal_model


def add_adapter(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """Put a saved PEFT adapter on ``model``, trainable; the dropout it was trained with is off."""
    from peft import PeftModel

    require_adapter(folder)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ModelError(f"--adapter {folder} holds no adapter_model.safetensors; pickled weights are not opened")
    vet_folder(folder)
    with model_errors(folder), peft_warnings_off():
        plain = causal_model(model)
        with as_of_text(folder, plain) as named:
            grow_for_adapter(plain, named)
            whole = holds_embedding(plain, named)
            config = _with_plain_targets(plain, named)
            wrapped: Any = PeftModel.from_pretrained(plain, named, is_trainable=True, config=config)
        wrapped.prefopt_saves_embedding = whole
    silence_dropout(wrapped)
    trainable: torch.nn.Module = wrapped
    return trainable


def _with_plain_targets(model: torch.nn.Module, folder: str) -> Any:
    """The configuration of the adapter in ``folder``. Where it says by a pattern which modules of ``model`` it is on,
    the modules that its weights are for take the pattern's place: a stranger's could be matched without end.
    """
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(folder)
    target = getattr(config, "target_modules", None)
    by_pattern = isinstance(target, str) and target != "all-linear"
    if not by_pattern and not isinstance(getattr(config, "exclude_modules", None), str):
        return config
    modules, found = {name for name, _ in model.named_modules()}, set()
    with safe_open(Path(folder) / ADAPTER_WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name = key.removeprefix(PREFIX)
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found.add(name)
    whole = tuple(f".{name}" for name in config.modules_to_save or ())
    config.target_modules = sorted(name for name in found - {""} if not f".{name}".endswith(whole))
    config.exclude_modules = None
    return config


def new_lora(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: list[str] | None,
    task: str = "CAUSAL_LM",
) -> torch.nn.Module:
    """Wrap ``model`` in a fresh LoRA adapter (which changes nothing yet); all other weights are frozen.

    ``targets``: see :func:`lora_targets`. The random start comes from torch's generator. ``task`` is PEFT's name of it:
    under ``SEQ_CLS`` the scalar head is trained whole, and saved with the adapter.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    plain = causal_model(model)
    found = lora_targets(plain, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if found.parameters else dropout,
        target_modules=found.modules,
        target_parameters=found.parameters,
        fan_in_fan_out=transposed,
        task_type=task,
    )
    try:
        with peft_warnings_off():
            wrapped: Any = get_peft_model(plain, config)
    except ValueError as error:
        raise ConfigError(f"--lora-targets {' '.join(targets or [])}: {first_line(error)}") from error
    wrapped.prefopt_targets = found.words
    if found.parameters and dropout:
        _drop_inputs(wrapped, dropout)
        wrapped.prefopt_targets += "; no dropout on fused weights"
    adapted: torch.nn.Module = wrapped
    return adapted


def _drop_inputs(model: torch.nn.Module, rate: float) -> None:
    """Dropout on the layers that can have it, where PEFT refuses it for the sake of others: those on parameters."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if isinstance(layer, Linear):
            for name in list(layer.lora_dropout):
                layer.lora_dropout[name] = torch.nn.Dropout(rate)


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Hide what peft warns of and no user can change: a name that transformers has deprecated, and that in a
    mixture of experts the adapter of two fused matrices has the rank of one. That layers are merged already, and that a
    head is tied to an embedding with an adapter on it, or no longer, is seen to by :mod:`prefopt.model.merge`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", "All adapters are already merged")
        yield
