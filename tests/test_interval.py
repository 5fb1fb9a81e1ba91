"""Intervals hold what they promise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.statistics import MIN_PROMPTS, mean_interval, rate_interval, student, student_interval

Draw = Callable[[np.random.Generator], np.ndarray]


@pytest.mark.parametrize("draw", ["normal", "skewed"])
def test_intervals_hold_the_true_mean_as_often_as_they_say(draw: str) -> None:
    rng = np.random.default_rng(0)
    held, trials, n = 0, 1000, 40
    for trial in range(trials):
        x = rng.normal(2.0, 3.0, n) if draw == "normal" else rng.exponential(2.0, n)
        held += not mean_interval(x, resamples=1000, seed=trial).excludes(2.0)
    assert abs(held / trials - 0.95) < 0.02


def test_the_interval_is_a_function_of_values_and_seed() -> None:
    x = np.random.default_rng(1).normal(size=30)
    assert mean_interval(x) == mean_interval(list(x))
    assert mean_interval(x) != mean_interval(x, seed=1)
    wide, narrow = mean_interval(x, level=0.99), mean_interval(x, level=0.8)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def votes(prompts: int, wins: float, losses: float, answers: int = 1, alike: float = 1.0) -> tuple[Draw, float]:
    """Mean outcomes [prompts] of several answers each, the rest ties, and their expectation. The smaller ``alike``,
    the more the answers to one prompt resemble each other (Dirichlet)."""
    weights = alike * np.array([wins, 1 - wins - losses, losses]) + 1e-9

    def draw(rng: np.random.Generator) -> np.ndarray:
        chances = rng.dirichlet(weights, prompts) if answers > 1 else np.tile([wins, 1 - wins - losses, losses], (1, 1))
        u = rng.random((prompts, answers))
        found: np.ndarray = np.where(u < chances[:, :1], 1.0, np.where(u < 1 - chances[:, 2:], 0.5, 0.0)).mean(1)
        return found

    return draw, wins + (1 - wins - losses) / 2


DESIGNS = {
    "even": votes(100, 0.5, 0.5),
    "some ties": votes(100, 0.5, 0.3),
    "nine of ten": votes(100, 0.9, 0.1),
    "near 1": votes(100, 0.95, 0.05),
    "nearer 1": votes(100, 0.98, 0.02),
    "nearest 1": votes(200, 0.99, 0.01),
    "near 0": votes(100, 0.02, 0.98),
    "ties, no difference": votes(100, 0.03, 0.03),
    "nearly all ties, no difference": votes(100, 0.015, 0.015),
    "ties, and a few wins": votes(100, 0.05, 0.0),
    "four answers": votes(100, 0.5, 0.3, 4, 0.3),
    "four answers, near 1": votes(100, 0.95, 0.05, 4, 0.3),
    "eight answers, nearer 1": votes(150, 0.98, 0.02, 8, 0.5),
    "four answers, nearly all ties": votes(100, 0.03, 0.03, 4, 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_of_rates_hold_the_truth_at_least_as_often_as_they_say(design: str) -> None:
    draw, truth = DESIGNS[design]
    rng = np.random.default_rng(0)
    assert np.mean([not rate_interval(draw(rng)).excludes(truth) for _ in range(1000)]) >= 0.93


def test_intervals_of_rates_hold_it_where_plain_errors_do_not() -> None:
    draw, truth = DESIGNS["nearer 1"]
    rng = np.random.default_rng(1)
    drawn = [draw(rng) for _ in range(300)]
    assert np.mean([not rate_interval(x).excludes(truth) for x in drawn]) >= 0.95
    assert np.mean([not mean_interval(x, resamples=300).excludes(truth) for x in drawn]) < 0.9, "nothing is shown here"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_rate_and_its_bounds_lie_between_0_and_1(values: list[float]) -> None:
    found = rate_interval(values)
    assert 0 <= found.low <= found.mean + 1e-12 and found.mean - 1e-12 <= found.high <= 1 and found.low < found.high


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 0.1, 1.0], [0.0] * 8 + [1.0], [x * x for x in range(9)]])
def test_of_few_values_the_interval_is_students(values: list[float]) -> None:
    assert len(values) < MIN_PROMPTS
    found, n = mean_interval(values), len(values)
    assert found == student_interval(values)
    half = student(n - 1) * np.std(values, ddof=1) / n**0.5
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))


def test_where_a_resample_has_no_spread_the_interval_is_students() -> None:
    values = [0.0] * 39 + [1.0]
    assert mean_interval(values) == student_interval(values)


def test_students_quantiles_are_those_of_the_tables() -> None:
    """Abramowitz and Stegun 1964, table 26.10."""
    for freedom, level, value in ((1, 0.95, 12.706), (2, 0.9, 2.920), (10, 0.99, 3.169), (120, 0.95, 1.980)):
        assert student(freedom, level) == pytest.approx(value, abs=5e-4)


def test_what_has_no_spread_has_no_width_and_one_prompt_has_no_interval() -> None:
    same = mean_interval([0.5, 0.5, 0.5])
    assert (same.low, same.high, same.excludes(0.4)) == (0.5, 0.5, True)
    with pytest.raises(ValueError, match="two prompts"):
        mean_interval([1.0])
    with pytest.raises(ValueError, match="one prompt"):
        rate_interval([])
