"""Frozen weights in 4 or 8 bits under an adapter: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

``nf4``: 4-bit NormalFloat, one scale for 64 weights, the scales in 8 bits themselves. ``int8``: one scale for each
output. Quantised are the linear layers that an adapter can be on; embeddings, heads, routers, norms and fused experts
stay as they are. A layer is a product with its dequantised weight in the dtype of the run, forward and backward,
whatever is computed beside it: activations are never rounded to 8 bits, so that a packed batch gives the values of its
sequences alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from prefopt.core.model_folder import NOT_QUANTISED, quantisation_on_record
from prefopt.core.plugins import installed_version
from prefopt.core.terminal import size
from prefopt.errors import ConfigError, ModelError
from prefopt.model.architectures import causal_model, weights_in
from prefopt.model.lora_targets import KINDS, weight_matrices
from prefopt.model.supported import quantisation_of

BACKEND, OLDEST, EXTRA = "bitsandbytes", "0.50.2", "pip install --upgrade bitsandbytes"
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""Arguments of transformers' ``BitsAndBytesConfig`` by the value of ``--quantise``."""
INT8_STEPS = 127
GRADIENT_TOLERANCE = 0.02
"""Relative error in :func:`check_packed`: bfloat16 rounds to 0.004, and where there is no gradient it is 1."""


def chosen(quantise: str | None, adapter: str | None) -> str | None:
    """How the model under ``adapter`` is quantised: as ``quantise`` says, else as the adapter was trained."""
    if quantise is None and adapter is not None:
        quantise = quantisation_on_record(adapter)
    return None if quantise == NOT_QUANTISED else quantise


def identity_fields(quantise: str | None) -> list[Any] | None:
    """What the values of a model quantised at loading depend on, beside its weights; None where it is not."""
    return None if quantise is None else [quantise, SETTINGS[quantise], f"{BACKEND} {installed_version(BACKEND)}"]


