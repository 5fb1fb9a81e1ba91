"""Devices, data types, and mixed precision with float32 master weights.

A bfloat16 run computes with bfloat16 copies of the weights. The optimiser updates their float32 masters: steps of 1e-6
are far below the distance between two bfloat16 numbers and would vanish. Gradients of a micro-batch arrive in bfloat16
and are accumulated in float32.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.errors import ConfigError
from prefopt.model.architectures import causal_model
from prefopt.model.offload import HostGradients
from prefopt.model.placeholders import cast_to
from prefopt.model.quantised import is_packed

DTYPES: dict[str, torch.dtype] = {n: getattr(torch, n) for n in ("float32", "bfloat16", "float16", "float64")}
AUTO_DTYPE = "PREFOPT_DTYPE"
"""The variable that sets ``--dtype auto``, for different machines that should compute alike."""
_DROPOUT = re.compile(r"drop(out|_rate)?$|_pdrop$|dropout|layerdrop|jitter_(noise|eps)")


def resolve_device(name: str | None) -> torch.device:
    """The device named, or the best available. Raises :class:`ConfigError` where this machine has no such device."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such kind of device; try cpu, cuda, cuda:1 or mps") from error
    available = {"cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps, "cpu": True}
    if not available.get(device.type, False):
        raise ConfigError(f"--device {name}: this machine has no such device; leave --device out to use what it has")
    return made_current(device)


def made_current(device: torch.device) -> torch.device:
    """``device``, which kernels and libraries that ask for the current GPU get from now on."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is the value of ``PREFOPT_DTYPE``, else bfloat16 where the device multiplies it natively, else float32.
    Raises :class:`ConfigError` for another value of the variable."""
    if name == "auto":
        name = os.environ.get(AUTO_DTYPE) or "auto"
        if name not in (allowed := ("auto", "float32", "bfloat16", "float64")):
            raise ConfigError(f"{AUTO_DTYPE} is {name!r}; it must be one of {', '.join(allowed)}")
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    return DTYPES[name]


def scoring_dtype(name: str) -> str:
    """The ``--dtype`` to compute log-ratios and perplexities in that models are compared by: float32 unless another is
    named, since in bfloat16 rounding is as large as the differences between a model and what was trained from it."""
    return "float32" if name == "auto" and not os.environ.get(AUTO_DTYPE) else name


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    mkldnn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return mkldnn and bool(torch.cpu._is_avx512_bf16_supported())


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """A warning in one line where the device has to emulate the precision."""
    slow = "bfloat16: this device emulates it, many times slower than float32; leave --dtype out to use float32"
    return slow if dtype == torch.bfloat16 and not native_bfloat16(device) else None


class MasterWeights:
    """Trainable weights by name: the optimiser updates ``masters``, ``publish`` rounds them into the model."""

    host: HostGradients | None = None
    """Where masters are on the host: what adds up their gradients there."""

    def __init__(
        self,
        model: torch.nn.Module,
        compute: torch.dtype,
        *,
        on_host: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Cast ``model`` to ``compute`` in place and give its trainable weights float32 masters (float64 stays).

        ``on_host``: masters and their gradients are in host memory, apart from the weights that are computed with,
        which leaves room on a GPU for these alone. ``device``: where the model moves to, from the host.
        """
        self.model = model
        self.host = HostGradients() if on_host else None
        self.masters: dict[str, torch.nn.Parameter] = {}
        self._copies: dict[str, torch.nn.Parameter] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, parameter, target in _cast_frozen(model, compute):
            wide = cast_to(parameter.data, torch.promote_types(target, torch.float32))
            if target == wide.dtype and self.host is None:
                parameter.data = wide
                self.masters[name] = parameter
                continue
            parameter.data = cast_to(wide, target) if device is None else wide.to(device, target)
            if self.host is not None and not wide.is_meta:
                wide = wide.to("cpu", copy=True)
            self.masters[name] = torch.nn.Parameter(wide)
            self._copies[name] = parameter
            add = _collect if self.host is None else self.host.add
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(add, self.masters[name])))
        if device is not None:
            model.to(device)  # buffers, and weights that do not train

    def release(self) -> None:
        """Remove the hooks: gradients stay on the model's own weights again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.host is not None:
            self.host.close()

    def settle(self) -> None:
        """Wait until all gradients are on the masters; only on the host they are late."""
        if self.host is not None:
            self.host.settle()

    def reshard(self) -> None:
        """Nothing to do where every process has whole weights."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.settle()
        for parameter in (*self.masters.values(), *self._copies.values()):
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights the model computes with."""
        for name, rounded in self._copies.items():
            rounded.copy_(self.masters[name])

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set the masters, and the model's weights from them."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.publish()

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The masters by parameter name, for checkpoints and for the finished model."""
        for name, master in self.masters.items():
            yield name, master.detach()


def bytes_in_float32(weights: MasterWeights) -> int:
    """Bytes that :func:`in_float32` allocates on the model's device: copies of frozen weights and of buffers, and of
    masters that are elsewhere."""
    narrow, found = (torch.bfloat16, torch.float16), 0
    for name, parameter in weights.model.named_parameters():
        master = weights.masters.get(name)
        if parameter.dtype in narrow and (master is None or master.device != parameter.device):
            found += 4 * parameter.numel()
    return found + sum(4 * buffer.numel() for buffer in weights.model.buffers() if buffer.dtype in narrow)


@contextmanager
def in_float32(weights: MasterWeights) -> Iterator[None]:
    """In this block the model computes in float32, without gradients: with the masters themselves, and with copies of
    frozen weights and of buffers, which take memory. Packed weights are not for this."""
    model, narrow = weights.model, (torch.bfloat16, torch.float16)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, parameter in model.named_parameters():
            if parameter.dtype in narrow:
                wide = weights.masters[name].detach() if name in weights.masters else parameter.detach().float()
                before.append((parameter, parameter.data))
                parameter.data = wide.to(parameter.device)
        for buffer in model.buffers():
            if buffer.dtype in narrow:
                before.append((buffer, buffer.data))
                buffer.data = buffer.data.float()
        with torch.no_grad():
            yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _collect(master: torch.nn.Parameter, copy: torch.Tensor) -> None:
    """Add the gradient of a rounded copy to that of its master."""
    assert copy.grad is not None
    if master.grad is None:
        master.grad = copy.grad.to(master.dtype)
    else:
        master.grad.add_(copy.grad)
    copy.grad = None


def freeze_and_cast(model: torch.nn.Module, compute: torch.dtype) -> torch.nn.Module:
    """Freeze ``model`` and cast it to ``compute`` in place, except what its class keeps in float32: rotary tables, the
    gates of some experts."""
    for _ in _cast_frozen(model.requires_grad_(False), compute):
        pass
    return model


def _cast_frozen(model: torch.nn.Module, compute: torch.dtype) -> Iterator[tuple[str, torch.nn.Parameter, torch.dtype]]:
    """Cast buffers and frozen parameters; yields trainable ones by name, with the dtype that they compute in."""
    kept = kept_in_float32(causal_model(model))
    _cast_buffers(causal_model(model), compute)
    packed = {id(p) for module in model.modules() if is_packed(module) for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) in packed:
            continue
        target = parameter.dtype if kept(name) else compute
        if parameter.requires_grad:
            yield name, parameter, target
        elif parameter.dtype.is_floating_point and parameter.dtype != target:
            parameter.data = cast_to(parameter.data, target)


def kept_in_float32(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether the model's class keeps a parameter of this name in float32, whatever it computes in. As in transformers,
    the class gives names of modules or parameters anywhere in the path, or several joined by dots."""
    plain = getattr(model, "_keep_in_fp32_modules", None) or ()
    names = {name for name in plain if "." not in name}  # the others apply to float16 alone
    names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if not names:
        return lambda _: False
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(names)))
    return lambda name: pattern.search(name.replace(".base_layer", "")) is not None


