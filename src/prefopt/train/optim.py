"""A network in training: weights, optimiser, learning-rate schedule, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.config.training import RunOptions
from prefopt.core.hub import import_bitsandbytes
from prefopt.errors import RunError
from prefopt.model.costs import MEMORY_ERRORS, out_of_memory
from prefopt.model.precision import MasterWeights
from prefopt.parallel.gradients import clip_


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate as a function of the step: linear warm-up, then ``linear``, ``cosine`` or ``constant``."""

    kind: str
    peak: float
    steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0. That of the first warm-up step is not zero."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * (1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    masters: Mapping[str, torch.nn.Parameter], *, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over named weights, without decay for vectors (norms and biases)."""
    fused = all(p.device.type in ("cpu", "cuda") for p in masters.values())
    return torch.optim.AdamW(_groups(masters, weight_decay), betas=betas, eps=epsilon, fused=fused)


MIN_8BIT, BLOCK, PAGED_FROM = 4096, 256, 100_000
"""Of bitsandbytes: weights with fewer numbers keep float32 moments; moments that share a scale; numbers from which on
paged moments may leave the device."""


def adamw_8bit(
    masters: Mapping[str, torch.nn.Parameter],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    paged: bool,
) -> torch.optim.Optimizer:
    """AdamW with blockwise 8-bit moments (Dettmers et al. 2021, arXiv 2110.02861) by bitsandbytes, else as
    :func:`adamw`. ``paged``: moments in memory that CUDA moves to the host where the device is full."""
    import_bitsandbytes()
    from bitsandbytes.optim import AdamW

    options = {"betas": betas, "eps": epsilon, "optim_bits": 8, "min_8bit_size": MIN_8BIT, "is_paged": paged}
    optimizer: torch.optim.Optimizer = AdamW(_groups(masters, weight_decay), **options)
    return optimizer


def _groups(masters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, and vectors without decay."""
    matrices = [p for p in masters.values() if p.ndim > 1]
    vectors = [p for p in masters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(slots=True)
class Network:
    """Weights, their optimiser and learning rate. ``train`` sets training or evaluation mode."""

    weights: MasterWeights
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    train: Callable[[bool], object] = lambda mode: None

    @classmethod
    def of(
        cls,
        weights: MasterWeights,
        options: RunOptions,
        steps: int,
        peak: float,
        train: Callable[[bool], object] = lambda mode: None,
    ) -> Network:
        """With the optimiser and the schedule of ``options``, over ``steps`` steps to a ``peak`` learning rate."""
        asked = {"epsilon": options.adam_epsilon, "weight_decay": options.weight_decay}
        betas = (options.adam_beta1, options.adam_beta2)
        optimizer: torch.optim.Optimizer
        if options.optimizer == "adamw":
            optimizer = adamw(weights.masters, betas=betas, **asked)
        else:
            paged = options.optimizer == "paged-adamw-8bit"
            optimizer = adamw_8bit(weights.masters, betas=betas, paged=paged, **asked)
        return cls(weights, optimizer, Schedule(options.schedule, peak, steps, round(options.warmup * steps)), train)

    def update(self, step: int, norm: float, limit: float) -> None:
        """One optimiser step on gradients of global norm ``norm``, clipped to ``limit``. Gradients are then cleared.

        Raises :class:`RunError` where the optimiser's state does not fit into memory.
        """
        clip_(self.weights.masters.values(), norm, limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step)
        try:
            self.optimizer.step()
        except MEMORY_ERRORS as error:
            if not out_of_memory(error):
                raise
            raise RunError(
                f"step {step + 1}: the optimiser's state does not fit into the device's memory; give"
                " --lora, --optimizer adamw-8bit, --offload optimizer, or a smaller --token-budget"
            ) from error
        self.weights.publish()
        self.weights.zero_grad()
