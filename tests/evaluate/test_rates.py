"""Rates and tests against scipy, and against what simulated experiments show."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prefopt.evaluate.rates import FEWEST, at_equal_length, sign_test, win_rate
from prefopt.evaluate.strengths import Games, fitted, strengths
from prefopt.interval import mean_interval

optimize = pytest.importorskip("scipy.optimize")
stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("split", [(0, 1), (3, 3), (9, 1), (17, 40), (812, 700), (0, 300)])
def test_the_sign_test_is_scipys_binomial(split: tuple[int, int]) -> None:
    assert sign_test(*split) == pytest.approx(stats.binomtest(split[0], sum(split)).pvalue, rel=1e-10)


def experiment(rng: np.random.Generator, prompts: int, samples: int, slope: float = 0.0) -> tuple[np.ndarray, ...]:
    """Outcomes with ties of prompts that lean to one side or the other, and differences of length."""
    lean = rng.normal(0.4, 1.0, (prompts, 1))
    longer = rng.normal(30, 50, (prompts, samples))
    chance = 1 / (1 + np.exp(-(lean + slope * longer / 50)))
    u = rng.random((prompts, samples))
    return np.where(u < 0.8 * chance, 1.0, np.where(u < 0.8 * chance + 0.2, 0.5, 0.0)), longer


@pytest.mark.slow
def test_intervals_of_win_rates_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    truth = experiment(rng, 400_000, 1)[0].mean()
    found = [win_rate(experiment(rng, 100, 2)[0], seed=i).rate for i in range(1000)]
    held = [f is not None and not f.excludes(truth) for f in found]
    assert abs(np.mean(held) - 0.95) < 0.02


@pytest.mark.slow
def test_intervals_at_equal_length_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    outcomes, longer = experiment(rng, 400_000, 1, slope=0.8)
    truth = at_equal_length(outcomes, longer)
    assert truth is not None and abs(truth.rate.mean - outcomes.mean()) > 0.03, "length matters here"
    held = []
    for _ in range(1000):
        found = at_equal_length(*experiment(rng, 150, 2, slope=0.8))
        assert found is not None
        held.append(not found.rate.excludes(truth.rate.mean))
    assert abs(np.mean(held) - 0.95) < 0.02


def test_the_regression_on_length_is_scipys() -> None:
    outcomes, longer = experiment(np.random.default_rng(2), 60, 3, slope=1.0)
    outcomes[3, 1] = np.nan
    found = at_equal_length(outcomes, longer)
    y, d = outcomes[~np.isnan(outcomes)], longer[~np.isnan(outcomes)]
    d = d / np.sqrt((d**2).mean())

    def loss(v: np.ndarray) -> float:
        z = v[0] + v[1] * d
        return float((np.logaddexp(0, z) - y * z).sum() + 0.5e-2 * v[1] ** 2 + 0.5e-6 * v[0] ** 2)

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    assert found is not None
    assert found.rate.mean == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-6)
    assert found.slope.mean == pytest.approx(best[1], abs=1e-5)


def test_where_length_decides_the_rate_at_equal_length_knows_nothing() -> None:
    longer = np.random.default_rng(3).normal(40, 30, (50, 1))
    outcomes = (longer > 0).astype(float)
    found = at_equal_length(outcomes, longer)
    assert found is not None and not found.rate.excludes(0.5) and not found.slope.low < 0
    assert win_rate(outcomes).rate.excludes(0.5)  # type: ignore[union-attr]
    assert at_equal_length(outcomes, np.zeros((50, 1))) is None


def test_counts_ties_and_what_was_not_said() -> None:
    outcomes = np.array([[1.0, 0.5], [np.nan, 0.0], [np.nan, np.nan]] * 6)
    found = win_rate(outcomes)
    assert (found.wins, found.ties, found.losses, found.undecided, found.prompts) == (6, 6, 6, 18, 12)
    assert found.rate is not None and found.rate.mean == pytest.approx((0.75 + 0) / 2)
    assert found.p == 1.0


def test_few_prompts_give_counts_and_no_rate() -> None:
    few = win_rate(np.ones((FEWEST - 1, 50)))
    assert (few.rate, few.p, few.needed, few.wins) == (None, None, None, 450)
    assert at_equal_length(np.ones((FEWEST - 1, 2)), np.ones((FEWEST - 1, 2))) is None


def test_all_alike_is_not_all_certain() -> None:
    found = win_rate(np.ones((20, 1)))
    assert found.rate is not None and (found.rate.mean, found.rate.high) == (1.0, 1.0)
    assert 0.8 < found.rate.low < 0.9
    level = win_rate(np.full((20, 1), 0.5)).rate
    assert level is not None and 0.25 < level.low < 0.5 < level.high < 0.75


def test_the_prompts_needed_find_the_difference_in_eight_of_ten_experiments() -> None:
    """Six wins of ten: by the normal, (1.96 + 0.84)^2 * 0.24 / 0.1^2."""
    needed = win_rate(np.repeat([1.0, 0.0], [600, 400])[:, None]).needed
    assert needed == 189
    rng = np.random.default_rng(4)
    drawn = (rng.random((600, needed)) < 0.6).astype(float)
    found = [mean_interval(x, resamples=500, seed=i).excludes(0.5) for i, x in enumerate(drawn)]
    assert abs(np.mean(found) - 0.8) < 0.05


PLANTED = np.array([1.0, 0.3, -0.2, -1.1])


def tournament(rng: np.random.Generator, prompts: int) -> Games:
    rows = []
    for prompt, (i, j) in itertools.product(range(prompts), itertools.combinations(range(4), 2)):
        won = rng.random() < 1 / (1 + np.exp(PLANTED[j] - PLANTED[i]))
        rows.append((i, j, prompt, float(won)))
    return Games.of(rows)


def test_bradley_terry_recovers_planted_strengths_and_is_the_maximum() -> None:
    games = tournament(np.random.default_rng(5), 3000)
    found = fitted(games.wins(4).sum(0))
    np.testing.assert_allclose(found, PLANTED, atol=0.1)

    def loss(v: np.ndarray) -> float:
        z = v[games.first] - v[games.second]
        return float((np.logaddexp(0, z) - games.outcome * z).sum() + 0.5e-3 * (v**2).sum())

    best = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose(found, best - best.mean(), atol=1e-4)


@pytest.mark.slow
def test_intervals_of_strengths_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(6)
    held = []
    for i in range(1000):
        found = strengths(tournament(rng, 100), 4, resamples=200, seed=i)
        held.append([not f.excludes(t) for f, t in zip(found, PLANTED, strict=True)])
    assert abs(np.mean(held) - 0.95) < 0.02


def test_a_model_that_never_lost_has_a_strength_and_ties_are_half_wins() -> None:
    found = fitted(Games.of([(0, 1, k, 1.0) for k in range(20)]).wins(2).sum(0))
    assert np.isfinite(found).all() and found[0] > 2
    assert fitted(Games.of([(0, 1, k, 0.5) for k in range(20)]).wins(2).sum(0)) == pytest.approx([0, 0], abs=1e-12)
