"""Win rates at equal length against scipy, and against what simulated experiments show."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from evaluate.experiments import experiment
from prefopt.evaluate.length_control import LengthControlled, length_controlled
from prefopt.evaluate.win_rate import win_rate


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
    d = d / d.std(ddof=1)
    terms = np.stack([d, np.tanh(d)], 1)

    def loss(v: np.ndarray, terms: np.ndarray) -> float:
        z = v[0] + terms @ v[1:]
        added = 2 * np.logaddexp(0, v[0]) - v[0]  # one more prompt won and one more lost, both of equal length
        return float((np.logaddexp(0, z) - y * z).sum() + added + 0.5e-2 * (v[1:] ** 2).sum())

    assert found is not None and found.rate is not None and found.linear is not None and found.slope is not None
    for rate, columns in ((found.rate, terms), (found.linear, terms[:, :1])):
        best = optimize.minimize(loss, np.zeros(1 + columns.shape[1]), args=(columns,), tol=1e-12).x
        assert rate.mean == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-6)
    best = optimize.minimize(loss, np.zeros(3), args=(terms,), tol=1e-12).x
    assert found.slope.mean == pytest.approx(best[1:].sum(), abs=1e-5)


@pytest.mark.parametrize("side", [1, -1])
def test_both_rates_are_told_where_they_differ(side: int) -> None:
    """Of equal models whose lengths differ by one and a half deviations, and whose judge does not see how much."""
    rng = np.random.default_rng(5)
    z = rng.normal(1.5, 1, 3000)
    won = rng.random(3000) < 1 / (1 + np.exp(-1.2 * np.tanh(3 * z)))
    outcomes = won if side == 1 else ~won
    found = length_controlled(outcomes[:, None] * 1.0, side * 50 * z[:, None])
    assert found is not None and found.rate is not None and found.linear is not None and found.differs
    assert not found.rate.excludes(0.5) and side * (found.linear.mean - 0.5) > 0.07
    same = length_controlled(rng.integers(0, 2, (3000, 1)) * 1.0, rng.normal(0, 50, (3000, 1)))
    assert same is not None and not same.differs


EFFECTS = {
    "none": lambda z: 0 * z,
    "in proportion": lambda z: 0.8 * z,
    "levels off": lambda z: 1.5 * np.tanh(z),
    "levels off at once": lambda z: 1.2 * np.tanh(3 * z),
    "root": lambda z: 1.2 * np.sign(z) * np.sqrt(abs(z)),
}


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1.5])
@pytest.mark.parametrize("effect", list(EFFECTS))
def test_the_rate_at_equal_length_is_unbiased_whatever_the_shape_of_the_effect(effect: str, shift: float) -> None:
    """Equal models; lengths differ by ``shift`` deviations. The straight line alone reads up to 60 %."""
    rng, rates, held = np.random.default_rng(12), [], []
    for _ in range(400):
        z = rng.normal(shift, 1, (300, 1))
        won = rng.random(z.shape) < 1 / (1 + np.exp(-EFFECTS[effect](z)))
        found = length_controlled(won * 1.0, 50 * z)
        assert found is not None and found.rate is not None and found.linear is not None
        rates.append((found.rate.mean, found.linear.mean))
        held.append(not found.rate.excludes(0.5))
    ours, linear = np.mean(rates, 0)
    assert abs(ours - 0.5) < 0.015 and 0.92 <= np.mean(held) <= 0.985
    if effect == "levels off at once" and shift == 1.5:
        assert linear > 0.58


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
