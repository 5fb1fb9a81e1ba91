"""Points of a sweep: which dominate which, when a reward has stopped rising, and the file they are kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.errors import DataError
from prefopt.evaluate.frontier import (
    Frontier,
    Plateau,
    Point,
    clearly_dominates,
    dominated,
    dominates,
    frontier,
    read_frontier,
)
from prefopt.evaluate.plateau import plateau, student


def point(road: str, kl: float | None, reward: float | None, **more: Any) -> Point:
    given: dict[str, Any] = {"kl_se": 0.1, "interval": None if reward is None else (reward - 0.05, reward + 0.05)}
    return Point(road, "x=1", 0, 10, reward=reward, kl=kl, **{**given, **more})


def test_a_point_is_dominated_by_more_reward_at_no_more_divergence() -> None:
    a = point("dpo", 2.0, 0.5)
    assert dominates(a, point("ppo", 3.0, 0.5)) and dominates(a, point("ppo", 2.0, 0.4))
    assert not dominates(a, point("ppo", 2.0, 0.5)), "an equal point is not worse"
    assert not dominates(a, point("ppo", 1.0, 0.4)) and not dominates(a, point("ppo", 3.0, 0.6))
    failed = point("ppo", None, None, counted=False, why_not="ran away")
    assert not dominates(a, failed) and not dominates(failed, a)
    assert not dominates(a, point("ppo", 3.0, 0.4, counted=False))
    # Beyond the errors: 2.0 + 0.2 is below 3.0 - 0.2, and 0.45 above 0.45 not.
    assert clearly_dominates(a, point("ppo", 3.0, 0.39))
    assert not clearly_dominates(a, point("ppo", 3.0, 0.4)) and not clearly_dominates(a, point("ppo", 2.3, 0.3))


def test_the_frontier_is_what_a_search_over_all_pairs_leaves() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    points = [point("dpo", float(k), float(r)) for k, r in rng.uniform(0, 1, (60, 2))]
    points += [point("ppo", 0.0, 2.0, counted=False), point("ppo", None, None, counted=False)]
    best = frontier(points)
    # Walking to the right, only what rises above all before is on it.
    highest, expected = -1.0, []
    for p in sorted((p for p in points if p.stands), key=lambda p: p.kl or 0.0):
        assert p.reward is not None
        if p.reward > highest:
            highest = p.reward
            expected.append(p)
    assert best == expected and 2 < len(best) < 20


def test_dominated_points_of_a_road_are_counted_once_and_only_those_that_count() -> None:
    points = [
        point("dpo", 1.0, 0.5),
        point("dpo", 1.1, 0.6),
        point("ppo", 2.0, 0.4),
        point("ppo", 0.5, 0.4),
        point("ppo", 3.0, 0.3, counted=False, why_not="still rising"),
        point("ppo", 1.2, 0.55),
    ]
    assert dominated(points, "dpo", "ppo") == (2, 3)
    assert dominated(points, "dpo", "ppo", clearly=True) == (1, 3)
    assert dominated(points, "ppo", "dpo") == (0, 2)


def test_plateaus_are_told_from_rising_rewards() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    steps = np.arange(90)
    flat = rising = 0
    for _ in range(400):
        noise = rng.normal(0, 0.05, 90)
        done, going = plateau(1 - np.exp(-steps / 8) + noise), plateau(steps / 90 + noise)
        assert done is not None and going is not None
        flat, rising = flat + done.reached, rising + going.reached
    assert flat >= 0.9 * 400 and rising <= 0.02 * 400
    falling = plateau(-steps / 90 + rng.normal(0, 0.05, 90))
    assert falling is not None and falling.told == "falling" and not falling.reached
    peak = plateau(np.minimum(steps, 60 - (steps - 60)) / 60 + rng.normal(0, 0.02, 90))
    assert peak is not None and peak.climb > 0 and peak.told == "falling", "it had climbed, and was lost again"
    assert plateau(np.zeros(17)) is None and plateau([float("nan")] * 30) is None
    still = plateau(np.zeros(18))
    assert still is not None and still.told == "cannot be told", "what never rose has not stopped rising"


@pytest.mark.parametrize("climb", [0.2, 0.4, 0.6])
def test_a_rise_that_noise_hides_is_no_plateau(climb: float) -> None:
    """Straight lines with the noise of 8 responses a step: whether they had stopped cannot be told, or they had not."""
    rng = np.random.Generator(np.random.PCG64(3))
    found = [plateau(climb * np.arange(64) / 64 + rng.normal(0, 0.2, 64)) for _ in range(500)]
    assert np.mean([f is not None and f.reached for f in found]) <= 0.03
    assert np.mean([f is not None and f.told == "cannot be told" for f in found]) > 0.3


def test_enough_responses_tell_a_plateau() -> None:
    """The recipe's steps: 256 of 32 responses, whose rewards deviate by 0.36 once they are high."""
    rng = np.random.Generator(np.random.PCG64(4))
    curve = 0.13 + 0.6 * (1 - np.exp(-np.arange(256) / 38))
    found = [plateau(curve + rng.normal(0, 0.36 / np.sqrt(32), 256)) for _ in range(300)]
    assert np.mean([f is not None and f.reached for f in found]) > 0.9


