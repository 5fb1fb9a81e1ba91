"""Loading: models from folders or the Hub with adapters on them, and new models and tokenizers."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from prefopt.core.files import expanded, is_path
from prefopt.core.hub import import_bitsandbytes, no_telemetry
from prefopt.core.model_folder import base_of, is_adapter, refuse_both, task_of, vet_folder
from prefopt.core.terminal import size
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapter import add_adapter
from prefopt.model.architectures import architectures_of, context_length
from prefopt.model.checkpoint import ModelOrigin, WeightFiles, check_layers, scalar_head, set_origin, trace_origin
from prefopt.model.costs import free_memory
from prefopt.model.placeholders import FromFirst, load_placeholders, must_be_whole, on_meta
from prefopt.model.precision import disable_dropout, kept_in_float32, steady_routers
from prefopt.model.quantised import chosen, quantised_loading, set_compute_dtype
from prefopt.model.supported import (
    backend_errors,
    drop_foreign_attention,
    keep_unpacked_names,
    language_class,
    loading_options,
    model_errors,
    quantisation_of,
    refuse_other_kinds,
    stored_bits,
)

END, PAD = "<|endoftext|>", "<|pad|>"
TURNS = ("<|im_start|>", "<|im_end|>")
"""Special tokens of new tokenizers for a ChatML template that fine-tuning may add."""
SLACK, SMALL = 4, 10_000_000
"""A configuration may describe this multiple of the parameters that its weights hold, and this many more."""
_STRICTLY = {
    "use_safetensors": True,
    "trust_remote_code": False,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # and then refused, in one line
}
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def local_folder(name: str) -> str:
    """The folder of a model or adapter: ``name`` itself, or the local copy of a repository of the Hub."""
    path = expanded(name)
    if path.exists():
        vet_folder(path)
        return str(path)
    if is_path(name):
        raise ModelError(f"{name}: no such folder")  # here: without its ./ it could be a name on the Hub
    no_telemetry()
    from huggingface_hub import snapshot_download

    with model_errors(name):
        folder = snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])
    vet_folder(folder)
    return folder


def base_and_adapter(name: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Folders of a model and of the adapter on it: ``adapter``, or ``name`` where that is an adapter itself. Raises
    :class:`ConfigError` where both are, :class:`ModelError` where an adapter's model cannot be found."""
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
            f"{name} is an adapter on {base}, which is an adapter itself: merge that one into its model with prefopt"
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
    drop_foreign_attention(config, name)
    return config


def context_of(name: str) -> int | None:
    """Positions of a model folder or Hub name, where it gives them; None for a folder with a tokenizer alone."""
    folder = expanded(name)
    bare = folder.is_dir() and not (folder / "config.json").is_file() and not is_adapter(folder)
    return None if bare else context_length(load_config(str(folder) if folder.exists() else name))


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapter: str | None = None,
    quantise: str | None = None,
    from_first: FromFirst | None = None,
    pictures: bool = False,
) -> torch.nn.Module:
    """A causal language model, dropout off, with ``adapter`` (trainable) on it where one is named, or ``name`` is one;
    with its vision tower where it is to take ``pictures``.

    ``quantise``: see :func:`prefopt.model.quantised.chosen`. ``from_first``: see :func:`load_weights`; the model is
    then on the CPU. Raises :class:`ModelError` for a folder that is missing, incomplete, pickled, or needs code of its
    own, :class:`ConfigError` where it cannot be quantised.
    """
    if is_adapter(name):
        name, adapter = base_and_adapter(name, adapter)
    if adapter is not None and task_of(adapter) == "SEQ_CLS":
        raise ModelError(f"{adapter} is an adapter for a reward model, which writes no text: give it as --reward")
    config = load_config(name)
    refuse_other_kinds(name, config)
    quantise = chosen(quantise, adapter)
    kind = language_class(config, pictures=pictures)
    loaded = load_weights(kind, name, config, dtype, device, quantise=quantise, from_first=from_first)
    return add_adapter(loaded, adapter) if adapter else loaded


def load_weights(
    kind: Any,
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    lacking: Collection[str] = (),
    quantise: str | None = None,
    from_first: FromFirst | None = None,
) -> PreTrainedModel:
    """The model that the auto class ``kind`` makes of folder ``name``, dropout off, with its :class:`ModelOrigin` and
    all weights but ``lacking``, on ``device``. ``quantise``: each weight is packed as it is read. Raises
    :class:`ModelError` for a folder that is missing, incomplete, pickled, needs its own code, has more layers than its
    configuration, or holds a reward model in place of a language model.

    ``from_first``: weights are placeholders on the CPU, to be read later (:mod:`prefopt.model.placeholders`); those
    that cannot be read slice by slice are loaded by the first of several processes, through this function.
    """
    source = local_folder(name)
    refuse_both(source)
    check_size(kind, source, config)
    if from_first is not None and (quantisation_of(config) or must_be_whole(kind, source, config)):
        return from_first(
            lambda: load_weights(kind, name, config, dtype, torch.device("cpu"), lacking=lacking),
            lambda: _sizes(kind, source, config, dtype),
        )
    own_config = copy.deepcopy(config)
    disable_dropout(config)
    if quantise is not None or quantisation_of(config):
        import_bitsandbytes()
    with model_errors(name), backend_errors(name, config), quiet_loading():
        if quantise is None:
            options = loading_options(name, config, device)
        else:
            options = quantised_loading(quantise, kind, name, config, device, dtype)
        if dtype == torch.float64:
            options["experts_implementation"] = "eager"
        if from_first is None and device.type == "cuda":
            options.setdefault("device_map", {"": device})  # tensor by tensor, not a whole model on the host first
        read = kind.from_pretrained if from_first is None else partial(load_placeholders, kind)
        model, info = read(source, config=config, dtype=dtype, **_STRICTLY, **options)
    steady_routers(model)
    origin = trace_origin(model, WeightFiles.read(source), own_config)
    keep_unpacked_names(model, own_config)
    if kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        _check_language_model(name, model, origin)
    if info["mismatched_keys"]:
        weight, found, expected = min(info["mismatched_keys"])
        raise ModelError(f"{name}: {weight} is {list(found)}, config.json wants {list(expected)}")
    if missing := sorted(set(info["missing_keys"]) - set(lacking)):
        raise ModelError(f"{name}: incomplete: {len(missing)} weights are missing, the first is {missing[0]}")
    model.name_or_path = model.config.name_or_path = name
    check_layers(name, model, origin)
    set_origin(model, origin)
    set_compute_dtype(model, dtype)
    return model.to(device) if from_first is None else model


