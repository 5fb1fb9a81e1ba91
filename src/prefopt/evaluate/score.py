"""Numbers for responses: rows in any layout in, the same rows with scores out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefopt.config.score import IMPLICIT, ScoreConfig
from prefopt.data.formats import open_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.problem import Problem, refuse
from prefopt.data.sources import find_sources
from prefopt.disk.write import output_errors
from prefopt.errors import DataError, RunError
from prefopt.interval import Interval, rate_interval
from prefopt.records import Comparison, tiers_of
from prefopt.rewards import Reward, load_reward, prompt_text

if TYPE_CHECKING:
    from prefopt.evaluate.model_scores import ModelScores

BATCH = 256
"""Rows that a reward is given at once."""

Scores = Callable[[Sequence[Comparison]], list[tuple[float, ...]]]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """``mean`` and ``spread`` (standard deviation) are over all responses.

    ``agreement``: the part of a row's pairs that the scores order as the row did (a tie counts half), the mean over the
    prompts of rows that had preferences, with its interval; none where no row had any. ``truncated`` rows were too long
    for a model.
    """

    output: Path
    rows: int
    responses: int
    mean: float
    spread: float
    agreement: Interval | None
    truncated: int = 0

    def lines(self) -> list[str]:
        """What a person is told."""
        said = [f"{self.responses} responses of {self.rows} rows: mean {self.mean:.3f}, spread {self.spread:.3f}"]
        if self.truncated:
            said.append(f"{self.truncated} of {self.rows} rows truncated to what the model takes")
        if self.agreement is not None:
            a = self.agreement
            said.append(
                f"the scores order {a.mean:.1%} of the pairs as the rows do"
                f" (95 % interval {a.low:.1%} to {a.high:.1%}, {a.count} prompts)"
            )
        return [*said, f"written: {self.output}"]


def run(config: ScoreConfig) -> ScoreResult:
    """Score what ``config`` names. Raises :class:`prefopt.errors.UserError`; the output appears whole or not at all."""
    path = Path(config.output)
    if path.exists() and not config.overwrite:
        raise RunError(f"--output {path} is there already; name another file, or add --overwrite")
    scores_of, models = scores_for(config)
    values: list[float] = []
    agreements: dict[bytes, list[float]] = {}
    rows = 0
    aside = path.with_name(f".{path.name}.aside")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8") as file:
                for before, scores in scored(_rows(config), scores_of):
                    after = replace(before, scores=scores, tiers=tiers_of(scores), labels=None, votes=None)
                    file.write(json.dumps(LAYOUTS["canonical"].write(after), ensure_ascii=False) + "\n")
                    rows += 1
                    values += scores
                    if before.pairs:
                        agreements.setdefault(before.prompt_key, []).append(agreement(before.pairs, scores))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    interval = rate_interval([np.mean(of_prompt) for of_prompt in agreements.values()]) if agreements else None
    spread, truncated = float(np.std(values)), models.truncated if models else 0
    return ScoreResult(path, rows, len(values), float(np.mean(values)), spread, interval, truncated)


def scores_for(config: ScoreConfig) -> tuple[Scores, ModelScores | None]:
    """What gives the numbers, and that again where it is a model."""
    if not config.by_model:
        return by_text(load_reward(config.reward)), None
    from prefopt.evaluate.model_scores import implicit_scores, reward_model_scores

    models = implicit_scores(config) if config.reward == IMPLICIT else reward_model_scores(config)
    return models, models


def by_text(reward: Reward) -> Scores:
    """A function of texts as one of rows."""

    def scores(rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        prompts = [prompt_text(c) for c in rows for _ in c.responses]
        numbers = iter(reward(prompts, [r.text for c in rows for r in c.responses]))
        return [tuple(islice(numbers, len(c.responses))) for c in rows]

    return scores


def scored(rows: Iterable[Comparison], scores_of: Scores) -> Iterator[tuple[Comparison, tuple[float, ...]]]:
    """Each row with one score [K] for each of its responses, in order; what gives them sees many rows at once."""
    given = iter(rows)
    while batch := list(islice(given, BATCH)):
        yield from zip(batch, scores_of(batch), strict=True)


def agreement(pairs: Sequence[tuple[int, int]], scores: Sequence[float]) -> float:
    """The part of (preferred, dispreferred) pairs that scores order likewise; equal scores count half."""
    return float(np.mean([0.5 + 0.5 * np.sign(scores[best] - scores[worse]) for best, worse in pairs]))


def _rows(config: ScoreConfig) -> Iterator[Comparison]:
    for source in find_sources(config.files):
        reading = open_comparisons(source, format=config.format, columns=config.column_words)
        problems: list[Problem] = []
        for row in reading:
            if isinstance(row, Problem):
                problems.append(row)
            elif not row.responses:
                raise DataError("has no response to score; prefopt sample draws some", file=row.file, row=row.row)
            else:
                yield row
        if problems:
            raise refuse(problems, reading.count)
