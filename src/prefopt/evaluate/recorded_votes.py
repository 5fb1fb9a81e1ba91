"""Votes of people that name the models of the responses: files of ``prefopt chat`` and studies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from prefopt.data.comparisons import parse_comparisons
from prefopt.errors import DataError
from prefopt.evaluate.score import read_rows
from prefopt.records import Comparison
from prefopt.studies.export import ExportOptions, export_rows
from prefopt.studies.study import Study, is_study


@dataclass(frozen=True, slots=True)
class RecordedVote:
    """One comparison of two ``models`` on the prompt with this key. ``outcome`` is 1 where the first won, 1/2 for a
    tie; ``longer``: characters of the first response less those of the second."""

    models: tuple[str, str]
    prompt: bytes
    outcome: float
    longer: int

    def swapped(self) -> RecordedVote:
        """The same vote with the second model first."""
        return RecordedVote(self.models[::-1], self.prompt, 1 - self.outcome, -self.longer)


def recorded_votes(
    names: Sequence[str], *, format: str | None = None, columns: Sequence[str] | None = None
) -> list[RecordedVote]:
    """A vote for every pair of responses of different models that a row judges.

    Raises :class:`DataError` for rows that do not name their models, and where no row compares two models.
    """
    votes = [vote for row in _rows(names, format, columns) for vote in _votes(row)]
    if not votes:
        raise DataError(f"{', '.join(names)}: no row compares responses of two models")
    return votes


def _rows(names: Sequence[str], format: str | None, columns: Sequence[str] | None) -> Iterator[Comparison]:
    studies = [name for name in names if is_study(Path(name))]
    for name in studies:
        with Study(Path(name), read_only=True) as study:
            exported = export_rows(study, ExportOptions(provenance=True))
        yield from parse_comparisons(exported.rows, name).comparisons
    if files := [name for name in names if name not in studies]:
        yield from read_rows(files, format=format, columns=columns)


def _votes(row: Comparison) -> Iterator[RecordedVote]:
    models = row.extra.get("models")
    named = isinstance(models, list) and all(isinstance(model, str) and model for model in models)
    if not named or not isinstance(models, list) or len(models) != len(row.responses):
        raise DataError(
            "does not name the model of each response in a column models, as votes of prefopt chat and of studies do",
            file=row.file or None,
            row=row.row,
        )
    for i, k in combinations(range(len(models)), 2):
        first, second = (len(row.responses[j].text) for j in (i, k))
        for outcome in _outcomes(row, i, k):
            if models[i] != models[k] and not math.isnan(outcome):
                yield RecordedVote((models[i], models[k]), row.prompt_key, outcome, first - second)


def _outcomes(row: Comparison, i: int, k: int) -> list[float]:
    """An outcome per annotator for a row of a study; else the one of the row's weighted votes or tiers."""
    annotations: Any = row.extra.get("annotations")
    numbers: Any = row.extra.get("numbers")
    if isinstance(annotations, list) and isinstance(numbers, list):
        return [tier_outcome(vote.get("tiers") or (), numbers[i], numbers[k]) for vote in annotations]
    if row.votes is None:
        return [tier_outcome(row.tiers, i, k)]
    won = sum(weight for a, b, weight in row.votes if (a, b) == (i, k))
    lost = sum(weight for a, b, weight in row.votes if (a, b) == (k, i))
    return [won / (won + lost) if won + lost else math.nan]


def tier_outcome(tiers: Iterable[Iterable[int]], i: int = 0, k: int = 1) -> float:
    """1 where tiers rank response ``i`` above ``k``, 1/2 for the same tier, 0 below; NaN where one is not ranked."""
    rank = {response: n for n, tier in enumerate(tiers) for response in tier}
    if i not in rank or k not in rank:
        return math.nan
    return 0.5 if rank[i] == rank[k] else float(rank[i] < rank[k])
