"""Models from folders or the Hub, adapters on them, and finished models back to folders."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from prefopt.disk.hub import no_telemetry, why_not_read
from prefopt.errors import ConfigError, ModelError
from prefopt.model.scorer import causal_model
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
    if _is_path(name):
        raise ModelError(f"{name}: no such folder")  # here: less its ./ it would pass for a name on the Hub
    no_telemetry()
    from huggingface_hub import snapshot_download

    with model_errors(name):
        return snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model folder or Hub name."""
    with model_errors(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def context_of(name: str) -> int | None:
    """Positions of a model folder or Hub name, where it says so; a folder with a tokenizer alone says nothing."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return None
    return context_length(load_config(name))


def load_model(name: str, *, dtype: torch.dtype, device: torch.device, adapter: str | None = None) -> torch.nn.Module:
    """A causal language model, dropout off, with ``adapter`` (trainable) on it where one is named.

    Raises :class:`ModelError` for a folder that is missing, incomplete, pickled, or needs code of its own.
    """
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


_DROPS = re.compile(r"drop(out|_rate)?$|_pdrop$|dropout|layerdrop|jitter_noise")


def silence_dropout(target: PreTrainedConfig | torch.nn.Module) -> None:
    """Set every dropout and jitter of a configuration to zero: log-probabilities must not be random.

    Of a model too, which was built with others: its configuration, its dropout modules, and the rates that its layers
    have taken from the configuration.
    """
    if isinstance(target, torch.nn.Module):
        for module in target.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            _zero_rates(module)
    config: Any = causal_model(target).config if isinstance(target, torch.nn.Module) else target
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        _zero_rates(part)


def _zero_rates(holder: object) -> None:
    for field, value in list(vars(holder).items()):
        if _DROPS.search(field) and isinstance(value, float):
            setattr(holder, field, 0.0)


def add_adapter(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """Put a saved PEFT adapter on ``model``, trainable; the dropout it was trained with is off."""
    from peft import PeftModel

    if not (Path(folder) / "adapter_config.json").is_file() and Path(folder).exists():
        raise ModelError(f"--adapter {folder} holds no adapter_config.json: it is not a PEFT adapter")
    if Path(folder).is_dir() and not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ModelError(f"--adapter {folder} holds no adapter_model.safetensors; pickled weights are not opened")
    with model_errors(folder), peft_warnings_off():
        wrapped: torch.nn.Module = PeftModel.from_pretrained(causal_model(model), folder, is_trainable=True)
    silence_dropout(wrapped)
    return wrapped


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

    The random start comes from torch's generator. ``task`` is PEFT's name of it: under ``SEQ_CLS`` the scalar head is
    trained whole, and saved with the adapter.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or "all-linear",
        fan_in_fan_out=transposed,
        task_type=task,
    )
    try:
        with peft_warnings_off():
            wrapped: torch.nn.Module = get_peft_model(causal_model(model), config)
        return wrapped
    except ValueError as error:
        raise ConfigError(f"--lora-targets {' '.join(targets or [])}: {_first_line(error)}") from error


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Hide what peft warns of and no user can change: a name that transformers has deprecated, and that in a
    mixture of experts the adapter of two fused matrices has the rank of one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


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


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """What the loading libraries raise, in one line that names the model and the remedy."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    text = str(error)
    folder = Path(name)
    if not folder.exists():
        if _is_path(name):
            return f"{name}: no such folder"
        return f"{name}: {why_not_read(error, name) or f'the Hub did not give it ({_first_line(error)})'}"
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return f"{name}: no config.json in this folder; it should hold a model saved by save_pretrained"
    if "size mismatch" in text:
        return f"{name}: its weights have other shapes than those of the model: it belongs to another one"
    if isinstance(error, SafetensorError) or ("safetensors" in text and "deserial" in text):
        return f"{name}: the weight file is damaged ({_first_line(error)}); copy it again"
    if not list(folder.glob("*.safetensors")):
        pickled = list(folder.glob("*.bin"))
        remedy = "convert its .bin files with save_pretrained" if pickled else "the weights are missing"
        return f"{name}: no .safetensors file in this folder; {remedy}"
    return f"{name}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])
