"""Mixed precision with float32 master weights.

A bfloat16 run computes with bfloat16 copies of the weights. What the optimiser moves are their float32 masters:
steps of 1e-6 are far below the distance between two bfloat16 numbers and would vanish. Gradients of a micro-batch
arrive in bfloat16 and are added up in float32.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.errors import ConfigError
from prefopt.model.architectures import causal_model


class MasterWeights:
    """Trainable weights by name: the optimiser moves ``masters``, and ``publish`` brings the model's own after them."""

    def __init__(self, model: torch.nn.Module, compute: torch.dtype) -> None:
        """Cast ``model`` to ``compute`` in place, its trainable weights keeping a float32 master (float64 stays)."""
        self.model = model
        self.masters: dict[str, torch.nn.Parameter] = {}
        self._copies: dict[str, torch.nn.Parameter] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, parameter, target in _cast_frozen(model, compute):
            wide = parameter.data.to(torch.promote_types(target, torch.float32))
            if target == wide.dtype:
                parameter.data = wide
                self.masters[name] = parameter
                continue
            parameter.data = wide.to(target)
            self.masters[name] = torch.nn.Parameter(wide)
            self._copies[name] = parameter
            hook = parameter.register_post_accumulate_grad_hook(self._collector(self.masters[name]))
            self._hooks.append(hook)

    @staticmethod
    def _collector(master: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
        def collect(copy: torch.Tensor) -> None:
            assert copy.grad is not None
            if master.grad is None:
                master.grad = copy.grad.to(master.dtype)
            else:
                master.grad.add_(copy.grad)
            copy.grad = None

        return collect

    def release(self) -> None:
        """Take the hooks off the model: gradients stay on its own weights again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.masters.values(), *self._copies.values()):
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights the model computes with."""
        for name, rounded in self._copies.items():
            rounded.copy_(self.masters[name])

    @torch.no_grad()
    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Set the masters, and with them the model."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.publish()

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The masters by parameter name, for checkpoints and for the finished model."""
        for name, master in self.masters.items():
            yield name, master.detach()


def freeze_and_cast(model: torch.nn.Module, compute: torch.dtype) -> torch.nn.Module:
    """``model``, frozen and cast to ``compute`` in place as :class:`MasterWeights` casts what does not train.

    ``model.to(compute)`` would also round what its class keeps in float32: rotary tables, the gates of some experts.
    """
    for _ in _cast_frozen(model.requires_grad_(False), compute):
        pass
    return model


def _cast_frozen(model: torch.nn.Module, compute: torch.dtype) -> Iterator[tuple[str, torch.nn.Parameter, torch.dtype]]:
    """Cast buffers and frozen parameters; yields the others, by name, with the dtype that they compute in."""
    kept = _kept_in_float32(causal_model(model))
    _cast_buffers(causal_model(model), compute)
    for name, parameter in model.named_parameters():
        target = parameter.dtype if kept(name) else compute
        if parameter.requires_grad:
            yield name, parameter, target
        elif parameter.dtype.is_floating_point and parameter.dtype != target:
            parameter.data = parameter.data.to(target)


def _kept_in_float32(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a parameter's name is among those that the model's class keeps in float32 whatever it computes in.

    As in transformers a name may be that of a module or a parameter anywhere in the path, or several joined by dots.
    """
    told = {
        name
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
        if "." not in name or attribute.endswith("strict")  # the others keep theirs in float16 alone
    }
    if not told:
        return lambda _: False
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(told)))
    return lambda name: pattern.search(name.replace(".base_layer", "")) is not None


def _cast_buffers(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Give buffers the dtype that they have in a model of this class that is built in ``compute``.

    Rotary tables stay in float32, MiniMax's decay does not: the class alone knows which.
    """
    floating = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    if all(b.dtype == compute for b in floating.values()):
        return
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(compute)
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    except Exception:  # a class that cannot be built so is left as it was loaded
        return
    finally:
        torch.set_default_dtype(before)
    wanted = {name: b.dtype for name, b in built.named_buffers()}
    for name, buffer in floating.items():
        plain = name.replace(".base_layer", "")
        if wanted.get(plain) == compute:
            owner, _, field = name.rpartition(".")
            setattr(model.get_submodule(owner), field, buffer.to(compute))


_DROPS = re.compile(r"drop(out|_rate)?$|_pdrop$|dropout|layerdrop|jitter_noise")


def disable_dropout(target: PreTrainedConfig | torch.nn.Module) -> None:
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
