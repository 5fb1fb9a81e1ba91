"""What the head of a class computes, found by trying it.

Most heads are a linear layer, some with a scale and a soft-cap whose names and meanings differ between classes
(Granite divides by ``logits_scaling``, HyperCLOVA X multiplies by it). What the configuration may mean is therefore
compared with the class's own forward around given hidden states. A head that this does not explain is left to the
class's own code, which is slower and as exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.errors import ModelError
from prefopt.model.architectures import body_of, class_logits, logit_transforms
from prefopt.model.kernels.head import transformed, wide_dtype
from prefopt.model.placeholders import is_placeholder

_PROBES, _SPREAD, _FEW = 4, 30.0, 64
"""Hidden states to test a head with, and the standard deviation of their logits: enough for any soft-cap to show."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Difference relative to the largest logit that is still rounding; 0.03 in narrower types."""


@dataclass(frozen=True, slots=True)
class Head:
    """How logits are computed from the last hidden state.

    ``kind``: ``fused`` for a plain linear layer, ``module`` for one with an adapter or a module of another kind,
    ``class`` for the class's own code, which is given hidden states, and ``model`` where body and head cannot be
    separated, so that the whole model computes logits. In the last two, ``scale`` and ``softcap`` apply to the class's
    own logits.
    """

    kind: str
    scale: float = 1.0
    softcap: float | None = None


def head_of(model: PreTrainedModel) -> Head:
    """How ``model``'s class computes logits. Raises :class:`ModelError` for a model without a language-model head."""
    module: Any = model.get_output_embeddings()
    if module is None:
        raise ModelError(f"{type(model).__name__} has no language-model head; load it as a causal language model")
    if body_of(model) is model:
        return Head("model")
    kind = "fused" if type(module) is torch.nn.Linear else "module"
    transforms = logit_transforms(model.config.get_text_config())
    if module.weight.is_meta:
        return Head(kind, *transforms[0])
    width = int(getattr(module, "in_features", 0) or module.weight.shape[1])
    drawn = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(module.weight.device, module.weight.dtype)
    few = _few_rows(module) if is_placeholder(module.weight) else {}
    place = next(name for name, inner in model.named_modules() if inner is module)
    with torch.no_grad():
        spread = float(torch.func.functional_call(module, few, (hidden,)).float().std())
    if 0 < spread < float("inf"):
        hidden = hidden * (_SPREAD / spread)
    try:
        with torch.no_grad():
            own = class_logits(model, hidden, {f"{place}.{name}": weight for name, weight in few.items()} or None)
    except Exception:  # its forward needs more of the body than hidden states
        return Head("model")
    try:
        with torch.no_grad():
            plain = torch.func.functional_call(module, few, (hidden,))
        plain = plain.to(wide_dtype(plain.dtype))
        errors = [_difference(transformed(plain, *transform), own) for transform in transforms]
    except RuntimeError:  # the class transforms hidden states too, into another shape
        return Head("class")
    best = min(range(len(transforms)), key=errors.__getitem__)
    if errors[best] <= _TOLERANCE.get(hidden.dtype, 0.03):
        return Head(kind, *transforms[best])
    return Head("class")


def _few_rows(module: torch.nn.Module) -> dict[str, Tensor]:
    """A few rows of a head's weights [V, ...], drawn where it has no contents yet: they show what its class does."""
    generator = torch.Generator().manual_seed(1)
    found, vocabulary = {}, int(cast(Any, module).weight.shape[0])
    for name, weight in module.named_parameters():
        if weight.shape[0] == vocabulary:
            few = weight.detach()[:_FEW]
            found[name] = torch.randn(few.shape, generator=generator).to(few.dtype) if is_placeholder(weight) else few
    return found


def _difference(found: Tensor, own: Tensor) -> float:
    if found.shape != own.shape:
        return float("inf")
    error = float((found - own).abs().max() / own.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")
