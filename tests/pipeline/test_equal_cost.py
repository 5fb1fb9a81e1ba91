"""Methods that get equally many processor seconds instead of the same number of responses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.sweeping import frontier_config
from prefopt.config.methods import MethodConfig
from prefopt.errors import ConfigError
from prefopt.sweeps import frontier, timing
from prefopt.sweeps.timing import seconds_per_step, steps_within

METHODS = ["dpo:beta=0.1", "ppo-learned:kl_target=3"]
PER_STEP = {"DpoConfig": 0.5, "RewardConfig": 0.5, "PpoConfig": 1.0}


def test_every_method_makes_the_steps_that_fit(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of DPO takes half as long as one of PPO, which also pays for two steps of the reward model."""
    asked = []

    def pretend(config: MethodConfig, folder: Path) -> float:
        asked.append(folder.name)
        return PER_STEP[type(config).__name__]

    monkeypatch.setattr(timing, "seconds_per_step", pretend)
    config = frontier_config(place, tmp_path / "out", methods=METHODS, seconds=5.0)
    found = frontier.run(config)
    reward_steps = json.loads((tmp_path / "out/reward-seed0/run.json").read_text())["options"]["max_steps"]
    assert reward_steps == 2
    assert {p.method: p.step for p in found.points[1:]} == {"dpo": 10, "ppo-learned": 4}
    assert found.seconds == 5.0 and sorted(asked) == ["dpo_beta=0.1", "ppo-learned_kl_target=3", "reward"]
    # A sweep that goes on makes the same steps, whatever this machine needs.
    monkeypatch.setitem(PER_STEP, "DpoConfig", 50.0)
    more = frontier_config(place, tmp_path / "out", methods=METHODS, seconds=5.0, seeds=2)
    again = frontier.run(more)
    assert {(p.seed, p.step) for p in again.points if p.method == "dpo"} == {(0, 10), (1, 10)}
    assert len(asked) == 3


def test_ppo_with_a_reward_model_is_timed_after_that(place: Path, tmp_path: Path) -> None:
    config = frontier_config(place, tmp_path / "out", methods=METHODS[1:], seconds=1e6)
    sweep = frontier._FrontierSweep(config)
    sweep.prepare()
    assert sweep.steps["ppo-learned", "kl_target=3"] >= 1
    assert (tmp_path / "out/reward-seed0/model.safetensors").exists() and not (tmp_path / "out/timing").exists()


def test_a_step_is_timed_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    config = frontier_config(place, tmp_path / "out")
    (training,) = config.trainings()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8)
    found = seconds_per_step(config.config_of(training, data=[str(rows)], prompts="", each=2.0), tmp_path / "timed")
    assert 0 < found < 60 and not (tmp_path / "timed").exists()


def test_too_little_time_is_refused() -> None:
    assert steps_within(10.0, per_step=2.0) == 5
    with pytest.raises(ConfigError, match=r"--seconds 3 is too little: a step takes 2 s, after 4 s for its reward"):
        steps_within(3.0, per_step=2.0, before=4.0)
