"""What people said already: rows that name the models of their responses, from prefopt chat or a study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from prefopt.data.comparisons import open_comparisons, parse_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.validate import Problem, refuse
from prefopt.errors import DataError
from prefopt.records import Comparison
from prefopt.studies.export import ExportOptions, export_rows
from prefopt.studies.study import Study, is_study


@dataclass(frozen=True, slots=True)
class Recorded:
    """One comparison: two models, ``outcome`` for the first (see ``judges.judge.outcome``), of one prompt.

    ``longer``: characters that the first response has more than the second.
    """

    models: tuple[str, str]
    prompt: bytes
    outcome: float
    longer: int


def recorded(
    names: Sequence[str], *, format: str | None = None, columns: Sequence[str] | None = None
) -> list[Recorded]:
    """Every pair of responses of different models that a row judges.

    Raises :class:`DataError` for rows that do not name their models, and where no two models were compared.
    """
    found = [one for row in _rows(names, format, columns) for one in _pairs(row)]
    if not found:
        raise DataError(f"{', '.join(names)}: no row compares responses of two models")
    return found


def _rows(names: Sequence[str], format: str | None, columns: Sequence[str] | None) -> Iterator[Comparison]:
    studies = [Path(name) for name in names if is_study(Path(name))]
    for path in studies:
        with Study(path, read_only=True) as study:
            exported = export_rows(study, ExportOptions(provenance=True))
        yield from (row for row in parse_comparisons(exported.rows, str(path)) if isinstance(row, Comparison))
    files = [name for name in names if Path(name) not in studies]
    for source in find_sources(files) if files else ():
        reading = open_comparisons(source, format=format, columns=columns)
        problems: list[Problem] = []
        for row in reading:
            if isinstance(row, Problem):
                problems.append(row)
            else:
                yield row
        if problems:
            raise refuse(problems, reading.count)


def _pairs(row: Comparison) -> Iterator[Recorded]:
    models = row.extra.get("models")
    if not isinstance(models, list) or len(models) != len(row.responses) or not all(map(_named, models)):
        raise DataError(
            "does not name the model of each response in a column models, as votes of prefopt chat and of studies do",
            file=row.file or None,
            row=row.row,
        )
    for i, k in combinations(range(len(models)), 2):
        first, second = (len(row.responses[j].text) for j in (i, k))
        for said in _outcomes(row, i, k):
            if models[i] != models[k] and not math.isnan(said):
                yield Recorded((models[i], models[k]), row.prompt_key, said, first - second)


def _outcomes(row: Comparison, i: int, k: int) -> list[float]:
    """Of a study's row one for each person who voted; else the one that the row gives."""
    said: Any = row.extra.get("annotations")
    numbers: Any = row.extra.get("numbers")
    if not isinstance(said, list) or not isinstance(numbers, list):
        return [_outcome(row, i, k)]
    return [_by_tiers(vote.get("tiers") or (), numbers[i], numbers[k]) for vote in said]


def _outcome(row: Comparison, i: int, k: int) -> float:
    if row.votes is not None:
        won = sum(w for a, b, w in row.votes if (a, b) == (i, k))
        lost = sum(w for a, b, w in row.votes if (a, b) == (k, i))
        return won / (won + lost) if won + lost else math.nan
    return _by_tiers(row.tiers, i, k)


def _by_tiers(tiers: Iterable[Iterable[int]], i: int, k: int) -> float:
    place = {r: t for t, tier in enumerate(tiers) for r in tier}
    if i not in place or k not in place:
        return math.nan
    return 0.5 if place[i] == place[k] else float(place[i] < place[k])


def _named(model: object) -> bool:
    return isinstance(model, str) and bool(model)
