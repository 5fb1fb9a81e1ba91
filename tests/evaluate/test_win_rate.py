"""Win rates, their test and its advice, against enumeration and scipy, and against what simulated experiments show."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from evaluate.experiments import experiment, judged
from prefopt.core.statistics import MIN_PROMPTS, SMALLEST_P, holm, sign_flip_test
from prefopt.evaluate.win_rate import corrected, needed_prompts, win_rate


def flipped(values: np.ndarray) -> float:
    """The fraction of all ways to flip signs whose sum is at least as far from zero."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-9))


@pytest.mark.parametrize("steps", [2, 8, 10, 24, None])
def test_the_sign_flip_test_is_the_enumeration_of_all_signs(steps: int | None) -> None:
    rng = np.random.default_rng(0)
    for count in (1, 3, 7, 12):
        for _ in range(10):
            values = rng.normal(0.3, 1, count) if steps is None else rng.integers(-1, steps // 2 + 1, count) / steps
            # Values on no grid are rounded: sums near the observed one may count or not.
            tolerance = 1e-12 if steps else 8 / 2**count
            assert sign_flip_test(values) == pytest.approx(flipped(values), abs=tolerance)
            assert sign_flip_test(-values) == pytest.approx(sign_flip_test(values), abs=1e-12)


def test_with_one_sample_it_is_the_exact_binomial_test_and_with_many_students() -> None:
    for won, lost in ((0, 1), (3, 3), (9, 1), (17, 40), (812, 700)):
        values = np.repeat([0.5, -0.5, 0.0], [won, lost, 5])
        assert sign_flip_test(values) == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-9)
    assert sign_flip_test(np.zeros(20)) == 1.0
    for scale in (1e-300, 1e-12, 1e9):  # a p-value has no unit
        assert sign_flip_test(scale * np.repeat([0.5, -0.5], [9, 1])) == pytest.approx(0.021484375, rel=1e-6)
    assert sign_flip_test(np.full(300, 0.5)) == SMALLEST_P
    for values in (np.random.default_rng(1).normal(0.02, 1, 4000), np.random.default_rng(2).integers(-6, 8, 9000) / 14):
        assert sign_flip_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.003)


def test_holms_p_is_that_of_the_closed_test() -> None:
    """A finding holds where every set of comparisons that it is in would be refused by Bonferroni."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        p = np.round(rng.random(5) ** 3, 2)
        sets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        closed = [max(min(1, len(s) * p[list(s)].min()) for s in sets if i in s) for i in range(5)]
        assert holm(p.tolist()) == pytest.approx(closed)
    assert holm([]) == []


def outcomes(wins: int, ties: int, losses: int) -> np.ndarray:
    return np.repeat([1.0, 0.5, 0.0], [wins, ties, losses])[:, None]


@pytest.mark.parametrize("counts", [(2, 98, 0), (6, 94, 0), (99, 0, 1), (60, 0, 40), (61, 0, 39), (35, 50, 15)])
def test_better_is_said_where_the_test_says_so(counts: tuple[int, int, int]) -> None:
    found, turned = win_rate(outcomes(*counts)), win_rate(outcomes(*counts[::-1]))
    assert found.rate is not None and found.p is not None and turned.rate is not None
    assert found.p == pytest.approx(stats.binomtest(counts[0], counts[0] + counts[2]).pvalue)
    assert found.verdict == ("better" if found.p <= 0.05 else "not shown")
    assert turned.verdict == {"better": "worse", "not shown": "not shown"}[found.verdict]
    assert (turned.rate.low, turned.rate.high) == pytest.approx((1 - found.rate.high, 1 - found.rate.low))
    assert turned.needed == found.needed and found.swapped().verdict == turned.verdict


def test_several_comparisons_are_corrected_together() -> None:
    """The same outcomes are a finding alone, and none among others; those with too few prompts do not count."""
    rates = [win_rate(outcomes(*counts)) for counts in ((62, 0, 38), (50, 0, 50), (3, 0, 2), (90, 0, 10), (52, 0, 48))]
    assert rates[0].verdict == "better" and rates[0].comparisons == 1 and rates[0].p_holm == rates[0].p
    found = corrected(rates)
    assert [r.verdict for r in found] == ["not shown", "not shown", None, "better", "not shown"]
    assert [r.comparisons for r in found] == [4, 4, 1, 4, 4] and found[2] == rates[2]
    assert found[0].p == rates[0].p and found[0].p_holm == pytest.approx(3 * rates[0].p)
    assert found[0].needed is not None and rates[0].needed is not None and found[0].needed[0] > rates[0].needed[0]
    assert found[0].rate == rates[0].rate


def test_counts_ties_and_what_was_not_said() -> None:
    outcomes = np.array([[1.0, 0.5], [np.nan, 0.0], [np.nan, np.nan]] * 6)
    found = win_rate(outcomes)
    assert (found.wins, found.ties, found.losses, found.undecided, found.prompts) == (6, 6, 6, 18, 12)
    assert found.rate is not None and found.rate.mean == pytest.approx((0.75 + 0) / 2)
    assert found.p == pytest.approx(flipped(np.repeat([0.25, -0.5], 6)))


def test_few_prompts_give_counts_and_no_rate() -> None:
    few = win_rate(np.ones((MIN_PROMPTS - 1, 50)))
    assert (few.rate, few.p, few.p_holm, few.needed, few.verdict, few.wins) == (None, None, None, None, None, 450)


def test_all_alike_is_not_all_certain() -> None:
    found = win_rate(np.ones((20, 1)))
    assert found.rate is not None and (found.rate.mean, found.rate.high) == (1.0, 1.0)
    assert 0.8 < found.rate.low < 0.9
    level = win_rate(np.full((20, 1), 0.5))
    assert level.rate is not None and 0.25 < level.rate.low < 0.5 < level.rate.high < 0.75
    assert (level.p, level.verdict, level.needed) == (1.0, "not shown", None)


def test_advice_grows_with_doubt_and_leaves_no_difference_open() -> None:
    sure, unsure, nothing = (win_rate(outcomes(*counts)) for counts in ((600, 0, 400), (60, 0, 40), (50, 0, 50)))
    assert sure.needed is not None and unsure.needed is not None and nothing.needed is not None
    assert sure.needed[1] is not None and unsure.needed[1] is not None
    assert unsure.needed[0] < sure.needed[0] < 204 < sure.needed[1] < unsure.needed[1]
    assert nothing.needed[1] is None and 100 < nothing.needed[0] < 1000
    assert needed_prompts(0.5, 0.1) == MIN_PROMPTS


@pytest.mark.slow
def test_intervals_of_win_rates_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    truth = experiment(rng, 400_000, 1)[0].mean()
    found = [win_rate(experiment(rng, 100, 2)[0]).rate for _ in range(1000)]
    held = [f is not None and not f.excludes(truth) for f in found]
    assert abs(np.mean(held) - 0.95) < 0.02


DESIGNS = [(1, 0.0, 0.0), (1, 1.0, 0.2), (1, 0.0, 0.9), (4, 1.0, 0.2), (4, 0.0, 0.0), (8, 2.0, 0.1)]
"""Samples per prompt, standard deviation of the prompts' lean, fraction of ties."""


