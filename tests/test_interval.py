"""Intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.interval import mean_interval


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


def test_what_has_no_spread_has_no_width_and_one_prompt_has_no_interval() -> None:
    same = mean_interval([0.5, 0.5, 0.5])
    assert (same.low, same.high, same.excludes(0.4)) == (0.5, 0.5, True)
    with pytest.raises(ValueError, match="two prompts"):
        mean_interval([1.0])
