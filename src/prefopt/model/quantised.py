"""Quantised checkpoints, told from their configuration before a weight is read.

A quantised model can be sampled from and scored where the library that reads it is installed. Training moves
unquantised weights, so it wants the model that the checkpoint was quantised from. One kind is unquantised as it is
read, and is a model like any other from then on: MXFP4 (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from prefopt.errors import ModelError, first_line

UNQUANTISED = ("mxfp4",)
"""Methods whose weights prefopt has transformers unquantise, on every device."""

PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "fouroversix": "fouroversix",
    "fp_quant": "fp_quant",
    "gptq": "optimum gptqmodel",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "sinq": "sinq",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""What has to be installed beside transformers and accelerate to read a method's weights, as pip names it."""


def quantisation_of(config: Any) -> str | None:
    """How a model is quantised, in words: "bitsandbytes, 4 bits"; None where it is not."""
    fields = _fields(config)
    if fields is None:
        return None
    bits = _bits(fields)
    return _method(fields) + (f", {bits} bits" if bits else "")


def refuse_training(name: str, config: Any) -> None:
    """Raise :class:`ModelError` for a model whose weights are quantised where they should be trained."""
    how, fields = quantisation_of(config), _fields(config)
    if fields is not None and _method(fields) not in UNQUANTISED:
        raise ModelError(
            f"{name} is quantised ({how}); prefopt trains unquantised weights: give the model it was quantised from"
        )


def loading_options(name: str, config: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that a quantised model needs.

    Raises :class:`ModelError` for a method that transformers does not know: it would skip it, and read the packed
    weights as if they were none.
    """
    fields = _fields(config)
    if fields is None:
        return {}
    method = _method(fields)
    if method not in {m.removesuffix("_4bit").removesuffix("_8bit") for m in AUTO_QUANTIZER_MAPPING}:
        raise ModelError(
            f"{name} is quantised in a way that transformers does not know ({method}); give the model it was quantised"
            " from"
        )
    if method == "mxfp4":
        from transformers import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}


def forget_packing(model: Any, config: Any) -> None:
    """Let a model that was unquantised as it was read be saved under its own names: transformers, which undoes what it
    did to names, would write its weights under those of the packed ones, where nothing finds them."""
    fields = _fields(config)
    if fields is not None and _method(fields) in UNQUANTISED:
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(type(step).__name__.endswith("Dequantize") for step in getattr(conversion, "operations", ()))
        ]


@contextmanager
def backend_errors(name: str, config: Any) -> Iterator[None]:
    """What the library of a quantised model raises, or that it is missing, as a :class:`ModelError` of one line."""
    how = quantisation_of(config)
    if how is None:
        yield
        return
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        package = PACKAGES.get(how.split(",")[0])
        remedy = f"pip install {package}" if package else first_line(error)
        raise ModelError(
            f"{name} is quantised ({how}), and what reads it is not installed: {remedy}, or give the model it was"
            " quantised from"
        ) from error
    except Exception as error:  # every backend has errors of its own
        raise ModelError(
            f"{name} is quantised ({how}) and cannot be read here: {first_line(error)}; give the model it was"
            " quantised from"
        ) from error


def _fields(config: Any) -> dict[str, Any] | None:
    text = config.get_text_config()
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found or None
    told: dict[str, Any] = found.to_dict()
    return told


def _method(fields: dict[str, Any]) -> str:
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes"
    method = fields.get("quant_method")
    return str(getattr(method, "value", method) or "by a method that config.json does not name")


def _bits(fields: dict[str, Any]) -> int | None:
    if fields.get("load_in_4bit"):
        return 4
    if fields.get("load_in_8bit"):
        return 8
    bits = next((fields[name] for name in ("bits", "w_bit", "nbits", "weight_bits") if name in fields), None)
    return bits if isinstance(bits, int) else None
