"""Rates and tests against scipy, and against what simulated experiments show."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize, stats

from prefopt.core.statistics import MIN_PROMPTS, mean_interval
from prefopt.evaluate.win_rate import (
    LengthControlled,
    bradley_terry,
    connected_groups,
    fit_strengths,
    length_controlled,
    sign_test,
    win_counts,
    win_rate,
)


def test_the_sign_test_is_the_exact_binomial_test() -> None:
    for split in ((0, 1), (3, 3), (9, 1), (17, 40), (812, 700), (0, 300)):
        assert sign_test(*split) == pytest.approx(stats.binomtest(split[0], sum(split)).pvalue, rel=1e-10)
    assert sign_test(0, 0) == 1.0


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
    found = [win_rate(experiment(rng, 100, 2)[0]).rate for _ in range(1000)]
    held = [f is not None and not f.excludes(truth) for f in found]
    assert abs(np.mean(held) - 0.95) < 0.02


def outcomes(wins: int, ties: int, losses: int) -> np.ndarray:
    return np.repeat([1.0, 0.5, 0.0], [wins, ties, losses])[:, None]


@pytest.mark.parametrize("counts", [(2, 98, 0), (4, 96, 0), (99, 0, 1), (60, 0, 40), (35, 50, 15), (52, 0, 48)])
def test_better_is_said_where_interval_and_sign_test_agree(counts: tuple[int, int, int]) -> None:
    found, turned = win_rate(outcomes(*counts)), win_rate(outcomes(*counts[::-1]))
    assert found.rate is not None and found.p is not None and turned.rate is not None
    assert found.verdict == ("better" if found.rate.low > 0.5 and found.p < 0.05 else "not shown")
    assert turned.verdict == {"better": "worse", "not shown": "not shown"}[found.verdict]
    assert (turned.rate.low, turned.rate.high) == pytest.approx((1 - found.rate.high, 1 - found.rate.low))


def test_two_wins_among_ties_show_nothing() -> None:
    """The interval of what was seen leaves one half out; a sign test of two coins has p = 1/2."""
    assert win_rate(outcomes(2, 98, 0)).verdict == "not shown" and win_rate(outcomes(5, 95, 0)).p == 0.0625
    assert win_rate(outcomes(5, 95, 0)).verdict == "not shown" and win_rate(outcomes(8, 92, 0)).verdict == "better"


def test_a_mean_and_a_lean_to_different_sides_are_no_verdict() -> None:
    """Sixty prompts lean a little to the second, forty wholly to the first."""
    found = win_rate(np.repeat([[0.45], [1.0]], [130, 70], 0))
    assert found.rate is not None and found.rate.low > 0.5 and found.p is not None and found.p < 0.05
    assert found.verdict == "not shown"


@pytest.mark.slow
@pytest.mark.parametrize("decided", [0.03, 0.06, 0.3, 1.0])
def test_of_equal_models_one_is_called_better_in_at_most_one_of_twenty_experiments(decided: float) -> None:
    rng = np.random.default_rng(7)
    drawn = rng.choice([1.0, 0.5, 0.0], (1000, 100), p=[decided / 2, 1 - decided, decided / 2])
    assert np.mean([win_rate(x[:, None]).verdict != "not shown" for x in drawn]) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize(
    "design", [(100, 1, 4.0, 0.0, 0), (100, 1, 3.0, 1.0, 0), (100, 1, 0.0, 1.0, 60), (100, 4, 3.0, 1.0, 30)]
)
def test_intervals_at_equal_length_hold_it_near_1_and_away_from_zero(
    design: tuple[int, int, float, float, int],
) -> None:
    prompts, samples, lean, slope, mean = design
    rng, truth, held = np.random.default_rng(11), 1 / (1 + np.exp(-lean)), []
    for _ in range(1000):
        longer = rng.normal(mean, 40, (prompts, samples))
        found = length_controlled(
            (rng.random(longer.shape) < 1 / (1 + np.exp(-lean - slope * longer / 50))) * 1.0, longer
        )
        if found is not None and found.rate is not None:
            held.append(not found.rate.excludes(truth))
    assert len(held) > 900 and np.mean(held) >= 0.93


@pytest.mark.slow
def test_intervals_at_equal_length_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    outcomes, longer = experiment(rng, 400_000, 1, slope=0.8)
    truth = length_controlled(outcomes, longer)
    assert truth is not None and abs(truth.rate.mean - outcomes.mean()) > 0.03, "length matters here"
    held = []
    for _ in range(1000):
        found = length_controlled(*experiment(rng, 150, 2, slope=0.8))
        assert found is not None
        held.append(not found.rate.excludes(truth.rate.mean))
    assert abs(np.mean(held) - 0.95) < 0.02


def test_the_regression_on_length_is_scipys() -> None:
    outcomes, longer = experiment(np.random.default_rng(2), 60, 3, slope=1.0)
    outcomes[3, 1] = np.nan
    found = length_controlled(outcomes, longer)
    y, d = outcomes[~np.isnan(outcomes)], longer[~np.isnan(outcomes)]
    d = d / np.sqrt((d**2).mean())

    def loss(v: np.ndarray) -> float:
        z = v[0] + v[1] * d
        added = 2 * np.logaddexp(0, v[0]) - v[0]  # one more prompt won and one more lost, both of equal length
        return float((np.logaddexp(0, z) - y * z).sum() + added + 0.5e-2 * v[1] ** 2)

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    assert found is not None
    assert found.rate.mean == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-6)
    assert found.slope.mean == pytest.approx(best[1], abs=1e-5)


def test_where_length_decides_the_rate_at_equal_length_knows_nothing() -> None:
    longer = np.random.default_rng(3).normal(40, 30, (50, 1))
    outcomes = (longer > 0).astype(float)
    found = length_controlled(outcomes, longer)
    assert found is not None and not found.rate.excludes(0.5) and not found.slope.low < 0
    assert win_rate(outcomes).verdict == "better"
    assert length_controlled(outcomes, np.zeros((50, 1))) is None


def test_nothing_is_told_of_equal_length_where_one_is_always_the_longer() -> None:
    longer = np.abs(np.random.default_rng(8).normal(60, 15, (100, 1))) + 1
    for side, won in ((longer, 1.0), (-longer, 0.0), (longer, 0.0)):
        assert length_controlled(np.full((100, 1), won), side) == LengthControlled(None, None)
    longer[::20] *= -1
    found = length_controlled((longer > 0).astype(float), longer)
    assert found is not None and found.rate is not None and found.rate.high - found.rate.low > 0.4


@pytest.mark.parametrize("spread", [25, 30, 40])
def test_a_judge_of_length_alone_is_never_sure_at_equal_length(spread: float) -> None:
    """The second is hardly ever the longer one: what is told at zero is told from afar, or not at all."""
    rng = np.random.default_rng(9)
    drawn = [rng.normal(60, spread, (100, 1)) for _ in range(50)]
    found = [length_controlled((d > 0).astype(float), d) for d in drawn]
    told = [f.rate for f in found if f is not None and f.rate is not None]
    assert told and np.mean([rate.excludes(0.5) for rate in told]) <= 0.05


def test_who_wins_always_is_not_sure_beyond_what_was_seen() -> None:
    """A hundred of a hundred: by the rule of three, 97 % cannot be told from it."""
    longer = np.random.default_rng(10).normal(0, 50, (100, 1))
    found = length_controlled(np.ones((100, 1)), longer)
    assert found is not None and found.rate is not None and 0.9 < found.rate.low < 0.97 < found.rate.high <= 1


def test_counts_ties_and_what_was_not_said() -> None:
    outcomes = np.array([[1.0, 0.5], [np.nan, 0.0], [np.nan, np.nan]] * 6)
    found = win_rate(outcomes)
    assert (found.wins, found.ties, found.losses, found.undecided, found.prompts) == (6, 6, 6, 18, 12)
    assert found.rate is not None and found.rate.mean == pytest.approx((0.75 + 0) / 2)
    assert found.p == 1.0


def test_few_prompts_give_counts_and_no_rate() -> None:
    few = win_rate(np.ones((MIN_PROMPTS - 1, 50)))
    assert (few.rate, few.p, few.needed, few.wins) == (None, None, None, 450)
    assert length_controlled(np.ones((MIN_PROMPTS - 1, 2)), np.ones((MIN_PROMPTS - 1, 2))) is None


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


def tournament(rng: np.random.Generator, prompts: int) -> list[tuple[int, int, int, float]]:
    rows = []
    for prompt, (i, j) in itertools.product(range(prompts), itertools.combinations(range(4), 2)):
        won = rng.random() < 1 / (1 + np.exp(PLANTED[j] - PLANTED[i]))
        rows.append((i, j, prompt, float(won)))
    return rows


def test_bradley_terry_recovers_planted_strengths_and_is_the_maximum() -> None:
    games = tournament(np.random.default_rng(5), 3000)
    found = fit_strengths(win_counts(games, 4).sum(0))
    np.testing.assert_allclose(found, PLANTED, atol=0.1)

    first, second, _, outcome = np.array(games).T

    def loss(v: np.ndarray) -> float:
        z = v[first.astype(int)] - v[second.astype(int)]
        return float((np.logaddexp(0, z) - outcome * z).sum() + 0.5e-3 * (v**2).sum())

    best = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose(found, best - best.mean(), atol=1e-4)


@pytest.mark.slow
def test_intervals_of_strengths_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(6)
    held = []
    for i in range(1000):
        found = bradley_terry(win_counts(tournament(rng, 100), 4), resamples=200, seed=i)
        held.append([not f.excludes(t) for f, t in zip(found, PLANTED, strict=True)])
    assert abs(np.mean(held) - 0.95) < 0.02


def test_a_model_that_never_lost_has_a_strength_and_ties_are_half_wins() -> None:
    found = fit_strengths(win_counts([(0, 1, k, 1.0) for k in range(20)], 2).sum(0))
    assert np.isfinite(found).all() and found[0] > 2
    assert fit_strengths(win_counts([(0, 1, k, 0.5) for k in range(20)], 2).sum(0)) == pytest.approx([0, 0], abs=1e-12)


def test_groups_are_those_that_losses_link_both_ways() -> None:
    """Against a search over all ways from one model to another."""
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(200):
        many = int(rng.integers(2, 6))
        pairs = [tuple(rng.choice(many, 2, replace=False)) for _ in range(int(rng.integers(1, 9)))]
        said = rng.choice([0.0, 0.5, 1.0], p=[0.4, 0.1, 0.5], size=len(pairs))
        games = [(int(i), int(k), n, float(x)) for n, ((i, k), x) in enumerate(zip(pairs, said, strict=True))]
        above = {(i, k) for i, k, _, x in games if x > 0} | {(k, i) for i, k, _, x in games if x < 1}

        def reach(start: int, above: set[tuple[int, int]] = above) -> set[int]:
            found, new = {start}, [start]
            while new:
                at = new.pop()
                more = {k for i, k in above if i == at} - found
                found |= more
                new += more
            return found

        ways = [reach(i) for i in range(many)]
        expected = sorted({tuple(k for k in range(many) if k in ways[i] and i in ways[k]) for i in range(many)})
        assert connected_groups(win_counts(games, many)) == [list(part) for part in expected]
        seen.add(len(expected))
    assert {1, 2, 3} <= seen
