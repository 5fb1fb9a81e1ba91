"""Several models on one scale: Bradley-Terry strengths from who won against whom.

>>> import numpy as np
>>> games = Games.of([(0, 1, k, 1.0) for k in range(30)] + [(0, 1, k, 0.0) for k in range(10)])  # 30 of 40 to model 0
>>> (a, b) = strengths(games, 2)
>>> round(a.mean - b.mean, 2), round(float(np.log(30 / 10)), 2)
(1.1, 1.1)
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
"""Precision of a normal prior on strengths, in log-odds, so weak that only resamples where one never lost feel it."""


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

    def wins(self, models: int) -> Floats:
        """[prompts, models, models]: how often one won against another, a tie half a win of each."""
        names, where = np.unique(self.prompt, return_inverse=True)
        found = np.zeros((len(names), models, models))
        np.add.at(found, (where, self.first, self.second), self.outcome)
        np.add.at(found, (where, self.second, self.first), 1 - self.outcome)
        return found


def groups(games: Games, models: int) -> list[list[int]]:
    """The models in groups, within each of which every model has won against every other or tied with it, if only by
    way of a third: one group for one scale.

    Between two groups nobody both won and lost, or nobody met, and strengths have no most likely values (Ford 1957).

    >>> both = [(0, 1, 0, 1.0), (0, 1, 1, 0.0)]
    >>> groups(Games.of([*both, (1, 2, 0, 0.5)]), 3), groups(Games.of([*both, (1, 2, 0, 1.0)]), 3)
    ([[0, 1, 2]], [[0, 1], [2]])
    """
    beats = (games.wins(models).sum(0) > 0) | np.eye(models, dtype=bool)
    for _ in range(models):
        beats = beats @ beats  # by way of others
    both = beats & beats.T
    return [np.flatnonzero(row).tolist() for i, row in enumerate(both) if not both[i, :i].any()]


def fitted(wins: Floats) -> Floats:
    """Strengths [..., models] in log-odds, 0 in the mean, of most likelihood for wins [..., models, models].

    Bradley and Terry 1952: a model wins with the logistic of the difference of strengths; a tie is half a win of each.
    """
    models = wins.shape[-1]
    played = wins + wins.swapaxes(-1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(200):
        chance = 0.5 * (1 + np.tanh(0.5 * (strength[..., :, None] - strength[..., None, :])))
        slope = (wins - played * chance).sum(-1) - PRIOR * strength
        curve = played * chance * (1 - chance)
        hessian = (curve.sum(-1)[..., None] + PRIOR) * np.eye(models) - curve
        step = np.linalg.solve(hessian, slope[..., None])[..., 0]
        strength += step / np.maximum(1.0, np.abs(step).max(-1, keepdims=True))
        if np.abs(step).max() < 1e-10:
            break
    centred: Floats = strength - strength.mean(-1, keepdims=True)
    return centred


def strengths(games: Games, models: int, *, resamples: int = 1000, seed: int = 0) -> list[Interval]:
    """Strength of each model with its interval, over resampled prompts (percentiles of the bootstrap).

    For models that are one of :func:`groups`. Where one wins nearly always, intervals are too narrow: of models 4 and
    more log-odds apart they held the true strength in 75 to 83 % of simulated comparisons.
    """
    wins = games.wins(models)
    prompts = len(wins)
    rng = np.random.Generator(np.random.PCG64(seed))
    times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)
    drawn = fitted(np.tensordot(times, wins, 1))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    best = fitted(wins.sum(0))
    return [Interval(float(b), float(a), float(c), prompts) for b, a, c in zip(best, low, high, strict=True)]
