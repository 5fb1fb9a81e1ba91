"""What people said already: rows that name the models of their responses, from prefopt chat or a study."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from prefopt.data.formats import open_comparisons
from prefopt.data.problem import Problem, refuse
from prefopt.data.sources import find_sources
from prefopt.errors import DataError
from prefopt.records import Comparison


@dataclass(frozen=True, slots=True)
class Recorded:
    """One comparison: two models, ``outcome`` for the first (see ``judges.judge.outcome``), of one prompt.

    ``longer``: characters that the first response has more than the second.
    """

    models: tuple[str, str]
    prompt: bytes
    outcome: float
    longer: int
    row: Comparison


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
    for source in find_sources(names):
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
        said = _outcome(row, i, k)
        if models[i] != models[k] and not math.isnan(said):
            first, second = (len(row.responses[j].text) for j in (i, k))
            yield Recorded((models[i], models[k]), row.prompt_key, said, first - second, row)


def _outcome(row: Comparison, i: int, k: int) -> float:
    if row.votes is not None:
        won = sum(w for a, b, w in row.votes if (a, b) == (i, k))
        lost = sum(w for a, b, w in row.votes if (a, b) == (k, i))
        return won / (won + lost) if won + lost else math.nan
    place = {r: t for t, tier in enumerate(row.tiers) for r in tier}
    if i not in place or k not in place:
        return math.nan
    return 0.5 if place[i] == place[k] else float(place[i] < place[k])


def _named(model: object) -> bool:
    return isinstance(model, str) and bool(model)
