"""Rows of one prompt that follow each other, as one comparison: how HelpSteer keeps its responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from prefopt.data.problem import Problem
from prefopt.records import Comparison, tiers_of

# Nobody rates more responses to one prompt; more rows of one prompt are begun anew, so that memory has a bound.
MOST = 64


def joined(rows: Iterable[Comparison | Problem]) -> Iterator[Comparison | Problem]:
    """Comparisons with all responses of consecutive rows of one prompt, each under the number of its first row."""
    held: list[Comparison] = []
    for row in rows:
        same = isinstance(row, Comparison) and held and row.prompt == held[0].prompt and len(held) < MOST
        if held and not same:
            yield _one(held)
            held = []
        if isinstance(row, Comparison):
            held.append(row)
        else:
            yield row
    if held:
        yield _one(held)


def _one(rows: list[Comparison]) -> Comparison:
    first = rows[0]
    if len(rows) == 1:
        return first
    scores = tuple(score for row in rows for score in row.scores or ())
    responses = tuple(response for row in rows for response in row.responses)
    extra: dict[str, object] = {name: [row.extra.get(name) for row in rows] for name in first.extra}
    return replace(first, responses=responses, scores=scores, tiers=tiers_of(scores), extra=extra)
