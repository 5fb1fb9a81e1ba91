"""Methods at equal KL: interpolation, areas, tests by dealing seeds, and what identical methods give. Coverage, error
rates and power are simulated in the slow suite."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import permutation_test as scipy_permutation

from prefopt.core.statistics import holm
from prefopt.sweeps.fixed_kl import (
    RewardCurve,
    area_under,
    dominance_by_chance,
    interpolated,
    permutation_test,
    rewards_at,
)

Rng = np.random.Generator


def rng_of(seed: int) -> Rng:
    return np.random.Generator(np.random.PCG64(seed))


def test_rewards_between_policies_are_interpolated_and_beyond_the_last_unknown() -> None:
    """Also where policies are not in order, where two have the same KL, and where reward falls."""
    kl, reward = np.array([[4.0, 1.0]]), np.array([[0.5, 0.3]])
    found = interpolated(kl, reward, 0.1, [0.0, 0.25, 1.0, 2.25, 4.0, 4.1])[0]
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5]) and math.isnan(found[5])
    assert interpolated(kl[:, ::-1], reward[:, ::-1], 0.1, [2.25])[0] == pytest.approx(0.4)
    falls = interpolated(np.array([[1.0, 4.0]]), np.array([[0.5, 0.3]]), 0.1, [1.0, 2.25, 4.0])[0]
    assert falls == pytest.approx([0.5, 0.4, 0.3])
    same = interpolated(np.array([[1.0, 1.0]]), np.array([[0.5, 0.3]]), 0.1, [0.25, 1.0])[0]
    assert same[0] == pytest.approx(0.3) and 0.3 <= same[1] <= 0.5
    assert interpolated(np.array([[-0.01]]), np.array([[0.2]]), 0.1, [1.0])[0] == pytest.approx(math.nan, nan_ok=True)
    # Rows are independent of one another.
    rng = rng_of(0)
    kls, rewards, starts = rng.uniform(0.1, 9, (40, 3)), rng.uniform(0, 1, (40, 3)), rng.uniform(0, 0.2, 40)
    at = [0.5, 2.0, 6.0]
    whole = interpolated(kls, rewards, starts, at)
    for row in range(40):
        order = np.argsort(kls[row])
        d, y = np.sqrt([0.0, *kls[row][order]]), [starts[row], *rewards[row][order]]
        expected = np.where(np.sqrt(at) <= d[-1], np.interp(np.sqrt(at), d, y), np.nan)
        assert whole[row] == pytest.approx(expected, nan_ok=True)


def test_interpolation_follows_the_shape_of_optimisation() -> None:
    """Of d (0.4 - 0.05 d) between 1, 4 and 9 nats: at most 0.02 off, where a line in KL is up to 0.1 off."""
    kl = np.array([1.0, 4.0, 9.0])

    def truth(x: np.ndarray) -> np.ndarray:
        return np.sqrt(x) * (0.4 - 0.05 * np.sqrt(x))

    at = np.linspace(0.1, 9, 50)
    error = np.abs(interpolated(kl[None], truth(kl)[None], 0.0, at.tolist())[0] - truth(at))
    plain = np.abs(np.interp(at, [0.0, *kl], [0.0, *truth(kl)]) - truth(at))
    assert error.max() < 0.02 < 0.05 < plain.max()


def test_the_area_is_what_a_fine_grid_counts() -> None:
    rng, limit, start = rng_of(1), 8.0, 0.2
    for _ in range(20):
        kl, reward = rng.uniform(-0.1, 12, 4), rng.uniform(0, 1, 4)
        cells = (np.arange(8000) + 0.5) * limit / 8000
        best = np.max(np.where(kl[:, None] <= cells, reward[:, None], start), axis=0)
        expected = np.maximum(best - start, 0).sum() * limit / 8000
        assert area_under(kl, reward, start, limit) == pytest.approx(expected, abs=0.01)
    assert area_under([9.0], [1.0], 0.0, 8.0) == 0 and area_under([], [], 0.0, 8.0) == 0


@pytest.mark.parametrize("sizes", [(3, 3), (4, 4), (2, 5)])
def test_seeds_are_dealt_in_all_ways(sizes: tuple[int, int]) -> None:
    rng = rng_of(2)
    one, other = rng.normal(0, 1, sizes[0]), rng.normal(0.8, 1, sizes[1])
    expected = scipy_permutation(
        (one, other), lambda a, b, axis: abs(a.mean(axis) - b.mean(axis)), vectorized=True, alternative="greater"
    )
    assert permutation_test(one.tolist(), other.tolist()) == pytest.approx(expected.pvalue)


def test_three_seeds_cannot_show_a_difference_and_four_can() -> None:
    far = [permutation_test([0.0] * n, [1.0 + k for k in range(n)]) for n in (3, 4, 5)]
    assert far == pytest.approx([2 / 20, 2 / 70, 2 / 252])
    many = permutation_test(rng_of(3).normal(0, 1, 20).tolist(), rng_of(4).normal(3, 1, 20).tolist())
    assert 0 < many < 1e-3, "drawn, where there are too many ways to count"


def test_dominance_by_chance_counts_all_ways_to_deal() -> None:
    rng = rng_of(5)
    beats = rng.random((6, 6)) < 0.3
    ours, seeds = [True] * 3 + [False] * 3, [0] * 6
    counts = []
    for chosen in itertools.combinations(range(6), 3):
        first = np.isin(np.arange(6), chosen)
        counts.append(int((beats & first[:, None] & ~first[None]).any(0).sum()))
    observed = counts[0]
    found = dominance_by_chance(beats, seeds, ours, draws=8000)
    assert (found.beaten, found.total) == (observed, 3)
    assert found.average == pytest.approx(np.mean(counts), abs=0.03)
    assert found.p == pytest.approx(np.mean(np.array(counts) >= observed), abs=0.03)
    # Only trainings of the same seed meet, and are dealt.
    apart = dominance_by_chance(np.ones((4, 4), bool), [0, 1, 2, 3], [True, True, False, False])
    assert apart == (0, 2, 0.0, 1.0)


def curves(rng: Rng, seeds: int, prompts: int = 64, gain: float = 0.0, seed_noise: float = 0.0) -> list[RewardCurve]:
    """Policies at about 1.5, 4 and 9 nats, eight samples of a prompt, whose rewards follow the KL."""
    easy, slope = rng_of(99).normal(0, 0.2, prompts), rng_of(98).normal(1, 0.3, prompts)
    found = []
    for _ in range(seeds):
        kl = np.array([1.5, 4.0, 9.0]) * np.exp(rng.normal(0, 0.1, 3))
        mean = (0.2 + gain) * np.sqrt(kl) + rng.normal(0, seed_noise, 3)
        kl_SP = kl[:, None] * slope + rng.normal(0, 2.0 / 8**0.5, (3, prompts))
        reward_SP = mean[:, None] * slope + easy + rng.normal(0, 0.45 / 8**0.5, (3, prompts))
        found.append(RewardCurve(kl_SP, reward_SP, easy + rng.normal(0, 0.45 / 8**0.5, prompts)))
    return found


def test_a_method_that_gains_more_is_seen_at_every_kl_that_both_reach() -> None:
    rng = rng_of(6)
    one, two = curves(rng, 3, gain=0.1), curves(rng, 3)
    found = rewards_at(one, [1, 2, 4, 6, 30], others=two)
    assert all(x is not None and x.excludes(0) and x.low < x.mean < x.high for x in found[:4])
    assert found[4] is None, "nobody went that far"
    same = rewards_at(one, [1, 2, 4], others=one)
    assert all(x is not None and x.mean == x.low == x.high == 0 for x in same), "prompts are paired"
    alone = rewards_at(one, [4.0])[0]
    assert alone is not None and alone.mean == pytest.approx(np.mean([c.reward_at([4.0])[0] for c in one]))
    again = rewards_at(one, [4.0])[0]
    assert again == alone


@pytest.mark.slow
def test_intervals_at_fixed_kl_hold_the_difference_of_these_trainings() -> None:
    """Coverage of 95 % intervals within 92 to 98 %: prompts and samples are drawn anew, the trainings stay."""
    rng, prompts, held, runs = rng_of(7), 64, np.zeros(3), 400
    kls = np.array([1.5, 4.0, 9.0]) * np.exp(rng.normal(0, 0.1, (2, 3, 3)))
    means = np.stack([0.25 * np.sqrt(kls[0]), 0.2 * np.sqrt(kls[1])]) + rng.normal(0, 0.03, (2, 3, 3))
    at = [2.0, 4.0, 6.0]
    truth = np.mean(interpolated(kls[0], means[0], 0.0, at) - interpolated(kls[1], means[1], 0.0, at), axis=0)

    def drawn(method: int, seed: int, easy: np.ndarray, slope: np.ndarray, start: np.ndarray) -> RewardCurve:
        kl = kls[method, seed][:, None] * slope + rng.normal(0, 0.7, (3, prompts))
        reward = means[method, seed][:, None] * slope + easy + rng.normal(0, 0.16, (3, prompts))
        return RewardCurve(kl, reward, start)

    for _ in range(runs):
        easy, slope = rng.normal(0, 0.2, prompts), rng.gamma(10, 0.1, prompts)
        start = easy + rng.normal(0, 0.16, prompts)
        both = [[drawn(m, s, easy, slope, start) for s in range(3)] for m in range(2)]
        found = rewards_at(both[0], at, others=both[1])
        held += [x is not None and not x.excludes(t) for x, t in zip(found, truth, strict=True)]
    assert ((held / runs > 0.92) & (held / runs < 0.98)).all(), held / runs


@pytest.mark.slow
def test_intervals_of_a_task_hold_its_change_though_questions_are_no_prompts() -> None:
    """Coverage within 92 to 98 %: 200 questions with right or wrong answers, of which the policy loses some and gains
    fewer, the further it went; the KL is measured on 64 prompts."""
    rng, held, runs, at = rng_of(10), np.zeros(2), 400, [2.0, 6.0]
    kl = np.array([1.5, 4.0, 9.0])
    lost, gained = 0.06 * np.sqrt(kl), 0.1 * np.sqrt(kl)
    change = 0.8 * -lost + 0.2 * gained
    truth = interpolated(kl[None], change[None], 0.0, at)[0]
    for _ in range(runs):
        before, slope = rng.random(200) < 0.8, rng.gamma(10, 0.1, 64)
        kl_SP = kl[:, None] * slope + rng.normal(0, 0.7, (3, 64))
        moved = rng.random((3, 200))
        after = np.where(before, moved >= lost[:, None], moved < gained[:, None])
        curve = RewardCurve(kl_SP, after.astype(float) - before, np.zeros(200), apart=True)
        held += [x is not None and not x.excludes(t) for x, t in zip(rewards_at([curve], at), truth, strict=True)]
    assert ((held / runs > 0.92) & (held / runs < 0.98)).all(), held / runs


@pytest.mark.slow
def test_areas_of_identical_methods_differ_in_one_of_twenty_sweeps_at_most() -> None:
    """Six pairs of four methods with five seeds, corrected by Holm: any false finding in at most 5 %, and one
    method that gains half more is told from all others in 8 of 10."""
    rng, runs = rng_of(8), 300
    false, shown = 0, 0
    for _ in range(runs):
        noise = {"seed_noise": 0.03}
        areas = [[c.area(8.0) for c in curves(rng, 5, **noise)] for _ in range(4)]
        better = [c.area(8.0) for c in curves(rng, 5, gain=0.1, **noise)]
        p = [permutation_test(a, b) for a, b in itertools.combinations(areas, 2)]
        false += min(holm(p)) <= 0.05
        p = [permutation_test(a, b) for a, b in itertools.combinations([better, *areas[1:]], 2)]
        shown += max(holm(p)[:3]) <= 0.05
    assert false / runs < 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5, false / runs
    assert shown / runs > 0.8, shown / runs


@pytest.mark.slow
def test_identical_methods_dominate_by_chance_as_often_as_is_said() -> None:
    """Three settings and one seed, where only measuring differs: at least one of three in 58 % of sweeps, 1 - 0.75^3. A
    chance below 5 % is said in at most 5 % of them."""
    rng, runs = rng_of(9), 400
    some, small = 0, 0
    for _ in range(runs):
        kl = np.tile([2.0, 4.0, 8.0], 2) * np.exp(rng.normal(0, 0.1, 6))
        reward = np.tile([0.35, 0.5, 0.7], 2) + rng.normal(0, 0.02, 6)
        beats = (reward[:, None] > reward[None]) & (kl[:, None] <= kl[None])
        found = dominance_by_chance(beats, [0] * 6, [True] * 3 + [False] * 3, draws=200)
        some += found.beaten > 0
        small += found.p <= 0.05
    assert some / runs == pytest.approx(0.58, abs=0.06)
    assert small / runs < 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5, small / runs
