"""Points of a sweep: which dominate which, when a reward has stopped rising, and the file they are kept in."""

from __future__ import annotations

import json
from dataclasses import replace
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
from prefopt.evaluate.frontier_lines import lines
from prefopt.evaluate.plateau import plateau, student
from prefopt.evaluate.report.sweep import sweep_facts


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
    points = [replace(p, setting=f"x={n}") for n, p in enumerate(points)]
    assert dominated(points, "dpo", "ppo") == (2, 3)
    assert dominated(points, "dpo", "ppo", clearly=True) == (1, 3)
    assert dominated(points, "ppo", "dpo") == (0, 2)


def test_roads_with_more_checkpoints_and_seeds_have_no_more_chances() -> None:
    """Of each training the last point, against the trainings of the same seed."""
    early = [replace(point("dpo", 1.0, 0.5), step=5), replace(point("dpo", 4.0, 0.5), step=10)]
    other_seed = replace(point("dpo", 1.0, 0.9), seed=1)
    theirs = point("ppo", 2.0, 0.4)
    assert dominated([*early, other_seed, theirs], "dpo", "ppo") == (0, 1)
    assert dominated([*early, replace(other_seed, seed=0, setting="x=2"), theirs], "dpo", "ppo") == (1, 1)
    assert dominated([*early, theirs], "ppo", "dpo") == (0, 1), "one training, one end"
    # A last point that does not count is not replaced by the one before it.
    failed = replace(early[1], counted=False, why_not="ran away")
    assert dominated([early[0], failed, theirs], "dpo", "ppo") == (0, 1)
    # Best-of-n has no seed of training: it is compared with every one.
    assert dominated([replace(point("best-of", 1.0, 0.9), step=0), replace(theirs, seed=7)], "best-of", "ppo") == (1, 1)


def test_the_lines_tell_of_trainings_and_of_roads_of_which_none_counts() -> None:
    points = [replace(point("dpo", 1.0, 0.6), step=step) for step in (5, 10)]
    points += [point("ppo-true", 2.0, 0.4), replace(point("ppo-true", 0.5, 0.4), setting="x=2")]
    points += [point("ppo-learned", 3.0, 0.3, counted=False, why_not="still rising", seconds=None)]
    told = "\n".join(lines(Frontier("m", "vader", 32, 4, 48, True, points=tuple(points))))
    assert "each at its last step" in told
    assert "DPO dominates 1 of 2 counted trainings of ppo-true; beyond the errors of both, 1" in told
    assert "no training of ppo-learned counts, so that DPO is not compared with it" in told
    (row,) = [line for line in told.splitlines() if "unknown" in line]
    assert row.startswith("ppo-learned"), "a time that is not known is said to be"
    assert "DPO against PPO" not in "\n".join(lines(Frontier("m", "vader", 32, 4, 48, True, points=tuple(points[:2]))))


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


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.6])
def test_a_rise_of_just_the_share_counts_as_seldom_as_the_interval_says(share: float, noise: float) -> None:
    """The hardest case of the test of equivalence, whatever the noise: 2.5 %, and a little for that of the climb."""
    steps = np.arange(96)
    # From 0 in the first tenth to 1, and on by r over the last third, whose mean is 1 + r / 2: r = share * (1 + r / 2).
    rise = share / (1 - share / 2)
    curve = np.clip((steps - 9) / 10, 0, 1) + rise * np.maximum(steps - 64, 0) / 31
    exact = plateau(curve)
    assert exact is not None and exact.rise == pytest.approx(share * exact.climb)
    rng = np.random.Generator(np.random.PCG64(6))
    found = [plateau(curve + rng.normal(0, noise, 96), share=share) for _ in range(1000)]
    assert np.mean([f is not None and f.reached for f in found]) <= 0.04


