"""DPO as one would write it on a blackboard: every sequence by itself, the whole batch at once, AdamW by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from model.oracle import oracle_logprobs
from prefopt.data.group import Group


def response_logprobs(model: torch.nn.Module, group: Group) -> torch.Tensor:
    """Log-probability of each response of a pair, [2], by the model's own forward."""
    chosen = int(group.continuations[0].trained.sum())
    logp = oracle_logprobs(model, [group])
    return torch.stack([logp[:chosen].sum(), logp[chosen:].sum()])


def flat_dpo(
    model: torch.nn.Module,
    groups: Sequence[Group],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    beta: float,
    label_smoothing: float,
    learning_rate: float,
    schedule: str,
    warmup: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float,
) -> list[dict[str, float]]:
    """Train ``model`` in place; loss, gradient norm and learning rate of every step."""
    with torch.no_grad():
        reference = [response_logprobs(model, g) for g in groups]
    batches = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(groups))
        batches += [order[i : i + batch_size] for i in range(0, len(groups), batch_size)]
    total, warm = len(batches), round(warmup * len(batches))
    weights = [p for p in model.parameters() if p.requires_grad]
    mean = [torch.zeros_like(w) for w in weights]
    square = [torch.zeros_like(w) for w in weights]
    told = []
    for t, batch in enumerate(batches):
        losses: list[Any] = []
        for i in batch:
            ratio = response_logprobs(model, groups[i]) - reference[i]
            right = torch.sigmoid(beta * (ratio[0] - ratio[1]))
            losses.append(-(1 - label_smoothing) * right.log() - label_smoothing * (1 - right).log())
        loss = torch.stack(losses).mean()
        grads = torch.autograd.grad(loss, weights)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        shrink = min(1.0, max_grad_norm / (norm + 1e-6))
        done = (t - warm) / (total - warm)
        falling = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]
        rate = learning_rate * ((t + 1) / (warm + 1) if t < warm else falling)
        with torch.no_grad():
            for w, g, m, v in zip(weights, grads, mean, square, strict=True):
                g = g * shrink
                m.mul_(betas[0]).add_((1 - betas[0]) * g)
                v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
                if w.ndim > 1:
                    w.mul_(1 - rate * weight_decay)
                step = m / (1 - betas[0] ** (t + 1)) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + epsilon)
                w.sub_(rate * step)
        told.append({"loss": loss.item(), "grad_norm": norm, "learning_rate": rate})
    return told
