"""Floating-point operations of a batch, and the peak rate of the device; their quotient is the utilisation of a run.

Matrix products of forward and backward that any exact implementation needs are counted; recomputation to save memory
is not. A product of [m, k] and [k, n] is 2 m k n.

==============================  ==============================================================
a weight, per token             2 forward, 2 for the gradient of its input, 2 for its own
the head, per scored token      the same, 2 V H each
attention, per visible pair     2 (D_qk + D_v) per head forward, twice that backward
==============================  ==============================================================

A frozen weight needs no gradient of its own, nor one of its input where nothing before it trains. A token counts the
experts it is sent to. Sliding windows are respected. Embeddings, norms, softmax, rotary tables and the state of
recurrent layers are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from prefopt.model.architectures import attention_shapes, causal_model, expert_fraction, weights_in
from prefopt.model.costs import MEMORY_ERRORS, out_of_memory
from prefopt.model.packing import PackedBatch, Segment

_SEARCH_SECONDS, _PRODUCT_SECONDS = 0.3, 0.02


def active_weights(model: torch.nn.Module) -> tuple[int, int]:
    """Weights that one token is computed with, and all of them: of a mixture's experts those that it is sent to."""
    config = causal_model(model).config.get_text_config()
    active, whole = 0.0, 0
    seen: set[int] = set()  # a tied one counts once
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                whole += weights_in(parameter)
                active += weights_in(parameter) * _fraction(name, module, config)
    return round(active), whole


@dataclass(frozen=True, slots=True)
class FlopCount:
    """Operations of a model, forward and, where it ``trains``, backward: of its layers ``per_token``, of its head
    ``per_scored``, of one query and one key in one layer ``per_pair``. ``windows``: number of layers per sliding window
    (None: full attention)."""

    per_token: float
    per_scored: float
    per_pair: float
    windows: tuple[tuple[int | None, float], ...]

    @classmethod
    def of(cls, model: torch.nn.Module, *, trains: bool = True) -> FlopCount:
        """Count ``model``, or one wrapped by PEFT, with its parameters trainable or frozen as they are."""
        causal = causal_model(model)
        head = causal.get_output_embeddings()
        in_head = {id(m) for m in head.modules()} if head is not None else set()  # a scalar head costs next to nothing
        per_token = per_scored = 0.0
        reached = False  # whether something before this module trains
        for name, module in model.named_modules():
            for parameter, fraction in _matrices(name, module, causal.config.get_text_config()):
                times = 1 + (reached + parameter.requires_grad if trains else 0)
                cost = 2.0 * weights_in(parameter) * fraction * times
                if id(module) in in_head:
                    per_scored += cost
                else:
                    per_token += cost
            reached = reached or any(p.requires_grad for p in module.parameters(recurse=False))
        width, windows = _widths(causal)
        return cls(per_token, per_scored, 2.0 * width * (3 if trains and reached else 1), windows)

    def __call__(self, batch: PackedBatch) -> float:
        """Operations of ``batch``."""
        segments = [s for p in batch.passes for s in p.segments]
        return self._total(batch.tokens, len(batch.target), segments)

    def unshared(self, batch: PackedBatch) -> float:
        """Operations of the steps of all responses of ``batch`` as sequences of their own, each with its prompt."""
        lengths = [len(g.prefix) + len(ids) for g in batch.groups for c in g.continuations for ids, _ in c.steps]
        return self._total(sum(lengths), len(batch.target), [(0, length, 0, 0) for length in lengths])

    def _total(self, tokens: int, scored: int, segments: Sequence[Segment]) -> float:
        pairs = sum(layers * visible_pairs(segments, window) for window, layers in self.windows)
        return self.per_token * tokens + self.per_scored * scored + self.per_pair * pairs


def visible_pairs(segments: Sequence[Segment], window: int | None = None) -> int:
    """(Query, key) pairs of causal attention in one layer."""
    total = 0
    for start, stop, _, prefix in segments:
        first, last = prefix + 1, prefix + stop - start  # keys seen by the first query and by the last, without window
        limit = last if window is None else window
        growing = max(0, min(last, limit) - first + 1)
        total += growing * (2 * first + growing - 1) // 2 + (last - first + 1 - growing) * limit
    return total


def _matrices(name: str, module: torch.nn.Module, config: Any) -> Iterator[tuple[torch.nn.Parameter, float]]:
    """The module's own matrices, each with the fraction of it that one token is multiplied with."""
    if isinstance(module, torch.nn.Embedding) or "original_module" in name:
        return
    for field, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2 or "bias" in field or "norm" in type(module).__name__.lower():
            continue
        yield parameter, _fraction(name, module, config)


def _fraction(name: str, module: torch.nn.Module, config: Any) -> float:
    """The fraction of a module's weights that one token meets: of experts, and not of the router beside them."""
    path = name.split(".")
    experts = "experts" in path or "Experts" in type(module).__name__
    return expert_fraction(config) if experts and "router" not in path else 1.0


def _widths(model: PreTrainedModel) -> tuple[float, tuple[tuple[int | None, float], ...]]:
    """Multiplications per (query, key) pair of one layer, and the number of such layers per window."""
    shapes = attention_shapes(model.config)
    widths = [s.heads * (s.key_width + s.value_width) for s in shapes]
    unit = next((w for w in widths if w), 1)
    layers: dict[int | None, float] = {}
    for shape, width in zip(shapes, widths, strict=True):
        layers[shape.window] = layers.get(shape.window, 0) + width / unit
    return unit, tuple(layers.items())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Peak rate of square matrix products on ``device`` in operations per second, measured in about 0.3 seconds. Sizes
    grow until a product takes long enough to be timed, or memory runs out."""
    best, began = 0.0, time.perf_counter()
    for size in (2**n for n in range(8, 15)):
        try:
            seconds = _best_seconds(size, device, dtype, began)
        except MEMORY_ERRORS as error:
            if not out_of_memory(error) or not best:
                raise
            break
        best = max(best, 2.0 * size**3 / seconds)
        if seconds >= _PRODUCT_SECONDS or time.perf_counter() - began > _SEARCH_SECONDS:
            break
    return best


def _best_seconds(size: int, device: torch.device, dtype: torch.dtype, began: float) -> float:
    """Shortest time of a product of this size: of two, or of as many as the search has time for."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while True:  # the first product also loads a kernel
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize(a.device)
        times.append(time.perf_counter() - start)
        small = min(times) < _PRODUCT_SECONDS and size < 16384
        if len(times) > 1 and (small or time.perf_counter() - began > _SEARCH_SECONDS):
            return min(times)
