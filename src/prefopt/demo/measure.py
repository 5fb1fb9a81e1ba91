"""Comparison of two models that continued the same openings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.statistics import Interval, mean_interval
from prefopt.data.comparisons import read_comparisons
from prefopt.evaluate.samples import kl_to_reference
from prefopt.generate.model_io import SampledModel
from prefopt.records import Comparison

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """An opening with a scored continuation of each model."""

    opening: str
    before: str
    after: str
    before_score: float
    after_score: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Averages over samples, with intervals over openings. ``change`` is that of the score, paired by opening.

    ``kl``: KL(aligned || model) of whole continuations in nats, estimated on samples of the aligned model (k1).
    ``tokens``: average length before and after. ``variety``: distinct word trigrams as a fraction of all, before and
    after; a model that repeats itself has little.
    """

    before: Interval
    after: Interval
    change: Interval
    kl: Interval
    tokens: tuple[float, float]
    variety: tuple[float, float]
    examples: tuple[Example, ...]


def measure(before: Path, after: Path, *, reference: Path, seed: int) -> DemoResult:
    """Compare two files of scored samples of the same prompts in the same order."""
    one, two = _rows(before), _rows(after)
    assert [r["prompt"] for r in one] == [r["prompt"] for r in two]
    scores = [np.array([np.mean(r["scores"]) for r in rows]) for rows in (one, two)]
    lengths = [float(np.mean([r["tokens"] for r in rows])) for rows in (one, two)]
    sampled = [row for row in read_comparisons(after) if isinstance(row, Comparison)]
    gap = kl_to_reference(sampled, SampledModel(str(reference), device="cpu", dtype="float32"))
    assert gap is not None, "there are several openings"
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(one), 3, replace=False)
    return DemoResult(
        mean_interval(scores[0]),
        mean_interval(scores[1]),
        mean_interval(scores[1] - scores[0]),
        gap.k1,
        (lengths[0], lengths[1]),
        (_variety(one), _variety(two)),
        tuple(_example(one[i], two[i]) for i in chosen),
    )


def _rows(path: Path) -> list[Row]:
    # Not splitlines(): texts may hold characters that it takes for ends of lines.
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def _variety(rows: list[Row]) -> float:
    words = [text.split() for row in rows for text in row["responses"]]
    triples = [triple for w in words for triple in zip(w, w[1:], w[2:], strict=False)]
    return len(set(triples)) / max(1, len(triples))


def _example(one: Row, two: Row) -> Example:
    """The first sample of each, not the best."""
    return Example(one["prompt"], one["responses"][0], two["responses"][0], one["scores"][0], two["scores"][0])
