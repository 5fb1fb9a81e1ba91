"""Recurrent layers of transformers that compute packed rows with shared prefixes.

A layer runs the code of its own class, with its own weights, adapters and norms. Only the functions that mix tokens
along the row are others: those of :mod:`prefopt.model.recurrence.operators`. Classes are named one by one. One that is
not in the list, or that no longer calls the functions that it is listed with, is scored one response at a time.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.model.kernels.attention import UnshareableError
from prefopt.model.recurrence.conv import packed_conv
from prefopt.model.recurrence.operators import operators, wide
from prefopt.model.recurrence.row import Segments
from prefopt.model.recurrence.ssm import linear_recurrence, state_space_dual


class RowMask(NamedTuple):
    """The segments of a row in place of an attention mask, for bodies that hand nothing else to their layers."""

    segments: Segments


class Mixer(NamedTuple):
    """How layers of a class compute a row. ``run(layer, kind, segments, args, kwargs)``; ``calls``: names that the
    class's code must contain."""

    run: Callable[..., Any]
    calls: tuple[str, ...]


def _by_operators(layer: torch.nn.Module, kind: type, segments: Segments, args: Any, kwargs: dict[str, Any]) -> Any:
    own: Any = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    names = own.__globals__ | operators(segments, own.__globals__)
    code = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    code.__kwdefaults__ = own.__kwdefaults__
    return code(layer, *args, **kwargs)


def _griffin(layer: Any, kind: Any, segments: Segments, args: Any, kwargs: dict[str, Any]) -> Any:
    """RecurrentGemma: its convolution is a module, its recurrence a method of another one."""
    conv, gates = layer.conv_1d, layer.rg_lru
    own: Callable[[Tensor], Tensor] = conv.forward

    def scan(*, hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, **_: Any) -> tuple[Tensor, None]:
        found = linear_recurrence(wide((recurrent_gate * ~reset)[0]), wide(hidden_states[0]), segments)
        return found.to(hidden_states.dtype)[None], None

    def packed(x: Tensor) -> Tensor:
        return packed_conv(lambda row: own(row)[..., : row.shape[-1]], x, layer.conv1d_width, segments)

    conv.forward, gates._rnn_scan = packed, scan
    try:
        return kind.forward(layer, *args, **{**kwargs, "use_cache": False})
    finally:
        del conv.forward, gates._rnn_scan