def _cast_buffers(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Cast buffers as a model of this class built in ``compute`` has them: rotary tables stay float32, MiniMax's decay
    does not."""
    floating = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    if all(b.dtype == compute for b in floating.values()):
        return
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(compute)
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    except Exception:  # the class cannot be built so: buffers stay as they were loaded
        return
    finally:
        torch.set_default_dtype(before)
    dtypes = {name: b.dtype for name, b in built.named_buffers()}
    for name, buffer in floating.items():
        if dtypes.get(name.replace(".base_layer", "")) == compute:
            owner, _, field = name.rpartition(".")
            setattr(model.get_submodule(owner), field, buffer.to(compute))


def disable_dropout(target: PreTrainedConfig | torch.nn.Module) -> None:
    """Set every dropout and jitter of a configuration to zero, since log-probabilities must not be random; of a model
    also its dropout modules and the rates that its layers hold, and see :func:`steady_routers`."""
    config: Any = target
    holders: list[Any] = []
    if isinstance(target, torch.nn.Module):
        config, holders = causal_model(target).config, list(target.modules())
        steady_routers(target)
    text = config.get_text_config()
    parts = [getattr(text, name) for name in ("ffn_config", "attn_config") if hasattr(text, name)]  # DBRX
    parts = [part for part in parts if hasattr(part, "__dict__")]
    for holder in (*holders, config, text, *parts):
        if isinstance(holder, torch.nn.Dropout):
            holder.p = 0.0
        for field, value in list(vars(holder).items()):
            if field == "router_jitter_noise" and text.model_type == "phimoe":
                continue  # a threshold, by which it weighs experts in evaluation, too
            if _DROPOUT.search(field) and isinstance(value, float):
                setattr(holder, field, 0.0)


def steady_routers(model: torch.nn.Module) -> None:
    """Have the routers of ``model`` that draw experts at random in training (PhiMoE's) choose as in evaluation."""
    for module in model.modules():
        if _samples(module) and _evaluate not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_evaluate)


def _samples(module: Any) -> bool:
    return type(module).__name__ == "PhimoeTopKRouter"


def _evaluate(module: torch.nn.Module, args: Any) -> None:
    module.training = False
