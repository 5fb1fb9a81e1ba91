"""What the numbers of a run say that learns from samples of its own, by PPO or RLOO; see :mod:`.diagnose`."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.train.finding import Check, Finding
from prefopt.train.history import History
from prefopt.train.trend import Change, change

GREW = 1.25  # times the tokens of the first samples


def _reward(run: History) -> Iterator[Finding]:
    found = change(run.curve("objective/scores"))
    if found is None:
        return
    numbers = (
        f"from {found.first:.4g} to {found.last:.4g} (mean of the first and the last {found.window} of {found.steps}"
        f" steps; noise {found.noise:.2g})"
    )
    far = _kl(run)
    if found.direction > 0:
        yield Finding("reward rose", f"the reward of the policy's samples rose {numbers}{far}")
    elif found.direction < 0:
        yield Finding(
            "reward fell",
            f"the reward of the policy's samples fell {numbers}{far}: so it is with a learning rate that is too large;"
            " try a third of it, or a larger --beta",
            look=True,
        )
    else:
        yield Finding(
            "reward flat",
            f"the reward of the policy's samples did not change beyond noise: {numbers}{far}; a larger --learning-rate,"
            " a smaller --beta or more steps move it",
            look=True,
        )


def _grew(run: History) -> Iterator[Finding]:
    lengths, reward = change(run.curve("val/length")), change(run.curve("objective/scores"))
    if lengths is None or reward is None or lengths.direction <= 0 or reward.direction <= 0:
        return
    if lengths.last > GREW * lengths.first:
        yield Finding(
            "samples grew",
            f"samples grew from {lengths.first:.3g} to {lengths.last:.3g} tokens while the reward rose from"
            f" {reward.first:.3g} to {reward.last:.3g}: the reward may be one of length. prefopt compare reads the win"
            " rate at equal length; a reward model that length does not move, or fewer --max-new-tokens, stop it",
            look=True,
        )


def _kl(run: History) -> str:
    found: Change | None = change(run.curve("objective/kl"))
    return "" if found is None else f", at {found.last:.3g} nats from its reference"


CHECKS: tuple[Check, ...] = (_reward, _grew)
