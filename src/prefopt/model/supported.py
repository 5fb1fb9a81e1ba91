"""Models that prefopt takes, and in one line why one cannot be loaded or trained.

A quantised model is sampled, scored, and trained under an adapter where its library is installed. MXFP4 (gpt-oss), FP8
and compressed-tensors are unquantised as they are loaded, and are models like any other from then on: transformers'
layers for them have no backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from prefopt.core.files import is_path, one_below
from prefopt.core.hub import why_not_read
from prefopt.core.model_folder import read_object
from prefopt.core.plugins import installed_version
from prefopt.errors import ModelError, UserError, first_line
from prefopt.model.architectures import architectures_of
from prefopt.model.costs import out_of_memory
from prefopt.model.pictures import FAMILIES

log = logging.getLogger(__name__)

# transformers takes any OWNER/NAME for a kernel on the Hub and downloads it, also in place of a flash attention that is
# not installed.
ATTENTION = {None, "eager", "sdpa", "flex_attention"}
UNQUANTISED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config", "compressed-tensors": "CompressedTensorsConfig"}
"""Methods whose weights are unquantised at loading, on every device, with transformers' class of their settings."""
ADAPTED = "aqlm awq bitsandbytes eetq gptq hqq torchao".split()
"""Methods on whose layers PEFT puts adapters."""
UNPACKED = ["bitsandbytes"]
"""Methods whose packed weights can be read back, so that an adapter can be merged into them."""
_SAME_NAME = "aqlm auto-round bitsandbytes compressed-tensors hqq torchao vptq"
PACKAGES = {name: name for name in _SAME_NAME.split()} | {
    "awq": "gptqmodel",
    "eetq": "kernels",
    "gptq": "optimum gptqmodel",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
}
"""Packages to install for common methods, beside transformers and accelerate."""


def refuse_untrainable(name: str, config: Any, *, adapter: bool = False, merged: bool = False) -> None:
    """Raise :class:`ModelError` for a model that cannot be trained, before data or weights are read. ``adapter``:
    weights of an adapter train, and its own are frozen; ``merged``: the adapter is to be merged into them."""
    if not any(a.endswith("ForSequenceClassification") for a in architectures_of(config)):  # of any architecture
        refuse_other_kinds(name, config)
    refuse_packed(name, config, adapter=adapter, merged=merged)


def stays_packed(config: Any) -> bool:
    """Whether a model is quantised, and not dequantised as it is loaded."""
    return _quantisation(config)[0] not in (None, *UNQUANTISED)


def refuse_packed(name: str, config: Any, *, adapter: bool, merged: bool = False) -> None:
    """Raise :class:`ModelError` for a quantised model that cannot be trained; see :func:`refuse_untrainable`."""
    method, _ = _quantisation(config)
    if not stays_packed(config) or (adapter and method in (UNPACKED if merged else ADAPTED)):
        return
    if adapter and method in ADAPTED:
        raise ModelError(
            f"{name} is quantised ({quantisation_of(config)}); a reward model is saved with its adapter merged, which"
            f" prefopt does into weights of {', '.join(UNPACKED)} alone: give the model it was quantised from"
        )
    what = "its weights cannot train: add --lora, or" if method in ADAPTED else "PEFT has no adapters for that;"
    raise ModelError(f"{name} is quantised ({quantisation_of(config)}); {what} give the model it was quantised from")


def language_class(config: Any, *, pictures: bool = False) -> Any:
    """The auto class of transformers that loads a model: with its vision tower where it takes ``pictures``, or where
    its language model is not loaded by itself and its family is one that is known."""
    causal: Any = AutoModelForCausalLM._model_mapping
    whole: Any = AutoModelForImageTextToText._model_mapping
    if type(config) in whole and (pictures or (type(config) not in causal and config.model_type in FAMILIES)):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def refuse_other_kinds(name: str, config: Any) -> None:
    """Raise :class:`ModelError` for encoders, encoder-decoders, and models that no auto class of language models loads,
    with or without pictures."""
    what = next(iter(architectures_of(config)), f"a model of type {config.model_type}")
    mapping: Any = AutoModelForCausalLM._model_mapping
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        problem = "an encoder"
    elif type(config) in mapping or language_class(config) is AutoModelForImageTextToText:
        return
    elif text is config:
        problem = "no causal language model of transformers (AutoModelForCausalLM does not know it)"
    else:
        remedy = "give a language model of text alone"
        if type(text) in mapping:
            remedy = f"give its language model by itself, saved as {mapping[type(text)].__name__}"
        raise ModelError(
            f"{name}: its class is {what}, made for more than text, and AutoModelForCausalLM does not load it; {remedy}"
        )
    raise ModelError(f"{name}: {what} is {problem}; prefopt trains causal language models")


def drop_foreign_attention(config: PreTrainedConfig, name: str) -> None:
    """Use the default attention where a configuration, or one inside it, names one that would be downloaded."""
    waiting: list[Any] = [config]
    while waiting:
        inner = waiting.pop()
        asked = getattr(inner, "_attn_implementation_internal", None)
        if not _is_built_in(asked):
            log.warning("%s: its configuration names attention %r, which is not built in: not used", name, asked)
            inner._attn_implementation_internal = None
        waiting += [value for value in vars(inner).values() if isinstance(value, PreTrainedConfig)]


def safe_attention(folder: str) -> dict[str, str]:
    """Arguments for a library that opens a folder by itself: eager attention where ``config.json`` names one that would
    be downloaded."""
    waiting: list[Any] = [read_object(Path(folder) / "config.json")]
    while waiting:
        match waiting.pop():
            case dict() as inner:
                if not all(_is_built_in(value) for key, value in inner.items() if "attn_implementation" in key):
                    return {"attn_implementation": "eager"}
                waiting += inner.values()
            case list() as inner:
                waiting += inner
    return {}