def check_size(kind: Any, folder: str, config: PreTrainedConfig) -> None:
    """Raises :class:`ModelError` where a folder's configuration describes far more parameters than its weights hold."""
    try:
        tensors = WeightFiles.read(folder).tensors  # other files do not count: they may say anything
    except ModelError:  # loading says why
        return
    held = sum(math.prod(stored.shape) for stored in tensors.values())
    if quantisation_of(config):  # whole numbers of any width, in which weights are packed
        packed = [t for t in tensors.values() if t.dtype.startswith(("U", "I"))]
        held += sum(8 * t.nbytes // (stored_bits(config) or 1) - math.prod(t.shape) for t in packed)
    described = _parameters(kind, folder, config)
    if described > SLACK * held + SMALL:
        raise ModelError(
            f"{folder}: config.json wants {described:,} parameters, the weights hold {held:,}; they do not belong"
            " together"
        )


def _parameters(kind: Any, name: str, config: PreTrainedConfig) -> int:
    """Parameters of the model that the auto class ``kind`` makes of a configuration, without memory for them."""
    return sum(p.numel() for p in on_meta(kind, name, config).parameters())


def _sizes(kind: Any, name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, its weights in the dtypes that they are loaded in."""
    made = on_meta(kind, name, config)
    kept = kept_in_float32(made)
    for weight, parameter in made.named_parameters():
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if kept(weight) else dtype)
    return made


def _check_language_model(name: str, model: PreTrainedModel, origin: ModelOrigin) -> None:
    """Raises :class:`ModelError` for a reward model: its scalar head is in the place of a language model's head."""
    if (head := scalar_head(name)) is None:
        return
    classes = architectures_of(load_config(name))
    if head.weight.startswith("v_head.") and all(a.endswith(_LANGUAGE_MODELS) for a in classes):
        return  # a value head, beside that of the language model
    outputs: Any = model.get_output_embeddings()
    own = {n for n, p in model.named_parameters(remove_duplicate=False) if outputs and p is outputs.weight}
    own -= {n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight}
    if any("Classification" in a for a in classes) or not own & origin.covered:
        raise ModelError(
            f"{name} holds the head of a reward model ({head.weight}; config.json names"
            f" {', '.join(classes) or 'no class'}): so it is not a language model; give the model that it was"
            " made from, or"
            " this one as --reward, or to prefopt reward"
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars and its warning of settings that we give, and without its table of unused
    weights, which :mod:`prefopt.model.checkpoint` describes."""

    def is_no_table(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message or "CONVERSION" in message  # an error that follows points to the latter

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_table)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # to unquantise what is read
            yield
    finally:
        logger.removeFilter(is_no_table)
        if shown:
            transformers_logging.enable_progress_bar()


def new_model(folder: str, tokenizer: Tokenizer, *, seed: int, fitted: bool) -> torch.nn.Module:
    """The causal language model of a folder's ``config.json``, initialised from ``seed``, in float32. ``fitted``: with
    the vocabulary and special tokens of ``tokenizer``. Raises :class:`ModelError` where it does not fit into memory."""
    config: Any = load_config(folder)
    disable_dropout(config)
    if fitted:
        config.vocab_size = len(tokenizer)
        for kind in ("bos", "eos", "pad"):
            setattr(config, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
    needed, free = 4 * _parameters(AutoModelForCausalLM, folder, config), free_memory(torch.device("cpu"))
    if needed > free:
        raise ModelError(f"{folder}: config.json describes a model of {size(needed)}, and {size(free)} are free")
    with torch.random.fork_rng(devices=[]), model_errors(folder):
        torch.manual_seed(seed)
        made: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made.eval()


def new_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE (as GPT-2's) of ``size`` tokens, from ``texts``; the same texts give the same tokenizer. It ends
    texts with ``<|endoftext|>``. Raises :class:`ModelError` where the text is too short for so many tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = [AddedToken(text, normalized=False, special=True) for text in (END, PAD, *TURNS)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    if raw.get_vocab_size() < size:
        raise ModelError(
            f"--train-tokenizer {size}: the text makes only {raw.get_vocab_size()} tokens; give no more, or more text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=PAD)
