"""Scores of responses on one scale: a deviation of 1 around a mean of 0, whatever the reward.

beta is worth a number of nats per unit of score. Dividing by the deviation of the scores makes it the same number for a
reward model whose scores lie within 0.1 and for one whose scores lie within 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SMALLEST = 1e-8
"""Deviations below it are those of a constant: scores are then only shifted."""


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """Mean and deviation of ``count`` scores, updated batch by batch (Chan, Golub and LeVeque 1983, equation 1.5).

    >>> scale = ScoreScale().with_scores(torch.tensor([1.0, 3.0])).with_scores(torch.tensor([5.0]))
    >>> scale.mean, round(scale.deviation, 4), scale.of(torch.tensor([3.0])).tolist()
    (3.0, 1.633, [0.0])
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """The sum of squared differences from the mean."""

    def with_scores(self, score_N: torch.Tensor) -> ScoreScale:
        """With more scores."""
        more, n = score_N.double(), self.count + score_N.numel()
        by = float(more.mean()) - self.mean
        mean = self.mean + by * more.numel() / n
        within = float((more - more.mean()).square().sum())
        return ScoreScale(n, mean, self.squares + within + by**2 * self.count * more.numel() / n)

    @property
    def deviation(self) -> float:
        """The standard deviation of all scores, by their number."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def of(self, score_N: torch.Tensor) -> torch.Tensor:
        """Scores [N] on this scale."""
        far = self.deviation
        return (score_N - self.mean) / (far if far > SMALLEST else 1.0)

    def state(self) -> list[float]:
        """JSON data for a checkpoint."""
        return [self.count, self.mean, self.squares]

    @classmethod
    def from_state(cls, state: Sequence[float]) -> ScoreScale:
        """The inverse of :meth:`state`."""
        return cls(int(state[0]), state[1], state[2])