def of_the_recipe(climb: float, share: float, *, times: int = 1, even: bool = False, runs: int = 300) -> list[Plateau]:
    """recipes/sentiment.yaml: 64 steps, of 32, 32 and 1 of 65 prompts, whose rewards deviate by 0.4; up for a third of
    the steps (or for all), then level."""
    steps, rng = np.arange(64 * times), np.random.Generator(np.random.PCG64(4))
    many = np.resize([32.0, 32.0, 1.0], len(steps))
    curve = climb * np.minimum(steps / len(steps) * (1 if even else 3.3), 1)
    drawn = (curve + rng.normal(0, 0.4, len(steps)) / np.sqrt(many) for _ in range(runs))
    found = [plateau(y, many, share=share) for y in drawn]
    return [f for f in found if f is not None]


def test_what_the_guide_says_of_the_power_of_the_recipe() -> None:
    """Its table, to the noise of 300 runs."""
    told = {
        (climb, share, times): np.mean([f.reached for f in of_the_recipe(climb, share, times=times)])
        for climb in (0.4, 0.6)
        for share in (0.2, 0.3)
        for times in (1, 4)
    }
    guide = (Path(__file__).parents[2] / "docs/guide/frontier.md").read_text()
    rows = [line.split("|")[1:-1] for line in guide.splitlines() if line.startswith(("| 0.4 |", "| 0.6 |"))]
    said = {
        (float(climb), share, times): float(cell.strip().removesuffix("%")) / 100
        for climb, *cells in rows
        for (share, times), cell in zip([(0.2, 1), (0.3, 1), (0.2, 4), (0.3, 4)], cells, strict=True)
    }
    assert said == pytest.approx(told, abs=0.08)
    for share in (0.2, 0.3):
        assert np.mean([f.reached for f in of_the_recipe(0.6, share, even=True)]) <= 0.02


def test_as_many_more_responses_as_are_said_tell_a_plateau() -> None:
    more = [f.more for f in of_the_recipe(0.4, 0.3) if f.told == "cannot be told"]
    times = round(float(np.median([m for m in more if m])))
    assert 2 <= times <= 6
    # Over training that is as many times as long, the recipe's plateau in four of five.
    assert np.mean([f.reached for f in of_the_recipe(0.4, 0.3, times=times)]) == pytest.approx(0.8, abs=0.12)
    assert plateau(np.zeros(18)).more is None, "no number helps where nothing climbed"  # type: ignore[union-attr]


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


@pytest.mark.parametrize(
    "damage",
    [
        {"reward": "abc"},
        {"kl": True},
        {"step": 1.5},
        {"interval": [0.1]},
        {"interval": ["a", "b"]},
        {"reward": float("nan")},
        {"kl_is": "guessed"},
        {"plateau": {"rise": "x", "low": 0, "high": 0, "climb": 0, "steps": 6, "reached": True}},
        {"counted": "yes"},
        {"road": None},
    ],
)
def test_values_of_another_type_are_a_damaged_file(damage: dict[str, Any], tmp_path: Path) -> None:
    """Not a traceback where they are first used: also in a report."""
    file = Frontier("m", "vader", 32, 4, 48, True, points=(point("dpo", 1.0, 0.5),)).write(tmp_path)
    found = json.loads(file.read_text())
    found["points"][0] |= damage
    file.write_text(json.dumps(found))
    with pytest.raises(DataError, match="is damaged"):
        read_frontier(tmp_path)
    with pytest.raises(DataError, match="is damaged"):
        sweep_facts(tmp_path)
    file.write_text(json.dumps({**found, "points": [], "prompts": "many"}))
    with pytest.raises(DataError, match="is damaged"):
        read_frontier(tmp_path)


def test_the_file_says_its_version_and_names(tmp_path: Path) -> None:
    Frontier("m", "vader", 32, 4, 48, False, points=(point("dpo", 1.0, 0.5),)).write(tmp_path)
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert found["version"] == 1 and not found["finished"]
    assert set(found["points"][0]) == {
        *("road", "setting", "seed", "step", "reward", "interval", "kl", "kl_se", "kl_is", "length"),
        *("counted", "why_not", "folder", "seconds", "plateau"),
    }
