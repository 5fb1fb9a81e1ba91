"""Plateau and time of a sweep point, recomputed from its run folder, also of first versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.errors import RunError
from prefopt.sweeps.finished import update_point
from prefopt.sweeps.points import Point

STEPS = 9


def run(folder: Path, before: float | None = None, *, steps: int = STEPS, **record: Any) -> Path:
    """A finished run of PPO, whose steps took 2 s each; ``before``: what its reward (0.5) was at step 6."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished", **record}))
    lines = [{"step": n + 1, "step_seconds": 2.0} for n in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    around = np.linspace(-0.1, 0.1, 30)
    if before is not None:
        samples(folder / "samples-6.jsonl", np.full(30, before))
        samples(folder / "samples.jsonl", 0.5 + around)
    return folder


def samples(file: Path, mean_P: Any) -> None:
    rows = [{"prompt": "a\u2028b\x85", "scores": [m - 0.2, m + 0.2]} for m in mean_P]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def point(step: int, method: str = "ppo-true", **more: Any) -> Point:
    return Point(method, "beta=0.1", 0, step, reward=0.5, interval=(0.4, 0.6), kl=3.0, kl_se=0.1, **more)


def test_plateaus_are_tested_anew_by_their_samples(tmp_path: Path) -> None:
    counted = point(9)
    rising = update_point(counted, run(tmp_path / "a", 0.35), start=0.1, share=0.2)
    assert rising.plateau is not None and not rising.counted and rising.plateau.verdict == "still rising"
    assert (rising.plateau.rise, rising.plateau.climb) == pytest.approx((0.15, 0.4)) and rising.plateau.steps == 3
    assert "no plateau: the true reward still rose by 0.15 in its last 3 steps" in str(rising.why_not)
    refused = point(9, counted=False, why_not="no plateau")
    flat = run(tmp_path / "b", 0.5)
    found = update_point(refused, flat, start=0.1, share=0.3)
    assert found.counted and found.why_not is None and found.plateau is not None and found.plateau.share == 0.3
    assert (found.reward, found.kl) == (refused.reward, refused.kl)
    unsure = update_point(refused, flat, start=0.1, share=0.02)
    assert not unsure.counted and "noise" in str(unsure.why_not), "the share is read"
    assert not update_point(refused, flat, start=0.49, share=0.3).counted, "and where it began"


def test_samples_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    for steps in (9, 2):
        found = update_point(point(steps), run(tmp_path / f"{steps}", steps=steps), start=0.1, share=0.2)
        assert not found.counted and str(found.why_not).startswith(f"{steps} steps")
    folder = run(tmp_path / "c", 0.5)
    for text in ("[", "[" * 100_000, "{}\n", '{"scores": ["x"]}\n'):
        (folder / "samples-6.jsonl").write_text(text)
        with pytest.raises(RunError, match=r"samples-6\.jsonl cannot be read"):
            update_point(point(9), folder, start=0.1, share=0.2)
    (folder / "samples-6.jsonl").write_text('{"scores": [1]}\n')
    with pytest.raises(RunError, match="other prompts"):
        update_point(point(9), folder, start=0.1, share=0.2)


def test_a_point_is_judged_whatever_else_its_folder_lost(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0.35)
    (folder / "run.json").unlink()
    found = update_point(point(9), folder, start=0.1, share=0.2)
    assert not found.counted and found.seconds is None and found.plateau is not None
    learned = update_point(point(9), run(tmp_path / "b", 0.5), start=0.1, share=0.2, before=[tmp_path / "gone"])
    assert learned.counted and learned.seconds is None


def test_a_training_that_failed_stays_failed(tmp_path: Path) -> None:
    failed = Point("ppo-true", "beta=0", 0, 0, counted=False, why_not="ran away", seconds=3.0)
    found = update_point(failed, run(tmp_path / "a", costs={"seconds": 99.0}), start=0.1, share=0.2)
    assert (found.counted, found.why_not, found.plateau, found.seconds) == (False, "ran away", None, 99.0)


@pytest.mark.parametrize(
    ("costs", "seconds"),
    [
        ({"costs": {"seconds": 250.0}}, 250.0),
        ({}, 18.0),  # of an older version: the steps' own times
        ({"costs": {"seconds": 3.0}}, 18.0),  # which forgot what came before a kill
    ],
)
def test_the_time_is_that_of_all_starts(costs: dict[str, Any], seconds: float, tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0.5, **costs)
    of_this_start = point(9, seconds=30.5)
    assert update_point(of_this_start, folder, start=0.1, share=0.2).seconds == seconds
    # An earlier checkpoint took less, by the steps after it.
    assert update_point(point(6, "dpo", seconds=30.5), folder, start=0.1, share=0.2).seconds == seconds - 3 * 2


def test_the_reward_model_is_counted_for_every_training_that_learned_from_it(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0.5, costs={"seconds": 200.0})
    learned = run(tmp_path / "r", costs={"seconds": 40.0})
    assert update_point(point(9), folder, start=0.1, share=0.2, before=[learned]).seconds == 240.0
    (learned / "run.json").write_text('{"status": "finished"}')
    (learned / "metrics.jsonl").write_text("")
    assert update_point(point(9), folder, start=0.1, share=0.2, before=[learned]).seconds is None, "unknown, not zero"
    (folder / "run.json").unlink()
    assert update_point(point(9, seconds=12.0), folder, start=0.1, share=0.2).seconds is None
