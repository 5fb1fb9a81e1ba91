"""The head of a language model: what its class does between the last hidden state and the logits.

Most heads are a linear layer, some with a scale and a soft-cap whose names and meanings differ from class to class
(Granite divides by ``logits_scaling``, HyperCLOVA X multiplies with it). So what the configuration says is tried
against the class itself: its own forward is run around a body that answers with given hidden states. A head that no
reading of the configuration explains is left to the class's own code, which is slower and as exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from prefopt.errors import ModelError
from prefopt.model.logprobs import transformed, wide_dtype
from prefopt.model.packed import body_of

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_PROBES, _SPREAD = 4, 30.0
"""Hidden states that a head is tried on, and how far their logits spread: far enough for any soft-cap to show."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_COARSE = 0.03
"""Difference relative to the largest logit that is still rounding, in narrower types."""


@dataclass(frozen=True, slots=True)
class Head:
    """What happens between the last hidden state and the logits.

    ``kind``: ``fused`` for a plain linear layer, ``module`` where it carries an adapter or is a module of another kind,
    ``class`` where only the class's own code knows (hidden states are given to it), and ``model`` where hidden states
    cannot be told from logits, so that the whole model makes them. In the last two ``scale`` and ``softcap`` are what
    is applied to the class's own logits.
    """

    kind: str
    scale: float = 1.0
    softcap: float | None = None


def head_of(model: PreTrainedModel) -> Head:
    """How logits are made of hidden states, as ``model``'s own class makes them.

    Raises :class:`ModelError` for a model without a language-model head.
    """
    module: Any = model.get_output_embeddings()
    if module is None:
        raise ModelError(f"{type(model).__name__} has no language-model head; load it as a causal language model")
    if body_of(model) is model:
        return Head("model")
    kind = "fused" if type(module) is torch.nn.Linear else "module"
    readings = _readings(model.config.get_text_config())
    if module.weight.is_meta:
        return Head(kind, *readings[0])
    hidden = _probes(module)
    try:
        with torch.no_grad():
            own = class_logits(model, hidden)
    except Exception:  # a forward that wants more of its body than hidden states
        return Head("model")
    try:
        with torch.no_grad():
            plain = module(hidden)
        plain = plain.to(wide_dtype(plain.dtype))
        errors = [_difference(transformed(plain, *reading), own) for reading in readings]
    except RuntimeError:  # the class transforms hidden states too, into another shape
        return Head("class")
    best = min(range(len(readings)), key=errors.__getitem__)
    if errors[best] <= _TOLERANCE.get(hidden.dtype, _COARSE):
        return Head(kind, *readings[best])
    return Head("class")


def class_logits(
    model: PreTrainedModel, hidden: torch.Tensor, weights: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits [rows, V] of hidden [rows, H] by the class's own forward, float32 or wider; ``weights`` replace others."""
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    arguments = {"input_ids": ids, "use_cache": False, "return_dict": True}
    with _answering(model, hidden):
        out: Any = model(**arguments) if weights is None else torch.func.functional_call(model, weights, (), arguments)
    logits: torch.Tensor = out.logits[0]
    return logits.to(wide_dtype(logits.dtype))


def head_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The values now of all that :func:`class_logits` reads, whatever stands in their place later."""
    body = {id(m) for m in body_of(model).modules()}
    return {
        f"{prefix}.{name}" if prefix else name: parameter.data
        for prefix, module in model.named_modules()
        if id(module) not in body
        for name, parameter in module.named_parameters(recurse=False)
    }


def _readings(config: Any) -> list[tuple[float, float | None]]:
    """What the configuration may mean, scale and soft-cap, the likeliest first."""
    scales: list[float] = []
    for name in SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            both = (
                (1.0 / float(value), float(value)) if name == "logits_scaling" else (float(value), 1.0 / float(value))
            )
            scales += both
    found = [getattr(config, name, None) for name in SOFTCAPS]
    caps: list[float | None] = [float(cap) for cap in found if isinstance(cap, int | float) and cap]
    return list(product(dict.fromkeys([*scales, 1.0]), dict.fromkeys([*caps, None])))


def _probes(module: Any) -> torch.Tensor:
    weight = module.weight
    width = int(getattr(module, "in_features", 0) or weight.shape[1])
    drawn = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(weight.device, weight.dtype)
    with torch.no_grad():
        spread = float(module(hidden).float().std())
    return hidden * (_SPREAD / spread) if 0 < spread < float("inf") else hidden


def _difference(found: torch.Tensor, own: torch.Tensor) -> float:
    if found.shape != own.shape:
        return float("inf")
    error = float((found - own).abs().max() / own.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


class _Answer(BaseModelOutputWithPast):  # type: ignore[misc]
    """The output of a body: hidden states, and nothing under any other name."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Inside this context the layers of ``model`` compute nothing: their last hidden state is ``hidden`` [rows, H]."""
    decoder: Any = model.get_decoder()  # OPT calls it past the body
    body = body_of(model)
    inner = [body, *(m for m in body.modules() if m is decoder and m is not body)]
    asked = []

    def answer(*_: Any, **__: Any) -> _Answer:
        asked.append(True)
        return _Answer(last_hidden_state=hidden[None])

    for module in inner:
        module.forward = answer
    try:
        yield
        assert asked, "logits were made of other hidden states"
    finally:
        for module in inner:
            del module.forward
