"""A task of multiple-choice questions, answered by log-probability: no sampling, and no other program.

>>> best_first([-4.0, -2.0, -9.0], [2, 2, 3], {1})
1.0
>>> best_first([-4.0, -4.0], [2, 2], {0})
0.5
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from prefopt.data.load import load_groups
from prefopt.data.validate import refuse
from prefopt.errors import DataError
from prefopt.evaluate.score import response_logprobs
from prefopt.generate.model_io import SampledModel

TOKEN_BUDGET = 8192
MAX_LENGTH = 4096
"""Of models that name no context."""


class ChoiceTask:
    """Questions with answers of which some are right: rows of preferences in any layout of prefopt, whose best tier is
    right and all others wrong. The model's answer is the one with the highest log-probability per token (``acc_norm``
    of lm-eval, per token instead of per byte). ``words`` describes the task, with the accuracy of chance."""

    def __init__(self, names: Sequence[str], tokenizer: Any, context: int | None) -> None:
        """Raises :class:`DataError` for a row that cannot be read, that has no wrong answer, or that does not fit into
        the model's context: a part of a task is another task."""
        limit = context or MAX_LENGTH
        found = load_groups(names, tokenizer, max_length=limit, kind="ranking", on_bad_row="refuse")
        if found.problems:  # rows of ties alone, which a run leaves out
            raise refuse(found.problems, found.read)
        if found.truncated:
            what = f"--task: {found.truncated} of {found.read} rows are longer than the model's {limit} tokens"
            raise DataError(f"{what}: leave them out")
        self._groups = [found.groups[i] for i in range(len(found.groups))]
        self._tokens_N = found.groups.trained_N
        sizes = [len(group.continuations) for group in self._groups]
        self._ends = np.cumsum(sizes)[:-1]
        chance = float(np.mean([len(group.tiers[0]) / size for group, size in zip(self._groups, sizes, strict=True)]))
        self.words = f"{len(sizes):,} questions, of which chance answers {chance:.1%}"

    def __call__(self, policy: SampledModel) -> tuple[float, ...]:
        """Whether each question is answered right: 1, 0, or between where answers tie."""
        logp_N = response_logprobs(policy.scorer, self._groups, TOKEN_BUDGET)
        logps, tokens = np.split(logp_N, self._ends), np.split(self._tokens_N, self._ends)
        answers = zip(logps, tokens, self._groups, strict=True)
        return tuple(best_first(x.tolist(), n.tolist(), set(group.tiers[0])) for x, n, group in answers)


def best_first(logps: Sequence[float], tokens: Sequence[int], right: Collection[int]) -> float:
    """The fraction of right answers among those with the highest log-probability per token."""
    each = np.asarray(logps, np.float64) / np.asarray(tokens, np.float64)
    best = np.flatnonzero(each == each.max())
    return float(np.mean([k in right for k in best.tolist()]))
