"""Models from folders or the Hub, adapters on them, and finished models back to folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from prefopt.disk.adapter_folder import base_of, is_adapter, task_of
from prefopt.disk.hub import no_telemetry
from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapter import add_adapter
from prefopt.model.dropout import silence_dropout
from prefopt.model.load_errors import is_path, model_errors
from prefopt.model.sharing import context_length

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def resolve_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises :class:`ConfigError` where it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such kind of device; try cpu, cuda, cuda:1 or mps") from error
    there = {"cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps, "cpu": True}
    if not there.get(device.type, False):
        raise ConfigError(f"--device {name}: this machine has no such device; leave --device out to use what it has")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run on the device's own instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported()) if torch.backends.mkldnn.is_available() else False
    return False


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """What to tell a person who asked for a precision that the device has to emulate, in one line."""
    if dtype != torch.bfloat16 or native_bfloat16(device):
        return None
    return "bfloat16: this device emulates it, many times slower than float32; leave --dtype out to use float32"


def local_folder(name: str) -> str:
    """The folder of a model or adapter: ``name`` itself, or where the Hub's files were put on this machine."""
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if is_path(name):
        raise ModelError(f"{name}: no such folder")  # here: less its ./ it would pass for a name on the Hub
    no_telemetry()
    from huggingface_hub import snapshot_download

    with model_errors(name):
        return snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])


def base_and_adapter(name: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Folders of a model and of the adapter on it, where there is one: ``adapter``, or ``name`` is an adapter itself.

    Raises :class:`ConfigError` where both are, :class:`ModelError` where an adapter's model cannot be found.
    """
    source = local_folder(name)
    if not is_adapter(source):
        return source, local_folder(adapter) if adapter else None
    base = base_of(source)
    if adapter is not None:
        raise ConfigError(f"{name} is an adapter itself: leave {adapter} out, or name the model of both, {base}")
    try:
        return local_folder(base), source
    except ModelError as error:
        raise ModelError(
            f"{name} is an adapter on {base}, which cannot be found ({error}): give --model BASE --adapter {name}"
        ) from error


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model folder or Hub name; an adapter's is that of its model."""
    name = base_and_adapter(name)[0] if is_adapter(name) else name
    with model_errors(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def context_of(name: str) -> int | None:
    """Positions of a model folder or Hub name, where it says so; a folder with a tokenizer alone says nothing."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file() and not is_adapter(name):
        return None
    return context_length(load_config(name))


def load_model(name: str, *, dtype: torch.dtype, device: torch.device, adapter: str | None = None) -> torch.nn.Module:
    """A causal language model, dropout off, with ``adapter`` (trainable) on it where one is named, or ``name`` is one.

    Raises :class:`ModelError` for a folder that is missing, incomplete, pickled, or needs code of its own.
    """
    if is_adapter(name):
        name, adapter = base_and_adapter(name, adapter)
    if adapter is not None and task_of(adapter) == "SEQ_CLS":
        raise ModelError(f"{adapter} is an adapter for a reward model, which writes no text: give it as --reward")
    loaded: torch.nn.Module = load_weights(AutoModelForCausalLM, name, load_config(name), dtype).to(device)
    return add_adapter(loaded, adapter) if adapter else loaded


def load_weights(kind: Any, name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that the auto class ``kind`` makes of folder ``name``, dropout off, every one of its weights there.

    Raises :class:`ModelError` for a folder that is missing, incomplete, pickled, or needs code of its own.
    """
    silence_dropout(config)
    extra: dict[str, Any] = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    with model_errors(name), quiet():
        model, info = kind.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and then refused, in one line
            **extra,
        )
    if info["mismatched_keys"]:
        weight, there, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{name}: {weight} is {list(there)}, config.json wants {list(wanted)}; they do not belong together"
        )
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ModelError(
            f"{name}: {len(lacking)} weights are missing, the first is {lacking[0]}; the folder is incomplete"
        )
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars: a run has its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])