def _is_built_in(asked: object) -> bool:
    return asked is None or (isinstance(asked, str) and asked in ATTENTION)


def quantisation_of(config: Any) -> str | None:
    """How a model is quantised, such as "bitsandbytes, 4 bits"; None where it is not."""
    method, bits = _quantisation(config)[0], stored_bits(config)
    return f"{method}, {bits} bits" if bits else method


def stored_bits(config: Any) -> int | None:
    """Bits of a weight of a quantised model, where its configuration gives them."""
    _, fields = _quantisation(config)
    names = ("bits", "w_bit", "nbits", "weight_bits")
    bits = 4 if fields.get("load_in_4bit") else 8 if fields.get("load_in_8bit") else None
    bits = bits or next((fields[name] for name in names if name in fields), None)
    return bits if isinstance(bits, int) and bits > 0 else None


def loading_options(name: str, config: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a quantised model. Raises :class:`ModelError` for a method that transformers
    does not know: it would read the packed weights as plain."""
    method, fields = _quantisation(config)
    if method is None:
        return {}
    if method not in {m.removesuffix("_4bit").removesuffix("_8bit") for m in AUTO_QUANTIZER_MAPPING}:
        raise ModelError(
            f"{name} is quantised in a way that transformers does not know ({method}); give the model it was quantised"
            " from"
        )
    if method not in UNQUANTISED:
        return {"device_map": {"": device}}  # its libraries pack for the device that they are on
    same = {"modules_to_not_convert": fields["modules_to_not_convert"]} if "modules_to_not_convert" in fields else {}
    return {"quantization_config": getattr(transformers, UNQUANTISED[method])(dequantize=True, **same)}


def keep_unpacked_names(model: Any, config: Any) -> None:
    """Save a model that was unquantised at loading under its own names: transformers would write the packed ones."""
    if _quantisation(config)[0] in UNQUANTISED:
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(type(step).__name__.endswith("Dequantize") for step in getattr(conversion, "operations", ()))
        ]


def library_versions(method: str) -> list[str] | None:
    """Installed versions of the libraries that a quantised checkpoint's numbers come from; None where torch and
    transformers are all."""
    found = {name: installed_version(name) for name in PACKAGES.get(method, "").split()}
    return [f"{name} {version}" for name, version in found.items() if version] or None


@contextmanager
def backend_errors(name: str, config: Any) -> Iterator[None]:
    """Turn errors of a quantised model's library, or its absence, into a :class:`ModelError` of one line."""
    how = quantisation_of(config)
    try:
        yield
    except Exception as error:  # every backend has errors of its own
        if how is None or isinstance(error, UserError) or out_of_memory(error):
            raise
        why = f"and cannot be read here: {first_line(error)}; give"
        if isinstance(error, ImportError):
            package = PACKAGES.get(how.split(",")[0])
            remedy = f"pip install {package}" if package else first_line(error)
            why = f"and its library is not installed: {remedy}, or give"
        raise ModelError(f"{name} is quantised ({how}) {why} the model it was quantised from") from error


def _quantisation(config: Any) -> tuple[str | None, dict[str, Any]]:
    """The method of ``quantization_config`` and its fields; None and no fields without one."""
    text = config.get_text_config()
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None) or {}
    fields: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes", fields
    method = fields.get("quant_method")
    named = str(getattr(method, "value", method) or "by a method that config.json does not name")
    return (named, fields) if fields else (None, {})


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Turn errors of the loading libraries into one line with the model and the remedy."""
    try:
        yield
    except (UserError, Warning):  # warnings are errors while adapters are merged
        raise
    except Exception as error:  # any class: it depends on the folder
        raise ModelError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    text = str(error)
    folder = Path(name)
    if not folder.exists():
        why = "no such folder" if is_path(name) else why_not_read(error, name)
        return f"{name}: {why or f'the Hub did not give it ({first_line(error)})'}"
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        if below := one_below(folder):
            return f"{name} holds no model of its own{below}"
        return f"{name}: no config.json in this folder; it should hold a model saved by save_pretrained"
    if "size mismatch" in text:
        return f"{name}: its weights do not have the shapes of the model's: it belongs to another model"
    if isinstance(error, SafetensorError) or ("safetensors" in text and "deserial" in text):
        return f"{name}: the weight file is damaged ({first_line(error)}); copy it again"
    if not list(folder.glob("*.safetensors")):
        pickled = list(folder.glob("*.bin"))
        remedy = "convert its .bin files with save_pretrained" if pickled else "the weights are missing"
        return f"{name}: no .safetensors file in this folder; {remedy}"
    if out_of_memory(error):
        return f"{name}: does not fit into the memory; give --quantise nf4 or a smaller model"
    if isinstance(error, KeyError) and (key := _key_of(folder, error.args)):
        return f"{name}: config.json has {key} {error.args[0]!r}; transformers {transformers_version} does not know it"
    if isinstance(error, (OSError, ValueError, RuntimeError)) and text.strip():
        return f"{name}: {first_line(error)}"
    return f"{name}: cannot be loaded ({type(error).__name__}: {first_line(error)}); is config.json as it was saved?"


def _key_of(folder: Path, args: tuple[object, ...]) -> str:
    """The key of config.json with the value that a library did not know; empty where there is none."""
    waiting = [*read_object(folder / "config.json").items()] if args and isinstance(args[0], str) else []
    while waiting:
        key, value = waiting.pop()
        if value == args[0]:
            return key
        if isinstance(value, dict):
            waiting += value.items()
    return ""
