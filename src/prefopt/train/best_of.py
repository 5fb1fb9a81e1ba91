"""Best-of-N: of N responses the one that a reward scores highest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from prefopt.generate.sample import Ids, Sample, group_of
from prefopt.records import Comparison
from prefopt.train.judge import Judge

TOKENS = 8192
"""Tokens that a reward model encodes at once."""


class BestOf:
    """Keeps the best of every ``many`` samples, as ``judge`` scores them; of equals the first.

    The divergence from the model is at most log N - (N - 1) / N nats (Stiennon et al. 2020, section 4.3; an upper
    bound by Beirami et al. 2024, arXiv 2401.01879), whatever the reward: :attr:`kl`.
    """

    def __init__(self, judge: Judge, many: int) -> None:
        self._judge, self._many = judge, many

    @property
    def kl(self) -> float:
        """The bound, in nats per response."""
        return kl_bound(self._many)

    def keep(
        self, rows: Sequence[Comparison], prompts: Sequence[Ids], found: Sequence[Sequence[Sample]]
    ) -> list[tuple[list[Sample], list[float]]]:
        """What is kept for every prompt, with its scores: one of every ``many`` samples in turn.

        Raises :class:`prefopt.errors.RunError` where the reward fails.
        """
        groups = [group_of(prompt, samples) for prompt, samples in zip(prompts, found, strict=True)]
        scores = iter(self._judge(rows, groups, TOKENS))
        kept = []
        for samples in found:
            score_kN = np.array([next(scores) for _ in samples]).reshape(-1, self._many)
            best_k = score_kN.argmax(axis=1)
            chosen = [samples[k * self._many + int(n)] for k, n in enumerate(best_k)]
            kept.append((chosen, score_kN.max(axis=1).tolist()))
        return kept


def kl_bound(many: int) -> float:
    """What the divergence of the best of ``many`` samples from the model is at most, in nats: see :class:`BestOf`."""
    return math.log(many) - (many - 1) / many
