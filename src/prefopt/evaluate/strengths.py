"""Bradley-Terry strengths of three and more models, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from prefopt.core.statistics import Interval, student
from prefopt.evaluate.win_rate import Floats

PRIOR = 1e-3
"""Precision of a normal prior on strengths in log-odds: it only keeps fits finite where a model never lost."""


def win_counts(games: Sequence[tuple[int, int, int, float]], models: int) -> Floats:
    """Wins of one model over another, [prompts, models, models], of games (first, second, prompt, outcome); a tie is
    half a win of each."""
    table = np.array(games, np.float64).reshape(-1, 4)
    first, second, prompt = table[:, :3].astype(np.int64).T
    names, place = np.unique(prompt, return_inverse=True)
    found = np.zeros((len(names), models, models))
    np.add.at(found, (place, first, second), table[:, 3])
    np.add.at(found, (place, second, first), 1 - table[:, 3])
    return found


def connected_groups(wins: Floats) -> list[list[int]]:
    """Strongly connected components of the graph "won against or tied with", from :func:`win_counts`. Strengths are
    finite within one component only: between two of them the likelihood has no maximum (Ford 1957).

    >>> both = [(0, 1, 0, 1.0), (0, 1, 1, 0.0)]
    >>> [connected_groups(win_counts([*both, (1, 2, 0, outcome)], 3)) for outcome in (0.5, 1.0)]
    [[[0, 1, 2]], [[0, 1], [2]]]
    """
    _, label = connected_components(wins.sum(0) > 0, connection="strong")
    return sorted(np.flatnonzero(label == n).tolist() for n in np.unique(label))


def fit_strengths(wins: Floats) -> Floats:
    """Maximum-likelihood strengths [..., models] in log-odds, centred, from wins [..., models, models].

    Bradley and Terry 1952: a model wins with the logistic of the difference of strengths; a tie is half a win of each.
    """
    models = wins.shape[-1]
    played = wins + wins.swapaxes(-1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(200):
        chance = expit(strength[..., :, None] - strength[..., None, :])
        slope = (wins - played * chance).sum(-1) - PRIOR * strength
        curve = played * chance * (1 - chance)
        hessian = (curve.sum(-1)[..., None] + PRIOR) * np.eye(models) - curve
        step = np.linalg.solve(hessian, slope[..., None])[..., 0]
        strength += step / np.maximum(1.0, np.abs(step).max(-1, keepdims=True))
        if np.abs(step).max() < 1e-10:
            break
    centred: Floats = strength - strength.mean(-1, keepdims=True)
    return centred


def bradley_terry(wins: Floats) -> list[Interval]:
    """The strength of each model of one connected group, with 95 % intervals over prompts, from :func:`win_counts`.

    Bounds are Student's with standard errors clustered by prompt (Liang and Zeger 1986), as one prompt is answered in
    several games. In simulations of 15 and 40 prompts they hold the truth in 93 to 97 of 100 experiments
    (``tests/evaluate/test_strengths.py``). Raises ``ValueError`` for fewer than two prompts.

    >>> games = [(0, 1, k, 1.0) for k in range(30)] + [(0, 1, k, 0.0) for k in range(10)]  # won 30 of 40
    >>> (a, b) = bradley_terry(win_counts(games, 2))
    >>> round(a.mean - b.mean, 2)  # log(30 / 10)
    1.1
    """
    prompts = len(wins)
    if prompts < 2:
        raise ValueError("an interval needs at least two prompts")
    strength = fit_strengths(wins.sum(0))
    chance = expit(strength[:, None] - strength[None, :])
    played = wins + wins.swapaxes(-1, -2)
    scores = (wins - played * chance).sum(-1)  # [prompts, models]
    curve = played.sum(0) * chance * (1 - chance)
    # Strengths are centred: of the information matrix, which is singular along their sum, the pseudo-inverse.
    bread = np.linalg.pinv(np.diag(curve.sum(1)) - curve, hermitian=True)
    cover = bread @ (scores.T @ scores * prompts / (prompts - 1)) @ bread
    half = student(prompts - 1) * np.sqrt(np.diag(cover))
    bounds = zip(strength.tolist(), half.tolist(), strict=True)
    return [Interval(mean, mean - width, mean + width, prompts) for mean, width in bounds]
