"""The optimiser, its schedule and the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate as a function of the step: linear warm-up, then ``linear``, ``cosine`` or ``constant``."""

    kind: str
    peak: float
    steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        """The rate of step ``step``, counted from 0. The first step of a warm-up already moves."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * (1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    masters: Mapping[str, torch.nn.Parameter],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW over named weights; decay spares vectors (norms and biases), as is usual."""
    matrices = [p for p in masters.values() if p.ndim > 1]
    vectors = [p for p in masters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in masters.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=epsilon, fused=fused)


def grad_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The global norm of all gradients, left on the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_(parameters: Iterable[torch.nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients of global norm ``norm`` down to ``limit``; shorter ones are left alone."""
    if norm > limit:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], limit / (norm + 1e-6))