def drawn(rng: np.random.Generator, prompts: int, design: tuple[int, float, float], lean: float = 0.0) -> np.ndarray:
    samples, spread, tie = design
    return judged(rng, np.broadcast_to(lean + spread * rng.normal(size=(prompts, 1)), (prompts, samples)), tie=tie)


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("prompts", [12, 100])
def test_of_equal_models_one_is_called_better_in_at_most_one_of_twenty_experiments(
    prompts: int, design: tuple[int, float, float]
) -> None:
    """Of 1000 experiments up to 71 are 5 % and three standard errors."""
    rng = np.random.default_rng(7)
    found = sum(win_rate(drawn(rng, prompts, design)).verdict != "not shown" for _ in range(1000))
    assert found <= 71


@pytest.mark.slow
def test_among_six_equal_models_any_is_called_better_in_at_most_one_of_twenty_experiments() -> None:
    """A score per model and sample decides all comparisons. Without the correction it is one in three."""
    rng, models, any_found, any_before = np.random.default_rng(8), 6, 0, 0
    for _ in range(300):
        score = np.round(2 * rng.normal(size=(models, 100, 2)))
        pairs = itertools.combinations(range(models), 2)
        rates = [win_rate(0.5 + 0.5 * np.sign(score[i] - score[k])) for i, k in pairs]
        any_before += any(r.verdict != "not shown" for r in rates)
        any_found += any(r.verdict != "not shown" for r in corrected(rates))
    assert any_found <= 26, "5 % of 300, and three standard errors"
    assert any_before > 75


def sign_and_interval(x: np.ndarray) -> bool:
    """The rule of two tests that the sign-flip test replaced."""
    means = x.mean(1)
    above, below = int((means > 0.5).sum()), int((means < 0.5).sum())
    p = stats.binomtest(above, above + below).pvalue if above + below else 1.0
    rate = win_rate(x).rate
    assert rate is not None
    return bool(p < 0.05 and rate.excludes(0.5) and (above > below) == (rate.mean > 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_a_difference_is_found_more_often_than_by_two_tests_that_must_agree(design: tuple[int, float, float]) -> None:
    rng = np.random.default_rng(9)
    big = drawn(rng, 200_000, design, 0.5).mean(1)
    prompts = needed_prompts(float(big.mean()) - 0.5, float(big.std()), design[0])
    one = two = 0
    for _ in range(400):
        x = drawn(rng, prompts, design, 0.5)
        one += win_rate(x).verdict == "better"
        two += sign_and_interval(x)
    assert one >= two - 2
    assert one - two > (16 if design[0] > 1 else -3), "by 4 points and more where prompts have several samples"


@pytest.mark.slow
@pytest.mark.parametrize("lean", [0.4, 0.8])
@pytest.mark.parametrize("design", DESIGNS)
def test_the_prompts_of_the_advice_find_the_difference_in_eight_of_ten_experiments(
    design: tuple[int, float, float], lean: float
) -> None:
    """By the rule itself, alone and as the first of 15; and the range from a hundred prompts holds that number in eight
    of ten."""
    rng = np.random.default_rng(10)
    big = drawn(rng, 400_000, design, lean).mean(1)
    difference, spread = float(big.mean()) - 0.5, float(big.std())
    for comparisons in (1, 15):
        prompts = needed_prompts(difference, spread, design[0], comparisons)
        p = [sign_flip_test(drawn(rng, prompts, design, lean).mean(1) - 0.5) for _ in range(500)]
        assert 0.74 <= np.mean(np.array(p) <= 0.05 / comparisons) <= 0.93
    needed, held = needed_prompts(difference, spread, design[0]), []
    for _ in range(300):
        advice = win_rate(drawn(rng, 100, design, lean)).needed
        held.append(advice is not None and advice[0] <= needed and (advice[1] is None or needed <= advice[1]))
    assert 0.75 <= np.mean(held) <= 0.98