def test_a_step_weighs_as_its_responses_do() -> None:
    """Every third step has a single response, as where 65 prompts are dealt out by 32."""
    rng = np.random.Generator(np.random.PCG64(5))
    many = np.tile([32.0, 32.0, 1.0], 30)
    curve = 1 - np.exp(-np.arange(90) / 10)
    noisy = [curve + rng.normal(0, 0.45, 90) / np.sqrt(many) for _ in range(300)]
    weighed, alike = ([plateau(y, w) for y in noisy] for w in (many, None))
    width = [np.mean([f.high - f.low for f in fits if f is not None]) for fits in (weighed, alike)]
    assert width[0] < width[1] / 2
    assert np.mean([f is not None and abs(f.rise) < (f.high - f.low) / 2 for f in weighed]) > 0.92, "95 % hold 0"
    same = plateau(noisy[0], np.full(90, 7.0))
    assert same is not None and same.rise == pytest.approx(alike[0].rise if alike[0] else None)


def test_the_line_is_that_of_a_regression() -> None:
    from scipy.stats import linregress, t

    y = np.random.Generator(np.random.PCG64(2)).normal(0, 1, 36).cumsum()
    found, fit = plateau(y), linregress(np.arange(12), y[-12:])
    assert found is not None and found.steps == 12
    assert found.rise == pytest.approx(11 * fit.slope)
    assert found.high - found.rise == pytest.approx(11 * fit.stderr * t.ppf(0.975, 10), rel=1e-4)
    assert found.climb == pytest.approx(y[-12:].mean() - y[:3].mean())
    for freedom in (4, 5, 10, 100):
        assert student(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-3)


def test_a_sweep_comes_back_from_its_file(tmp_path: Path) -> None:
    flat = Plateau(0.1, -0.1, 0.3, 0.5, 12, True)
    points = (point("ppo", 3.0, 0.4, plateau=flat), point("ppo", None, None, counted=False, why_not="KL ran away"))
    sweep = Frontier("m", "vader", 32, 4, 48, True, "order", points)
    assert read_frontier(sweep.write(tmp_path)) == read_frontier(tmp_path) == sweep


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "is no file of prefopt frontier"),
        ("{}", "is no file of prefopt frontier"),
        ('{"version": 99}', "is of version 99, and this prefopt reads version 1"),
        ('{"version": 1, "points": [{"rode": 1}]}', "is damaged"),
        ('{"version": 1}', "is damaged"),
    ],
)
def test_what_is_no_sweep_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "frontier.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read_frontier(tmp_path)
    with pytest.raises(DataError, match="prefopt frontier writes one"):
        read_frontier(tmp_path / "none")


def test_the_file_says_its_version_and_names(tmp_path: Path) -> None:
    Frontier("m", "vader", 32, 4, 48, False, points=(point("dpo", 1.0, 0.5),)).write(tmp_path)
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert found["version"] == 1 and not found["finished"]
    assert set(found["points"][0]) == {
        *("road", "setting", "seed", "step", "reward", "interval", "kl", "kl_se", "kl_is", "length"),
        *("counted", "why_not", "folder", "seconds", "plateau"),
    }
