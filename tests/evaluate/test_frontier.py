"""Points of a sweep: which dominate which, when a reward has stopped rising, and the file they are kept in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.errors import RunError
from prefopt.sweeps.points import (
    Frontier,
    Plateau,
    Point,
    dominated,
    dominates,
    frontier,
    plateau,
    read_frontier,
)
from prefopt.sweeps.report import frontier_section, lines


def point(method: str, kl: float | None, reward: float | None, **more: Any) -> Point:
    given: dict[str, Any] = {"kl_se": 0.1, "interval": None if reward is None else (reward - 0.05, reward + 0.05)}
    return Point(method, "x=1", 0, 10, reward=reward, kl=kl, **{**given, **more})


def test_a_point_is_dominated_by_more_reward_at_no_more_divergence() -> None:
    a = point("dpo", 2.0, 0.5)
    assert dominates(a, point("ppo", 3.0, 0.5)) and dominates(a, point("ppo", 2.0, 0.4))
    assert not dominates(a, point("ppo", 2.0, 0.5)), "an equal point is not worse"
    assert not dominates(a, point("ppo", 1.0, 0.4)) and not dominates(a, point("ppo", 3.0, 0.6))
    failed = point("ppo", None, None, counted=False, why_not="ran away")
    assert not dominates(a, failed) and not dominates(failed, a)
    assert not dominates(a, point("ppo", 3.0, 0.4, counted=False))
    # Beyond the errors: 2.0 + 0.2 is below 3.0 - 0.2, and 0.45 above 0.45 not.
    assert dominates(a, point("ppo", 3.0, 0.39), clearly=True)
    assert not dominates(a, point("ppo", 3.0, 0.4), clearly=True)
    assert not dominates(a, point("ppo", 2.3, 0.3), clearly=True)


def test_the_frontier_is_what_a_search_over_all_pairs_leaves() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    points = [point("dpo", float(k), float(r)) for k, r in rng.uniform(0, 1, (60, 2))]
    points += [point("ppo", 0.0, 2.0, counted=False), point("ppo", None, None, counted=False)]
    best = frontier(points)
    # Walking to the right, only what rises above all before is on it.
    highest, expected = -1.0, []
    for p in sorted((p for p in points if p.included), key=lambda p: p.kl or 0.0):
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


def test_methods_with_more_checkpoints_and_seeds_have_no_more_chances() -> None:
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


def test_the_lines_tell_of_trainings_and_of_methods_of_which_none_counts() -> None:
    points = [replace(point("dpo", 1.0, 0.6), step=step) for step in (5, 10)]
    points += [point("ppo-true", 2.0, 0.4), replace(point("ppo-true", 0.5, 0.4), setting="x=2")]
    points += [point("ppo-learned", 3.0, 0.3, counted=False, why_not="still rising", seconds=None)]
    told = "\n".join(lines(Frontier("m", "vader", 32, 4, 48, True, points=tuple(points))))
    assert "dpo has more reward at no more KL than 1 of the 2 included trainings of ppo-true" in told
    assert "beyond the errors, than 1" in told
    assert "1 of 5 points are excluded" in told and "of ppo-learned" not in told
    (row,) = [line for line in told.splitlines() if "unknown" in line]
    assert row.startswith("ppo-learned") and "still rising" in row
    alone = "\n".join(lines(Frontier("m", "vader", 32, 4, 48, True, points=tuple(points[:2]))))
    assert "Fewer than two methods" in alone


def held_out(rng: np.random.Generator, mean: float) -> np.ndarray:
    """Mean rewards of 128 prompts, 8 answers each."""
    prompts = np.linspace(-0.2, 0.2, 128)
    return mean + prompts + rng.normal(0, 0.45, (128, 8)).mean(1)


@pytest.mark.parametrize("climb", [0.4, 0.6])
def test_plateaus_are_told_from_rising_rewards(climb: float) -> None:
    """A reward that rises evenly gains a third of its climb in the last third of its steps."""
    rng = np.random.Generator(np.random.PCG64(1))
    told: dict[str, list[str]] = {"flat": [], "share": [], "rising": [], "falling": []}
    for _ in range(60):
        end = held_out(rng, climb)
        for name, part in [("flat", 0.0), ("share", 0.2), ("rising", 1 / 3), ("falling", -1 / 3)]:
            found = plateau(held_out(rng, climb * (1 - part)), end, start=0.0, steps=20, share=0.2)
            assert found.low < found.rise < found.high and found.climb == pytest.approx(end.mean())
            told[name].append(found.verdict)
    reached = {name: np.mean([w == "plateau" for w in words]) for name, words in told.items()}
    assert reached["flat"] > 0.8 and max(reached[n] for n in ("share", "rising", "falling")) < 0.07
    assert told["rising"].count("still rising") > 56 and told["falling"].count("falling") > 56


def test_what_noise_hides_is_no_plateau() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    pairs = rng.normal(0.2, 0.45, (200, 2, 8))
    few = [plateau(before, after, start=0.0, steps=20, share=0.2) for before, after in pairs]
    assert np.mean([f.reached for f in few]) < 0.06 and np.mean([f.verdict == "cannot be told" for f in few]) > 0.8
    never = plateau(np.zeros(9), np.zeros(9), start=0.0, steps=5, share=0.2)
    assert never.verdict == "cannot be told", "what never rose has not stopped rising"
    up, down = np.linspace(0, 0.1, 40), np.linspace(0.1, 0, 40)
    assert [plateau(up, down, start=-0.1, steps=5, share=s).reached for s in (0.1, 0.2)] == [False, True]


def test_a_sweep_comes_back_from_its_file(tmp_path: Path) -> None:
    flat = Plateau(0.1, -0.1, 0.3, 0.5, 12, True, 0.2)
    points = (point("ppo", 3.0, 0.4, plateau=flat), point("ppo", None, None, counted=False, why_not="KL ran away"))
    sweep = Frontier("m", "vader", 32, 4, 48, True, "order", points)
    assert read_frontier(sweep.write(tmp_path)) == read_frontier(tmp_path) == sweep


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "it is not JSON"),
        ("[" * 100_000, "it is nested too deep"),
        ("{}", "it is not what was written there"),
        ('{"version": 99}', "it is of version 99, and this prefopt reads version 1"),
        ('{"version": 1, "points": [{"rode": 1}]}', "unexpected keyword argument 'rode'"),
        ('{"version": 1}', "it is not what was written there"),
    ],
)
def test_what_is_no_sweep_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "frontier.json").write_text(text)
    with pytest.raises(RunError, match=said):
        read_frontier(tmp_path)
    with pytest.raises(RunError, match=r"No such file or directory.*run prefopt frontier again"):
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
        {"reward": 10**400},
        {"kl_se": -1},
        {"kl_is": "guessed"},
        {"plateau": {"rise": "x", "low": 0, "high": 0, "climb": 0, "steps": 6, "reached": True}},
        {"counted": "yes"},
        {"method": None},
    ],
)
def test_values_of_another_type_are_a_damaged_file(damage: dict[str, Any], tmp_path: Path) -> None:
    """Not a traceback where they are first used: also in a report."""
    file = Frontier("m", "vader", 32, 4, 48, True, points=(point("dpo", 1.0, 0.5),)).write(tmp_path)
    found = json.loads(file.read_text())
    found["points"][0] |= damage
    file.write_text(json.dumps(found))
    with pytest.raises(RunError, match=r"frontier\.json cannot be read"):
        read_frontier(tmp_path)
    with pytest.raises(RunError, match=r"frontier\.json cannot be read"):
        frontier_section(tmp_path)
    del found["points"][0]
    file.write_text(json.dumps({**found, "made": "by \ud800"}))
    assert "by ?" in str(frontier_section(tmp_path))
    file.write_text(json.dumps({**found, "points": [], "prompts": "many"}))
    with pytest.raises(RunError, match=r"frontier\.json cannot be read"):
        read_frontier(tmp_path)


def test_the_file_says_its_version_and_names(tmp_path: Path) -> None:
    Frontier("m", "vader", 32, 4, 48, False, points=(point("dpo", 1.0, 0.5),)).write(tmp_path)
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert found["version"] == 1 and not found["finished"]
    assert set(found["points"][0]) == {
        *("method", "setting", "seed", "step", "reward", "interval", "kl", "kl_se", "kl_is", "length"),
        *("counted", "why_not", "folder", "seconds", "plateau"),
        *("factor", "rewards", "kls", "perplexity", "costs"),
        *("earlier", "earlier_step", "judged", "task"),
    }
