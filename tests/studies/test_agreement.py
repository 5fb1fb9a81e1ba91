"""Agreement figures against published worked examples, and against packages that others wrote."""

from __future__ import annotations

import math
import random
import warnings
from itertools import combinations

import krippendorff
import numpy as np
import pytest

from prefopt.studies.summary import Metric, alpha_interval, kappa, raw_agreement, share_of

# K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): examples A, B and C.
BINARY = ["0100000010", "1110010000"]
NOMINAL = ["aabbdcccedda", "babbbccceddd"]
MISSING = ["123321412...", "1233224125.3", ".3332342251.", "1233244125 1.".replace(" ", "")]


def units_of(raters: list[str]) -> list[dict[int, int]]:
    return [
        {rater: ord(values[u]) for rater, values in enumerate(raters) if values[u] != "."}
        for u in range(len(raters[0]))
    ]


def test_alpha_equals_the_examples_of_its_author() -> None:
    assert alpha(units_of(BINARY)) == pytest.approx(0.095, abs=5e-4)
    assert alpha(units_of(NOMINAL)) == pytest.approx(0.692, abs=5e-4)
    assert alpha(units_of(MISSING)) == pytest.approx(0.743, abs=5e-4)
    assert alpha(units_of(MISSING), "ordinal") == pytest.approx(0.815, abs=5e-4)


def test_kappa_equals_published_examples() -> None:
    # J. L. Fleiss, B. Levin, M. C. Paik, Statistical Methods for Rates and Proportions (2003), table 18.1: 0.676.
    table = [[75, 1, 4], [5, 4, 1], [0, 0, 10]]
    pairs = [(i, k) for i, row in enumerate(table) for k, count in enumerate(row) for _ in range(count)]
    assert kappa(pairs) == pytest.approx(0.676, abs=5e-4)
    assert kappa([(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15) == pytest.approx(0.4)


def alpha(units: list[dict[int, int]], metric: Metric = "nominal") -> float:
    return alpha_interval(units, metric, resamples=1).value


def some_units(seed: int, values: int) -> list[dict[int, int]]:
    draw = random.Random(seed)
    units = []
    for _ in range(60):
        truth = draw.randrange(values)
        raters = draw.sample(range(5), draw.randint(1, 5))
        units.append({r: truth if draw.random() < 0.7 else draw.randrange(values) for r in raters})
    return units


@pytest.mark.parametrize("seed", range(8))
def test_alpha_equals_an_independent_package(seed: int) -> None:
    units = some_units(seed, 2 + seed)
    data = np.full((5, len(units)), np.nan)
    for u, unit in enumerate(units):
        for rater, value in unit.items():
            data[rater, u] = value
    for metric in ("nominal", "ordinal"):
        theirs = krippendorff.alpha(reliability_data=data, level_of_measurement=metric)
        assert alpha(units, metric) == pytest.approx(theirs, abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_kappa_and_raw_agreement_equal_an_independent_package(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        from nltk.metrics.agreement import AnnotationTask
    units = some_units(seed, 3)
    for a, b in combinations(range(5), 2):
        both = [u for u in range(len(units)) if {a, b} <= units[u].keys()]
        triples = [(f"r{r}", f"u{u}", units[u][r]) for u in both for r in (a, b)]
        task = AnnotationTask(triples)
        assert kappa([(units[u][a], units[u][b]) for u in both]) == pytest.approx(task.kappa_pairwise(f"r{a}", f"r{b}"))
        assert raw_agreement([{r: units[u][r] for r in (a, b)} for u in both]) == pytest.approx(task.avg_Ao())


def test_nothing_is_told_from_nothing() -> None:
    assert all(math.isnan(x) for x in (alpha([]), alpha([{1: 1}]), alpha([{1: 1, 2: 1}]), kappa([]), kappa([(1, 1)])))
    assert math.isnan(raw_agreement([{1: 1}])) and math.isnan(share_of(math.nan, 0).low)
    assert math.isnan(alpha_interval([]).value)


def test_the_interval_covers_as_it_says() -> None:
    """Raters who agree with probability 0.8 beyond chance: the interval holds the alpha of very many units."""
    draw = np.random.default_rng(0)

    def units(count: int) -> list[dict[int, int]]:
        truth, own = draw.integers(0, 2, count), draw.integers(0, 2, (3, count))
        says = np.where(draw.random((3, count)) < 0.8, truth, own)
        return [{r: int(says[r, u]) for r in range(3)} for u in range(count)]

    value = alpha(units(200_000))
    found = [alpha_interval(units(100), resamples=400, seed=n) for n in range(200)]
    assert 0.90 <= np.mean([e.low <= value <= e.high for e in found]) <= 0.99


def test_clusters_are_drawn_together() -> None:
    """Units repeated ten times within their cluster tell no more than they did once."""
    once = some_units(3, 3)
    many = [unit for unit in once for _ in range(10)]
    names = [n for n in range(len(once)) for _ in range(10)]
    plain, clustered = alpha_interval(once), alpha_interval(many, clusters=names)
    assert clustered.high - clustered.low == pytest.approx(plain.high - plain.low, rel=0.1)
    blind = alpha_interval(many)
    assert blind.high - blind.low < (plain.high - plain.low) / 2


def test_wilson_is_the_published_interval() -> None:
    # E. B. Wilson's score interval for 15 of 20 and 0 of 10, as tables give it.
    found = share_of(0.75, 20)
    assert (found.low, found.high) == pytest.approx((0.5313, 0.8881), abs=5e-4)
    assert share_of(0.0, 10).low == 0 and share_of(0.0, 10).high == pytest.approx(0.2775, abs=5e-4)
