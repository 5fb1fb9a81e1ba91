"""How many steps a run of reinforcement learning takes, of how many prompts, and whether these are too few."""

from __future__ import annotations

import math

from prefopt.config.ppo import PpoConfig
from prefopt.data.sampler import Sampler

FEW = 10
"""Steps below which a person is told: runs that changed a model in a useful way took tens and hundreds."""


def order_of(config: PpoConfig, prompts: int) -> Sampler:
    """Which of so many prompts a step takes."""
    return Sampler(prompts, config.batch_size, seed=config.seed, shuffle=config.shuffle)


def steps_of(config: PpoConfig, prompts: int) -> int:
    """How many steps there are."""
    steps = max(1, math.ceil(config.epochs * order_of(config, prompts).steps_per_epoch))
    return min(steps, config.max_steps or steps)


def plan_of(config: PpoConfig, prompts: int, tokens: int) -> str:
    """A line that says it; ``tokens`` at once."""
    size = min(config.batch_size, prompts)
    left = prompts % size
    steps = steps_of(config, prompts)
    last = f" (the last of an epoch: {left})" if left and steps > prompts // size else ""
    return (
        f"{steps} step{'s' * (steps > 1)} of {size} prompts{last} with {config.num} response{'s' * (config.num > 1)}"
        f" each, {config.ppo_epochs} x {config.minibatches} updates a step, {tokens} tokens at once"
    )


def too_few(config: PpoConfig, prompts: int) -> str | None:
    """What to tell a person whose run will hardly learn, unless the steps were limited on purpose."""
    steps = steps_of(config, prompts)
    if steps >= FEW or steps == config.max_steps:
        return None
    made = "1 step" if steps == 1 else f"{steps} steps"
    return (
        f"{made} of {config.algorithm.upper()}, from {prompts} prompts, will change little at --learning-rate"
        f" {config.learning_rate:g}: give more --epochs (runs take tens of steps and more), or a smaller --batch-size"
    )
