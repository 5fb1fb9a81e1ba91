"""A world that can be listed: what is trained comes to the optimum that theory.py gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from methods import small_world as world
from prefopt import theory
from prefopt.losses.preference import dpo
from prefopt.model.scorer import Scorer

pytestmark = pytest.mark.slow

BETA = 0.5
MANY = len(world.SHORT)
REWARD = np.array(world.reward([], [world.text_of(r) for r in world.SHORT]))


def start() -> tuple[Any, Any]:
    """log ref [Y] and log pi* [Y], float64."""
    with torch.no_grad():
        ref = world.distribution(Scorer(world.model().double()), world.SHORT).numpy()
    assert np.exp(ref).sum() == pytest.approx(1, abs=1e-6)
    best = theory.optimal_logp(ref, REWARD, BETA)
    assert theory.total_variation(ref, best) > 0.3  # there is something to learn
    return ref, best


def fit_dpo(count: torch.Tensor, label: torch.Tensor, ref: Any, steps: int = 200) -> Any:
    """DPO by this package's loss; log pi [Y] at the end, as the scorer has it.

    ``count`` and ``label``, [pairs]: how often each pair i < j was compared, and the part that the first one won.
    """
    model, base = world.model().double(), torch.tensor(ref)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    first, second = torch.triu_indices(MANY, MANY, 1)
    for _ in range(steps):
        logp = world.dense(model, world.SHORT)
        found = dpo(logp[first], logp[second], base[first], base[second], label, beta=BETA)
        optimizer.zero_grad()
        ((found.numerator_G * count).sum() / count.sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return world.distribution(Scorer(model), world.SHORT).numpy()


def test_dpo_on_soft_labels_reaches_the_optimum() -> None:
    ref, best = start()
    first, second = np.triu_indices(MANY, 1)
    label = torch.tensor(theory.bradley_terry(REWARD)[first, second])
    assert theory.total_variation(fit_dpo(torch.ones(len(first)).double(), label, ref), best) <= 0.02


def test_dpo_on_sampled_labels_comes_nearer_with_their_number() -> None:
    ref, best = start()
    chance, prefer = np.random.Generator(np.random.PCG64(0)), theory.bradley_terry(REWARD)
    first, second = np.triu_indices(MANY, 1)
    errors = []
    for many in (20, 2_000):  # of every pair
        wins = chance.binomial(many, prefer[first, second])
        count = torch.full((len(first),), float(many), dtype=torch.float64)
        errors.append(float(theory.total_variation(fit_dpo(count, torch.tensor(wins / many), ref), best)))
    assert errors[1] < 0.5 * errors[0] and errors[1] <= 0.03
