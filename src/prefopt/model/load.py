"""Models from folders or the Hub, adapters on them, and finished models back to folders."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from prefopt.core.hub import no_telemetry
from prefopt.core.model_folder import base_of, is_adapter, refuse_both, task_of, vet_folder
from prefopt.core.terminal import size
from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapter import add_adapter
from prefopt.model.checkpoint import Checkpoint, Origin, check_layers, scalar_head, set_origin, trace
from prefopt.model.memory import free_memory
from prefopt.model.packed_model import context_length
from prefopt.model.precision import silence_dropout
from prefopt.model.supported import (
    architectures_of,
    backend_errors,
    forget_packing,
    is_path,
    loading_options,
    model_errors,
    own_attention,
    quantisation_of,
    refuse_other_kinds,
)

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


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
AUTO_DTYPE = "PREFOPT_DTYPE"
"""The variable that says what ``--dtype auto`` takes: unlike machines that are to compute alike set it."""


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
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels and libraries that ask for the current device mean this one
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is what the variable ``PREFOPT_DTYPE`` names, else bfloat16 where the device multiplies it natively,
    else float32. Raises :class:`ConfigError` where the variable names another type."""
    if name == "auto":
        name = os.environ.get(AUTO_DTYPE) or "auto"
        if name not in (allowed := ("auto", "float32", "bfloat16", "float64")):
            raise ConfigError(f"{AUTO_DTYPE} is {name!r}; it must be one of {', '.join(allowed)}")
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    return DTYPES[name]


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
        vet_folder(path)
        return str(path)
    if is_path(name):
        raise ModelError(f"{name}: no such folder")  # here: less its ./ it would pass for a name on the Hub
    no_telemetry()
    from huggingface_hub import snapshot_download

    with model_errors(name):
        there = snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])
    vet_folder(there)
    return there


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
        found = local_folder(base)
    except ModelError as error:
        raise ModelError(
            f"{name} is an adapter on {base}, which cannot be found ({error}): give --model BASE --adapter {name}"
        ) from error
    if is_adapter(found):
        raise ModelError(
            f"{name} is an adapter on {base}, which is an adapter itself: fold that one into its model with prefopt"
            f" merge, and give --model MERGED --adapter {name}"
        )
    return found, source


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model folder or Hub name; an adapter's is that of its model."""
    name = base_and_adapter(name)[0] if is_adapter(name) else name
    vet_folder(name)
    refuse_both(name)
    with model_errors(name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    own_attention(config, name)
    return config


def context_of(name: str) -> int | None:
    """Positions of a model folder or Hub name, where it says so; a folder with a tokenizer alone says nothing."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and not is_adapter(folder):
        return None
    return context_length(load_config(str(folder) if folder.exists() else name))


def load_model(name: str, *, dtype: torch.dtype, device: torch.device, adapter: str | None = None) -> torch.nn.Module:
    """A causal language model, dropout off, with ``adapter`` (trainable) on it where one is named, or ``name`` is one.

    Raises :class:`ModelError` for a folder that is missing, incomplete, pickled, or needs code of its own.
    """
    if is_adapter(name):
        name, adapter = base_and_adapter(name, adapter)
    if adapter is not None and task_of(adapter) == "SEQ_CLS":
        raise ModelError(f"{adapter} is an adapter for a reward model, which writes no text: give it as --reward")
    config = load_config(name)
    refuse_other_kinds(name, config)
    loaded: torch.nn.Module = load_weights(AutoModelForCausalLM, name, config, dtype).to(device)
    return add_adapter(loaded, adapter) if adapter else loaded


def load_weights(
    kind: Any, name: str, config: PreTrainedConfig, dtype: torch.dtype, *, lacking: Collection[str] = ()
) -> PreTrainedModel:
    """The model that the auto class ``kind`` makes of folder ``name``, dropout off, every one of its weights there but
    for those in ``lacking``. It knows its :class:`Origin`: what else is in the folder.

    Raises :class:`ModelError` for a folder that is missing, incomplete, pickled, needs code of its own, has more layers
    than its configuration says, or holds a reward model where a language model is wanted.
    """
    own_config = copy.deepcopy(config)
    silence_dropout(config)
    source = local_folder(name)
    refuse_both(source)
    check_size(kind, source, config)
    extra: dict[str, Any] = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    extra |= loading_options(name, config)
    with model_errors(name), backend_errors(name, config), quiet():
        model, info = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and then refused, in one line
            **extra,
        )
    origin = trace(model, Checkpoint.read(source), own_config)
    forget_packing(model, own_config)
    if kind is AutoModelForCausalLM:
        _check_language_model(name, model, origin)
    if info["mismatched_keys"]:
        weight, there, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{name}: {weight} is {list(there)}, config.json wants {list(wanted)}; they do not belong together"
        )
    missing = sorted(set(info["missing_keys"]) - set(lacking))
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights are missing, the first is {missing[0]}; the folder is incomplete"
        )
    model.name_or_path = model.config.name_or_path = name
    check_layers(name, model, origin)
    set_origin(model, origin)
    return model


def _check_language_model(name: str, model: PreTrainedModel, origin: Origin) -> None:
    """Raises :class:`ModelError` for a reward model: a scalar head stands where that of a language model should."""
    head = scalar_head(name)
    if head is None:
        return
    told = architectures_of(load_config(name))
    outputs: Any = model.get_output_embeddings()
    own = {n for n, p in model.named_parameters(remove_duplicate=False) if outputs and p is outputs.weight}
    own -= {n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight}
    if any("Classification" in a for a in told) or not own & origin.covered:
        if head.beside_a_language_model and all(a.endswith(_LANGUAGE_MODELS) for a in told):
            return
        named = f"config.json names {', '.join(told)}" if told else "config.json names no class"
        raise ModelError(
            f"{name} holds the head of a reward model ({head.weight}; {named}): it is no language model; give the model"
            " that it was made from, or this one as --reward, or to prefopt reward"
        )


_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, of which a run has its own, and without its table of weights that a
    class has no place for, which :mod:`prefopt.model.checkpoint` puts into words."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_table)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_table)
        if shown:
            transformers_logging.enable_progress_bar()


def _is_no_table(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return "LOAD REPORT" not in said or "CONVERSION" in said  # the error that follows points to the latter


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])
