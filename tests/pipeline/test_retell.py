"""What a training's folder says of a point: its plateau and its time, of folders of earlier versions too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.evaluate.frontier import Plateau, Point
from prefopt.pipeline.retell import retold

SEEN = [32, 32, 1]


def run(folder: Path, rewards: Sequence[float], *, seconds: float = 2.0, **record: Any) -> Path:
    """A finished run of PPO, whose steps took 2 s each."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished", **record}))
    seen = np.cumsum(np.resize(SEEN, len(rewards))).tolist()
    lines = [
        {"step": n + 1, "objective/scores": r, "episode": e, "step_seconds": seconds}
        for n, (r, e) in enumerate(zip(rewards, seen, strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def point(step: int, road: str = "ppo-true", **more: Any) -> Point:
    return Point(road, "beta=0.1", 0, step, reward=0.5, interval=(0.4, 0.6), kl=3.0, kl_se=0.1, **more)


def rewards(climb: float, *, even: bool = False) -> list[float]:
    steps, rng = np.arange(90), np.random.Generator(np.random.PCG64(0))
    curve = climb * np.minimum(steps / (90 if even else 20), 1)
    found: list[float] = (curve + rng.normal(0, 0.4, 90) / np.sqrt(np.resize(SEEN, 90))).tolist()
    return found


def test_points_that_an_earlier_version_counted_are_judged_anew(tmp_path: Path) -> None:
    """Its rule took a rise that noise hides for a plateau; its file has no share."""
    before = point(90, plateau=Plateau(0.1, -0.1, 0.3, 0.2, 30, True))
    rising = retold(before, run(tmp_path / "a", rewards(0.3, even=True)), share=0.2)
    assert rising.plateau is not None and not rising.counted and rising.plateau.told == "cannot be told"
    assert "cannot be told" in str(rising.why_not) and "times as many responses could tell" in str(rising.why_not)
    flat = run(tmp_path / "b", rewards(1.0))
    refused = point(90, counted=False, why_not="no plateau", plateau=Plateau(0.1, -0.1, 0.3, 0.2, 30, False))
    found = retold(refused, flat, share=0.3)
    assert found.counted and found.why_not is None and found.plateau is not None and found.plateau.share == 0.3
    assert found.plateau.steps == 30 and (found.reward, found.kl) == (refused.reward, refused.kl)
    assert not retold(refused, flat, share=0.02).counted, "the share is read"


def test_a_step_of_one_response_says_less_than_one_of_32(tmp_path: Path) -> None:
    values = [1.0 if n >= 20 else 0.0 for n in range(90)]
    values[88] = values[89] = -9.0  # steps 89 and 90 have 32 responses and one
    last_only = [*values[:88], 1.0, -9.0]
    many, one = (
        retold(point(90), run(tmp_path / n, y), share=0.2).plateau for n, y in (("a", values), ("b", last_only))
    )
    assert many is not None and one is not None
    assert abs(one.rise) < abs(many.rise) / 20


def test_metrics_that_are_gone_or_too_few(tmp_path: Path) -> None:
    few = retold(point(9), run(tmp_path / "a", [0.5] * 9), share=0.2)
    assert not few.counted and "9 steps are too few to see a plateau" in str(few.why_not)
    folder = run(tmp_path / "b", rewards(1.0))
    (folder / "metrics.jsonl").unlink()
    gone = retold(point(90), folder, share=0.2)
    assert not gone.counted and "tells of 0 of its 90 steps" in str(gone.why_not)
    bad = retold(point(90), run(tmp_path / "c", [float("nan")] * 90), share=0.2)
    assert not bad.counted and "not finite" in str(bad.why_not)


def test_a_training_that_failed_stays_failed(tmp_path: Path) -> None:
    failed = Point("ppo-true", "beta=0", 0, 0, counted=False, why_not="ran away", seconds=3.0)
    found = retold(failed, run(tmp_path / "a", [0.1] * 30, costs={"seconds": 99.0}), share=0.2)
    assert (found.counted, found.why_not, found.plateau, found.seconds) == (False, "ran away", None, 99.0)


@pytest.mark.parametrize(
    ("costs", "seconds"),
    [
        ({"costs": {"seconds": 250.0}}, 250.0),
        ({}, 180.0),  # of an older version: the steps' own times
        ({"costs": {"seconds": 30.0}}, 180.0),  # which forgot what came before a kill
    ],
)
def test_the_time_is_that_of_all_starts(costs: dict[str, Any], seconds: float, tmp_path: Path) -> None:
    folder = run(tmp_path / "a", rewards(1.0), **costs)
    of_this_start = point(90, seconds=30.5)
    assert retold(of_this_start, folder, share=0.2).seconds == seconds
    # An earlier checkpoint took less, by the steps after it.
    assert retold(point(60, "dpo", seconds=30.5), folder, share=0.2).seconds == seconds - 30 * 2


def test_the_reward_model_is_counted_for_every_training_that_learned_from_it(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", rewards(1.0), costs={"seconds": 200.0})
    learned = run(tmp_path / "r", [0.0] * 9, costs={"seconds": 40.0})
    assert retold(point(90), folder, share=0.2, before=[learned]).seconds == 240.0
    (learned / "run.json").write_text('{"status": "finished"}')
    (learned / "metrics.jsonl").write_text("")
    assert retold(point(90), folder, share=0.2, before=[learned]).seconds is None, "unknown, not zero"
    (folder / "run.json").unlink()
    assert retold(point(90, seconds=12.0), folder, share=0.2).seconds is None
