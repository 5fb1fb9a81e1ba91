"""Simulated comparisons whose truth is known."""

from __future__ import annotations

import numpy as np


def experiment(rng: np.random.Generator, prompts: int, samples: int, slope: float = 0.0) -> tuple[np.ndarray, ...]:
    """Outcomes with ties of prompts that lean to one side or the other, and differences of length."""
    longer = rng.normal(30, 50, (prompts, samples))
    return judged(rng, 0.4 + rng.normal(0, 1, (prompts, 1)) + slope * longer / 50, tie=0.2), longer


def judged(rng: np.random.Generator, lean: np.ndarray, *, tie: float) -> np.ndarray:
    """Outcomes with this fraction of ties, otherwise won with the logistic of ``lean``."""
    chance, u = 1 / (1 + np.exp(-lean)), rng.random(lean.shape)
    return np.where(u < (1 - tie) * chance, 1.0, np.where(u < (1 - tie) * chance + tie, 0.5, 0.0))