def check_quantisable(quantise: str | None, config: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises :class:`ConfigError` where a model cannot be quantised at loading, before anything slow."""
    if quantise in (None, NOT_QUANTISED):
        return
    if (found := quantisation_of(config)) is not None:
        raise ConfigError(f"--quantise {quantise}: {name} is quantised already ({found}); leave --quantise out")
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--quantise {quantise}: {BACKEND} has no {device.type}; take --device cuda or cpu")
    if dtype == torch.float64:
        raise ConfigError(f"--quantise {quantise} computes in float32 or bfloat16: leave --dtype float64 out")
    installed = installed_version(BACKEND)
    if installed is None or Version(installed) < Version(OLDEST):
        found = (
            "is not installed" if installed is None else f"is installed as {installed}, and must be {OLDEST} or newer"
        )
        raise ConfigError(f"--quantise {quantise}: {BACKEND} {found}: {EXTRA}; --quantise none does without")


def quantised_loading(
    quantise: str, kind: Any, name: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise each weight of the auto class ``kind`` as it is read. Raises
    :class:`ConfigError` as :func:`check_quantisable`, :class:`ModelError` for a model without linear layers."""
    from transformers import BitsAndBytesConfig

    check_quantisable(quantise, config, name, device, dtype)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty = kind.from_config(copy.deepcopy(config), trust_remote_code=False)
    taken = {m.module for m in weight_matrices(empty) if m.kind in KINDS and m.kind != "router" and _is_plain(m)}
    linear = {n for n, module in empty.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    if not taken & linear:
        raise ModelError(f"--quantise {quantise}: {name} has no linear layer to quantise; leave --quantise out")
    extra = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in SETTINGS[quantise] else {}
    asked = BitsAndBytesConfig(llm_int8_skip_modules=sorted(linear - taken), **SETTINGS[quantise], **extra)
    return {"quantization_config": asked, "device_map": {"": device}}


def _is_plain(matrix: Any) -> bool:
    """Whether a matrix is read by calling its layer: other code would read packed numbers."""
    return bool(matrix.reachable and not matrix.fused)


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make layers of bitsandbytes products with their dequantised weights in ``dtype``, also where a checkpoint names
    another dtype.

    Its 8-bit layers would round activations too, and take columns out by what else is in the batch. Its 4-bit layers
    repack themselves on some processors at the first pass without gradients, for a kernel that has no backward pass.
    """
    for layer in _layers(model):
        if _bits(layer) == 4:
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.support_avx512bf16_for_cpu = False
        else:
            layer.__class__ = _weight_only(type(layer))


_WEIGHT_ONLY: dict[type, type] = {}


def _weight_only(kind: type) -> type:
    """A class of 8-bit layers that do not round activations."""

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Int8Product.apply(x, layer.weight.data, _scale_O(layer))  # type: ignore[no-untyped-call]
        return product if layer.bias is None else product + layer.bias.to(x.dtype)

    if kind in _WEIGHT_ONLY.values():
        return kind
    return _WEIGHT_ONLY.setdefault(kind, type("WeightOnlyInt8", (kind,), {"forward": forward}))


class _Int8Product(torch.autograd.Function):
    """x [..., I] times whole numbers [O, I], the outputs scaled in float32. What autograd keeps is the 8-bit weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, scale_O)
        return (torch.nn.functional.linear(x, weight_OI.to(x.dtype)) * scale_O).to(x.dtype)  # 127 is exact in bfloat16

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight_OI, scale_O = ctx.saved_tensors
        grad = grads[0]
        return (grad * scale_O).to(grad.dtype) @ weight_OI.to(grad.dtype), None, None


def _scale_O(layer: Any) -> torch.Tensor:
    scale: torch.Tensor = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return scale.float() / INT8_STEPS


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    """The layers of bitsandbytes; its import takes seconds, and a model that has some has imported it."""
    if (bnb := sys.modules.get(BACKEND)) is not None:
        kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
        yield from (module for module in model.modules() if isinstance(module, kinds))


def _bits(layer: Any) -> int:
    return 4 if hasattr(layer.weight, "quant_state") else 8


@torch.no_grad()
def dequantised(layer: Any) -> torch.Tensor:
    """The weight [O, I] that a layer of bitsandbytes multiplies with, in float32."""
    if _bits(layer) == 8:
        wide: torch.Tensor = layer.weight.data.float() * _scale_O(layer)[:, None]
        return wide
    from bitsandbytes.functional import dequantize_4bit

    found: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found.float()


def dequantise(model: Any, dtype: torch.dtype) -> None:
    """Replace the quantised layers of a transformers model, in place, by layers with the same weights in ``dtype``."""
    packed = list(_layers(model))
    for name, layer in [(n, m) for n, m in model.named_modules() if any(m is x for x in packed)]:
        weight = dequantised(layer)
        with torch.device("meta"):
            if getattr(layer, "source_cls", None) is Conv1D:  # GPT-2 stores [I, O]
                plain: Any = Conv1D(*weight.shape)  # type: ignore[misc]
                weight = weight.T
            else:
                plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        plain.weight = torch.nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
        model.set_submodule(name, plain)
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for mark in _MARKS:
        vars(model).pop(mark, None)


_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""What transformers and PEFT know a model with quantised layers by."""


def copy_marks(source: Any, model: Any) -> None:
    """Mark ``model`` as one with the quantised layers of ``source``."""
    vars(model).update({mark: vars(source)[mark] for mark in _MARKS if mark in vars(source)})


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether some of the model's weights are packed."""
    return any(map(is_packed, model.modules()))


def is_packed(layer: torch.nn.Module) -> bool:
    """Whether a layer holds packed weights or scales of them, which no cast may touch: of other types than those that
    models compute in, or marked by bitsandbytes, whose 4 bits may be stored as any type."""
    own = layer.parameters(recurse=False)
    return any(hasattr(p, "quant_state") or p.dtype not in _PLAIN for p in own) or hasattr(layer, "qweight")


_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
"""Types of what is no packed weight; indices of tokens and experts may be parameters too."""


def check_packed(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raise :class:`ModelError` where a packed layer has another backward pass than its forward pass, or none, as
    kernels for inference: <J v, J v> = <J^T J v, v>. A layer of each class is tried, after a pass without gradients."""
    tried: set[type] = set()
    random = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if not is_packed(layer) or type(layer) in tried or not hasattr(layer, "in_features"):
            continue
        tried.add(type(layer))
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
        x_TI, step_TI = torch.randn(2, 4, layer.in_features, generator=random).to(device, dtype)
        with torch.no_grad():
            moved_TO = (layer(step_TI) - layer(torch.zeros_like(step_TI))).double()
        x_TI = x_TI.clone().requires_grad_()
        found = layer(x_TI)
        up_TO = moved_TO.to(dtype)  # along it, no part of a gradient can hide
        grad_TI = torch.autograd.grad(found, x_TI, up_TO)[0] if found.requires_grad else torch.zeros_like(x_TI)
        square = float(moved_TO.square().sum())
        if not abs(float((grad_TI.double() * step_TI.double()).sum()) - square) <= GRADIENT_TOLERANCE * square:
            raise ModelError(
                f"{name} ({type(layer).__name__}): the gradient through its packed weights is wrong or missing,"
                " so layers before it cannot train; give the model it was quantised from"
            )


def quantised_words(model: torch.nn.Module) -> str | None:
    """How the model is quantised, with bytes; None where it is not."""
    causal: Any = causal_model(model)
    packed = [module for module in causal.modules() if is_packed(module)]
    if not packed:
        return None
    weights = {id(p): weights_in(p) for module in packed for p in module.parameters(recurse=False) if p.ndim > 1}
    whole = sum(weights_in(p) for p in causal.parameters() if not p.requires_grad)
    how = quantisation_of(causal.config) or "packed weights"
    held = sum(bytes_held(module) for module in packed)
    share = f"{sum(weights.values()):,} of {whole:,} weights in {size(held)}" if weights else f"layers of {size(held)}"
    return f"quantised ({how}): {share}, the others in {str(causal.dtype).removeprefix('torch.')}"


def bytes_held(layer: torch.nn.Module) -> int:
    """Bytes of a layer's weights and of their scales."""
    held = {name: value for name, value in layer.state_dict().items() if isinstance(value, torch.Tensor)}
    return sum(value.numel() * value.element_size() for value in held.values())