def _lightning(
    layer: Any, _: type, segments: Segments, args: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """MiniMax: linear attention with a fixed decay for each head (arXiv 2501.08313, section 2.2)."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    heads = layer.num_attention_heads
    query, key, value = wide(layer.act_fn(layer.qkv_proj(x))[0]).unflatten(-1, (heads, -1)).chunk(3, -1)
    decay = -layer.slope_rate.flatten().to(query.dtype).expand(len(query), heads)
    y = layer.norm(state_space_dual(value, decay, key, query, segments).flatten(1).to(x.dtype)[None])
    return layer.out_proj(F.sigmoid(layer.output_gate(x)) * y), None


_CONV = "causal_conv1d_fn"
_SHORT_CONV = Mixer(_by_operators, (_CONV,))
_MAMBA = Mixer(_by_operators, (_CONV, "mamba_selective_scan"))
_MAMBA2 = Mixer(_by_operators, (_CONV, "mamba2_chunk_scan"))
_DELTA = Mixer(_by_operators, (_CONV, "torch_chunk_gated_delta_rule"))
_KIMI = Mixer(_by_operators, (_CONV, "chunk_kimi_delta_attention"))

MIXERS: dict[str, Mixer] = {
    "Lfm2ShortConv": _SHORT_CONV,
    "Lfm2MoeShortConv": _SHORT_CONV,
    "Lfm3ShortConv": _SHORT_CONV,
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "Mamba2Mixer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": _MAMBA,
    "MambaMixer": _MAMBA,
    "OlmoHybridGatedDeltaNet": _DELTA,
    "Qwen3NextGatedDeltaNet": _DELTA,
    "Qwen3_5GatedDeltaNet": _DELTA,
    "Qwen3_5MoeGatedDeltaNet": _DELTA,
    "BailingHybridDeltaAttention": _KIMI,
    "KimiLinearDeltaAttention": _KIMI,
    "MiniMaxLightningAttention": Mixer(_lightning, ("slope_rate", "output_gate", "qkv_proj", "act_fn")),
    "RecurrentGemmaRecurrentBlock": Mixer(_griffin, ("conv_1d", "rg_lru", "conv1d_state")),
}
"""By the name of the class in transformers."""
_KEEP_ARGUMENTS = {"JambaMambaDecoderLayer"}
"""Layers that hand their mixer the mask and no other argument."""
_MASK_ALONE = {"MambaModel", "FalconMambaModel"}
"""Bodies that hand their layers the mask and nothing else."""


def mixer_class(module: torch.nn.Module) -> type | None:
    """The class under which a module is in :data:`MIXERS`, where its code is what the list says; else None."""
    for kind in type(module).__mro__:
        if kind.__name__ in MIXERS and kind.__module__.startswith("transformers."):
            code: Any = inspect.unwrap(kind.forward).__code__  # type: ignore[attr-defined]
            return kind if set(MIXERS[kind.__name__].calls) <= set(code.co_names) else None
    return None


def changed_classes(model: torch.nn.Module) -> list[str]:
    """Classes in a model that are in :data:`MIXERS`, and whose code in this transformers is not what the list says."""
    return sorted({name for m in model.modules() if mixer_class(m) is None for name in _names(m) & set(MIXERS)})


def mixers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The recurrent layers of a model that can share prefixes."""
    return [module for module in model.modules() if mixer_class(module)]


def share_prefixes(model: torch.nn.Module, on: bool) -> None:
    """Let a model's recurrent layers compute rows with shared prefixes, or give them their own forward back."""
    for module in model.modules():
        if mixer_class(module):
            _set_forward(module, _run if on else None)
        elif _KEEP_ARGUMENTS & _names(module):
            _set_forward(module, _hand_over if on else None)


def mask_for(body: torch.nn.Module, segments: Segments) -> dict[str, RowMask]:
    """The mask that tells ``body`` the segments of a row, where it would not hand them on otherwise."""
    return {"attention_mask": RowMask(segments)} if _MASK_ALONE & _names(body) else {}


def _names(module: torch.nn.Module) -> set[str]:
    """Names of a module's classes: shards give it one of their own."""
    return {kind.__name__ for kind in type(module).__mro__}


def _set_forward(module: torch.nn.Module, function: Callable[..., Any] | None) -> None:
    if function is None:
        vars(module).pop("forward", None)
    else:  # a bound method, so that a copy of the model binds it to its own layer
        module.forward = types.MethodType(function, module)


def _run(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    kind = mixer_class(layer)
    assert kind is not None
    segments = kwargs.get("prefix_segments")
    if isinstance(mask := kwargs.get("attention_mask"), RowMask):
        segments, kwargs["attention_mask"] = mask.segments, None
    if segments is None:
        raise UnshareableError(f"{kind.__name__} does not get the keyword arguments of its model")
    if kwargs.get("attention_mask") is not None or kwargs.get("cache_params") is not None:
        raise UnshareableError(f"{kind.__name__} is given a mask or a cache, which shared prefixes do not support")
    rest = {name: value for name, value in kwargs.items() if not name.startswith("prefix_")}
    return MIXERS[kind.__name__].run(layer, kind, _numbers(segments), args, rest)


def _hand_over(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Hand the segments to what is inside ``layer`` in place of the mask, which it does hand on."""
    if kwargs.get("attention_mask") is not None or (segments := kwargs.get("prefix_segments")) is None:
        raise UnshareableError(f"{type(layer).__name__} is given a mask, or no segments of its row")
    return type(layer).forward(layer, *args, **{**kwargs, "attention_mask": RowMask(segments)})


def _numbers(segments: Segments | Tensor) -> Segments:
    """Segments as numbers; compiled layers get a tensor."""
    if isinstance(segments, Tensor):
        numbers = segments.tolist()
        return tuple(zip(*(numbers[n::4] for n in range(4)), strict=True))
    return segments
