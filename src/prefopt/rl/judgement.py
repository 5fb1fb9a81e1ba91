"""A round: prompts with sampled responses and what a judge said of them, and the preferences that follow.

>>> preferences_of([0.2, 0.9, 0.2], soft=False)
[(1, 0, 1.0), (1, 2, 1.0)]
>>> [(i, k, round(p, 3)) for i, k, p in preferences_of([0.0, 1.0], soft=True)]
[(0, 1, 0.269), (1, 0, 0.731)]
>>> win_rates(3, [(0, 1, 1.0), (0, 2, 0.5), (1, 2, float("nan"))])
[0.75, 0.0, 0.5]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from prefopt.losses.rl import without_end
from prefopt.rl.rollouts import Rollouts

Outcome = tuple[int, int, float]
"""Responses i < k of a prompt, and the fraction of votes for the first: 1/2 for a tie, NaN where there was no vote."""
Preference = tuple[int, int, float]
"""The better response, the other one, and the weight of that."""


@dataclass(frozen=True, eq=False)
class Round:
    """``rollouts`` with the outcomes of comparisons by group, where a judge compares; None where scores say it all, and
    until the judge has spoken."""

    rollouts: Rollouts
    outcomes: tuple[tuple[Outcome, ...], ...] | None = None
    judged: bool = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """All contents as tensors, for a checkpoint."""
        found = self.rollouts.tensors() | {"judged": torch.tensor(self.judged)}
        if self.outcomes is None:
            return found
        listed = [(g, i, k, x) for g, many in enumerate(self.outcomes) for i, k, x in many]
        return found | {"outcomes": torch.tensor(listed, dtype=torch.float64).reshape(-1, 4)}

    @classmethod
    def from_tensors(cls, saved: Mapping[str, torch.Tensor]) -> Round:
        """The inverse of :meth:`tensors`."""
        rollouts, outcomes = Rollouts.from_tensors(saved), None
        if "outcomes" in saved:
            found: list[list[Outcome]] = [[] for _ in rollouts.groups]
            for g, i, k, x in saved["outcomes"].tolist():
                found[int(g)].append((int(i), int(k), x))
            outcomes = tuple(map(tuple, found))
        return cls(rollouts, outcomes, bool(saved.get("judged", True)))

    def compared(self, outcomes: Sequence[Sequence[Outcome]]) -> Round:
        """This round with the outcomes of a judge; the score of a response is the fraction of comparisons it won."""
        many = [len(group.continuations) for group in self.rollouts.groups]
        scores = [s for k, found in zip(many, outcomes, strict=True) for s in win_rates(k, found)]
        scored = replace(self.rollouts, score_N=torch.tensor(scores, dtype=torch.float64))
        return Round(scored, tuple(map(tuple, outcomes)))

    def scored(self, *, penalty: float | None, instead: float | None) -> Round:
        """This round with the scores of responses that did not end penalised, see :func:`without_end`."""
        rollouts = self.rollouts
        score_N = without_end(rollouts.score_N, rollouts.finished_N, penalty=penalty, instead=instead)
        return replace(self, rollouts=replace(rollouts, score_N=score_N))

    def scores(self) -> list[list[float]]:
        """The scores by group."""
        every = iter(self.rollouts.score_N.tolist())
        return [[next(every) for _ in group.continuations] for group in self.rollouts.groups]

    def preferences(self, *, soft: bool, best_worst: bool) -> list[list[Preference]]:
        """What the judge prefers, by group; ``best_worst``: of the best and the worst response alone."""
        found = []
        for g, scores in enumerate(self.scores()):
            outcomes = None if self.outcomes is None else self.outcomes[g]
            votes = preferences_of(scores, soft=soft) if outcomes is None else preferences_in(outcomes, soft=soft)
            if best_worst:
                ends = {scores.index(max(scores)), scores.index(min(scores))}
                votes = [vote for vote in votes if {*vote[:2]} == ends]
            found.append(votes)
        return found


def win_rates(count: int, outcomes: Sequence[Outcome]) -> list[float]:
    """The mean outcome of each of ``count`` responses over its comparisons; 1/2 for one that has none."""
    found: list[list[float]] = [[] for _ in range(count)]
    for i, k, x in outcomes:
        if not math.isnan(x):
            found[i].append(x)
            found[k].append(1 - x)
    return [sum(many) / len(many) if many else 0.5 for many in found]


def preferences_of(scores: Sequence[float], *, soft: bool) -> list[Preference]:
    """Preferences by scores: the higher one wins; ``soft``: with the probability of Bradley and Terry (1952)."""

    def first(a: float, b: float) -> float:
        return 1 / (1 + math.exp(min(700.0, b - a))) if soft else 0.5 + 0.5 * ((a > b) - (a < b))

    pairs = combinations(range(len(scores)), 2)
    return preferences_in([(i, k, first(scores[i], scores[k])) for i, k in pairs], soft=soft)


def preferences_in(outcomes: Sequence[Outcome], *, soft: bool) -> list[Preference]:
    """Preferences by comparisons: that of most votes, none for a tie; ``soft``: both with the fractions of votes."""
    found: list[Preference] = []
    for i, k, x in outcomes:
        if math.isnan(x):
            continue
        if soft:
            found += [(i, k, x)] if x > 0 else []
            found += [(k, i, 1 - x)] if x < 1 else []
        elif x != 0.5:
            found.append((i, k, 1.0) if x > 0.5 else (k, i, 1.0))
    return found
