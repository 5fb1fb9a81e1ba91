"""Layers compiled by torch.compile: one graph for all shapes of a packed row, of which attention is one opaque node.

Elementwise work between matrix products is fused, which on a GPU is bound by memory. The forward function of a layer's
class is compiled, and layers of one class share its code. Nothing is wrapped: names of modules, weights, adapters and
shards stay as they are, and hooks on layers (those of shards) run outside of the graph. Steps of the sampler on the CPU
are a second graph, of all steps and numbers of rows. Other passes through the model run uncompiled.

A compiler that fails costs speed alone: the layers run uncompiled from then on, and one line says why.
"""

from __future__ import annotations

import logging
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch._dynamo
import torch._functorch.config
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental import _config as symbolic_shapes

from prefopt.errors import first_line
from prefopt.model.architectures import layers_of
from prefopt.model.costs import out_of_memory
from prefopt.model.recurrence.mixers import mixers_of

VARIANTS = 64
"""Graphs at most for a class of layers: with and without gradients, in training and evaluation, for each type of
attention. torch's own limit of 8 is too low for that."""
log = logging.getLogger(__name__)


@contextmanager
def compiler_settings() -> Iterator[None]:
    """The compiler's settings, for a forward pass."""
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        # Else a row as long as the hidden state is wide would be compiled for that length alone.
        stack.enter_context(cast(Any, symbolic_shapes).patch(use_duck_shape=False))
        # Else what fails in the backward pass would be compiled there, where nothing can be done about it.
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # by the compiler
        yield


class CompiledLayers:
    """The layers of a model, compiled at their first call. ``backend``: of torch.compile."""

    settings = staticmethod(compiler_settings)

    def __init__(self, model: torch.nn.Module, *, backend: str = "inductor") -> None:
        self.backend = backend
        self.failure: str | None = None
        """Why layers run uncompiled, in one line."""
        self.step_failure: str | None = None
        """Why the sampler's steps do."""
        # What a recurrent layer computes depends on the numbers of the row's segments: they stay as they are.
        self.layers = [layer for layer in layers_of(model) if not mixers_of(layer)]
        self._functions: dict[type, Callable[..., Any]] = {}
        self._failed: set[int] = set()
        for layer in self.layers:
            # A bound method, so that a copy of the model binds it to its own layer.
            layer.forward = types.MethodType(self._run, layer)

    def release(self) -> None:
        """Give the layers their own forward function back."""
        for layer in self.layers:
            vars(layer).pop("forward", None)

    def _run(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = type(layer)  # shards give layers a class of their own
        state = self._state(layer, kwargs)
        # Only scoring hands segments over as a tensor. Where one layer fails, the others stay as they are until the
        # pass ends: activations that its backward pass recomputes must be those of its forward pass.
        scores = id(layer) not in self._failed and isinstance(kwargs.get("prefix_segments"), torch.Tensor)
        if not scores and state is None:
            return kind.forward(layer, *args, **kwargs)
        try:
            return self._compiled(kind)(layer, *args, **(kwargs if scores else kwargs | {"slots": state}))
        except TorchDynamoException as error:
            if out_of_memory(error):
                raise
            why = f"torch.compile fails for {kind.__name__} ({first_line(error)})"
            if not scores:
                self.step_failure = why
                log.warning("steps of the sampler are not compiled: %s", why)
            else:
                self._failed.add(id(layer))
                if self.failure is None:
                    self.failure = why
                    log.warning("layers are not compiled: %s", why)
        return kind.forward(layer, *args, **kwargs)

    def _state(self, layer: torch.nn.Module, kwargs: dict[str, Any]) -> object | None:
        """What the sampler's cache holds for a compiled layer in this step, in place of the whole cache, whose parts a
        graph would tell apart; None where this is no step, or none that is compiled."""
        of_layer = getattr(kwargs.get("slots"), "of_layer", None)
        return of_layer(layer) if of_layer is not None and self.step_failure is None else None

    def _compiled(self, kind: type) -> Callable[..., Any]:
        if kind not in self._functions:
            options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "backend": self.backend}
            self._functions[kind] = torch.compile(cast(Any, kind).forward, **options)
        return self._functions[kind]
