"""Several models on one scale: Bradley-Terry strengths from who won against whom.

>>> import numpy as np
>>> games = Games.of([(0, 1, 0, 1.0)] * 30 + [(0, 1, 1, 0.0)] * 10)  # model 0 won 30 times of 40
>>> float(np.diff(fitted(games, 2))[0].round(2))
-1.1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefopt.interval import Interval

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PRIOR = 1e-3
"""Precision of a normal prior on strengths, in log-odds: so weak that only a model that never lost feels it."""


@dataclass(frozen=True, slots=True, eq=False)
class Games:
    """Comparisons [n]: ``first`` and ``second`` model, ``prompt``, ``outcome`` (1 the first won, 1/2, 0)."""

    first: Ints
    second: Ints
    prompt: Ints
    outcome: Floats

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, float]]) -> Games:
        """From rows (first, second, prompt, outcome)."""
        table = np.array(rows, np.float64).reshape(-1, 4)
        first, second, prompt = table[:, :3].astype(np.int64).T
        return cls(first, second, prompt, table[:, 3])

    def wins(self, models: int, weight: Floats | None = None) -> Floats:
        """[models, models]: how often one won against another, a tie half a win of each."""
        weight = np.ones(len(self.outcome)) if weight is None else weight
        found = np.zeros((models, models))
        np.add.at(found, (self.first, self.second), weight * self.outcome)
        np.add.at(found, (self.second, self.first), weight * (1 - self.outcome))
        return found


def fitted(games: Games, models: int, weight: Floats | None = None) -> Floats:
    """Strengths [models] in log-odds, 0 in the mean, of most likelihood (Bradley and Terry 1952; ties half a win)."""
    wins = games.wins(models, weight)
    played = wins + wins.T
    strength = np.zeros(models)
    for _ in range(200):
        chance = 0.5 * (1 + np.tanh(0.5 * (strength[:, None] - strength[None, :])))
        slope = (wins - played * chance).sum(1) - PRIOR * strength
        curve = played * chance * (1 - chance)
        hessian = np.diag(curve.sum(1)) - curve + PRIOR * np.eye(models)
        step = np.linalg.solve(hessian, slope)
        strength += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    centred: Floats = strength - strength.mean()
    return centred


def strengths(games: Games, models: int, *, resamples: int = 1000, seed: int = 0) -> list[Interval]:
    """Strength of each model with its interval, over resampled prompts (percentiles of the bootstrap)."""
    best = fitted(games, models)
    names, where = np.unique(games.prompt, return_inverse=True)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = np.empty((resamples, models))
    for i in range(resamples):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)).astype(np.float64)
        drawn[i] = fitted(games, models, times[where])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Interval(float(b), float(a), float(c), len(names)) for b, a, c in zip(best, low, high, strict=True)]
