"""What a run cost before it was killed outright is counted when it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import prefopt
from methods import small_world as world
from train.small import dpo, pairs

PPO: dict[str, Any] = {"batch_size": 4, "num": 2, "max_new_tokens": 3, "device": "cpu", "progress": "none"}


class KilledAt:
    """Keeps what a kill after the checkpoint of a step would leave in the folder."""

    def __init__(self, step: int, to: Path) -> None:
        self.step, self.to = step, to

    def on_checkpoint(self, run: Any, step: int, path: Path) -> None:
        if step == self.step:
            shutil.copytree(run.output, self.to, ignore=shutil.ignore_patterns(".lock"))


def costs(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "run.json").read_text())["costs"]
    return found


def check(whole: Path, parts: Path, learned: str) -> None:
    """All starts look at the data anew: what they learned from is the same, and all else is a little more."""
    assert parts.exists() and costs(parts)[learned] >= costs(whole)[learned]
    for name in ("forward_passes", "trained_tokens"):
        assert costs(whole)[name] <= costs(parts)[name] < 1.5 * costs(whole)[name], name


def test_of_dpo(model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_every": 9, "epochs": 4, "batch_size": 4, "token_budget": 256}
    rows = pairs(12)
    killed = KilledAt(9, tmp_path / "parts")
    dpo(model, rows, tmp_path / "whole", callbacks=[killed], **options)
    dpo(model, rows, tmp_path / "parts", resume=True, **options)
    check(tmp_path / "whole", tmp_path / "parts", "trained_tokens")


def test_of_ppo_killed_twice(tmp_path: Path) -> None:
    model, rows = world.write_world(tmp_path / "m"), [{"prompt": a + b} for a in "abcd" for b in "ef"]
    options: dict[str, Any] = {**PPO, "epochs": 4, "save_every": 1, "reward": world.reward}
    folders = [tmp_path / name for name in ("whole", "once", "twice")]
    # A checkpoint of PPO is in the middle of a step: callbacks hear of it at its end.
    prefopt.ppo(model, rows, output=folders[0], callbacks=[KilledAt(3, folders[1])], **options)
    prefopt.ppo(model, rows, output=folders[1], resume=True, callbacks=[KilledAt(6, folders[2])], **options)
    prefopt.ppo(model, rows, output=folders[2], resume=True, **options)
    check(folders[0], folders[1], "generated_tokens")
    check(folders[0], folders[2], "generated_tokens")
