"""Numbers for responses: rows in any layout in, the same rows with scores out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from prefopt.config.score import ScoreConfig
from prefopt.data.formats import open_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.problem import Problem, refuse
from prefopt.data.sources import find_sources
from prefopt.disk.write import output_errors
from prefopt.errors import DataError, RunError
from prefopt.interval import Interval, mean_interval
from prefopt.records import Comparison, tiers_of
from prefopt.rewards import Reward, load_reward

BATCH = 256
"""Rows that a reward is given at once."""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """``mean`` and ``spread`` (standard deviation) are over all responses.

    ``agreement``: the part of a row's pairs that the scores order as the row did (a tie counts half), over rows that
    had preferences; the interval resamples rows, and there is none for fewer than two.
    """

    output: Path
    rows: int
    responses: int
    mean: float
    spread: float
    agreement: Interval | None

    def lines(self) -> list[str]:
        """What a person is told."""
        said = [f"{self.responses} responses of {self.rows} rows: mean {self.mean:.3f}, spread {self.spread:.3f}"]
        if self.agreement is not None:
            a = self.agreement
            said.append(
                f"the scores order {a.mean:.1%} of the pairs as the rows do"
                f" (95 % interval {a.low:.1%} to {a.high:.1%}, {a.count} rows)"
            )
        return [*said, f"written: {self.output}"]


def run(config: ScoreConfig) -> ScoreResult:
    """Score what ``config`` names. Raises :class:`prefopt.errors.UserError`; the output appears whole or not at all."""
    reward, path = load_reward(config.reward), Path(config.output)
    if path.exists() and not config.overwrite:
        raise RunError(f"--output {path} is there already; name another file, or add --overwrite")
    values: list[float] = []
    agreements: list[float] = []
    rows = 0
    aside = path.with_name(f".{path.name}.aside")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8") as file:
                for before, scores in scored(_rows(config), reward):
                    after = replace(before, scores=scores, tiers=tiers_of(scores), labels=None, votes=None)
                    file.write(json.dumps(LAYOUTS["canonical"].write(after), ensure_ascii=False) + "\n")
                    rows += 1
                    values += scores
                    if before.pairs:
                        agreements.append(agreement(before.pairs, scores))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    interval = mean_interval(agreements) if len(agreements) > 1 else None
    return ScoreResult(path, rows, len(values), float(np.mean(values)), float(np.std(values)), interval)


def scored(rows: Iterable[Comparison], reward: Reward) -> Iterator[tuple[Comparison, tuple[float, ...]]]:
    """Each row with one score [K] for each of its responses, in order; the reward sees many rows at once."""
    given = iter(rows)
    while batch := list(islice(given, BATCH)):
        prompts = [prompt_text(c) for c in batch for _ in c.responses]
        numbers = iter(reward(prompts, [r.text for c in batch for r in c.responses]))
        for c in batch:
            yield c, tuple(islice(numbers, len(c.responses)))


def prompt_text(c: Comparison) -> str:
    """The prompt as a reward is given it: text as it stands; of a conversation a line ``role: words`` for each turn."""
    if c.text:
        return "".join(m.content for m in c.prompt)
    return "\n".join(f"{m.role}: {m.content}" for m in c.prompt)


def agreement(pairs: Sequence[tuple[int, int]], scores: Sequence[float]) -> float:
    """The part of (preferred, dispreferred) pairs that scores order likewise; equal scores count half."""
    return float(np.mean([0.5 + 0.5 * np.sign(scores[best] - scores[worse]) for best, worse in pairs]))


def _rows(config: ScoreConfig) -> Iterator[Comparison]:
    for source in find_sources(config.files):
        reading = open_comparisons(source, format=config.format, columns=config.columns)
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
