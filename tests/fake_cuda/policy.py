"""Policies and trainers on the fake device."""

from __future__ import annotations

from fake_cuda.device import moved  # isort: skip - before torch

from types import SimpleNamespace
from typing import Any

import torch

from model.architectures import build
from prefopt.config.training import RunOptions
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.kernels.head_class import head_of
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer
from prefopt.train.optim import Network
from prefopt.train.trainer import Trainer

OPTIONS = RunOptions(learning_rate=1e-5, output="none")


def scorer_of(name: str, kind: str = "full") -> tuple[Scorer, MasterWeights]:
    """A policy of the architecture that computes in bfloat16: ``full``, ``checkpointed`` or ``lora``."""
    model: Any = build(name, torch.float32)
    head = head_of(model)  # from numbers
    if kind == "lora":
        model = new_lora(model.requires_grad_(False), rank=4, alpha=8, dropout=0.0, targets=None)
    masters = MasterWeights(moved(model), torch.bfloat16)
    scorer = Scorer(model, head=head)
    if kind == "checkpointed":
        checkpoint_activations(model)
    scorer.train()
    return scorer, masters


def trainer_of(scorer: Any, weights: dict[str, MasterWeights], objective: Any, budget: int, **more: Any) -> Trainer:
    """What ``Trainer._update`` uses of a trainer."""
    nothing: Any = SimpleNamespace(auxiliary=lambda *_: None, applies=lambda *_: True)
    return Trainer(
        scorer=scorer,
        networks={name: Network.of(held, OPTIONS, 10, 1e-5) for name, held in weights.items()},
        objective=objective,
        source=nothing,
        steps=10,
        max_grad_norm=0.5,  # below the norm, so that gradients are clipped
        eval_every=None,
        early_stopping=None,
        save_every=None,
        keep_last=1,
        metrics=nothing,
        reporter=nothing,
        saver=nothing,
        stop=nothing,
        token_budget=budget,
        **more,
    )
