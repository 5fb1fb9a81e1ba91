"""What a run of reinforcement learning says of its length before it begins."""

from __future__ import annotations

from typing import Any

import pytest

from prefopt.config.ppo import PpoConfig
from prefopt.rl.prompts import order_of, plan_of, too_few
from prefopt.train.run import steps_of


def config(**options: Any) -> PpoConfig:
    return PpoConfig(model="m", prompts=["p.txt"], reward="length", output="out", **options)


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        (40, {}, "1 step of 40 prompts with 1 response each"),
        (128, {}, "2 steps of 64 prompts with 1 response each"),
        (130, {"num": 2}, "3 steps of 64 prompts (the last of an epoch: 2) with 2 responses each"),
        (130, {"max_steps": 2}, "2 steps of 64 prompts with 1 response each"),
        (130, {"epochs": 8.0}, "24 steps of 64 prompts (the last of an epoch: 2) with"),
    ],
)
def test_the_plan_is_what_the_sampler_gives(prompts: int, options: dict[str, Any], told: str) -> None:
    c = config(**options)
    assert plan_of(c, prompts, 100).startswith(told)
    sizes = {len(order_of(c, prompts).batch(step)) for step in range(steps_of(c, order_of(c, prompts).steps_per_epoch))}
    assert sizes == {min(64, prompts), *([2] if "last" in told else [])}


def test_few_steps_are_told_unless_they_were_asked_for() -> None:
    assert "1 step of PPO, from 40 prompts, will change little at --learning-rate 3e-06" in str(too_few(config(), 40))
    assert "9 steps of RLOO" in str(too_few(config(epochs=9.0, algorithm="rloo"), 40))
    assert too_few(config(epochs=10.0), 40) is None and too_few(config(max_steps=1), 400) is None
