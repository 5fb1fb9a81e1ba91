"""Signs in the metrics of reinforcement learning that the reward is exploited, in sentences with their numbers.

Thresholds are rules of thumb.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefopt.runs.findings import Finding, change
from prefopt.runs.history import History

GREW = 1.25  # times the tokens of the first samples
REPEATS = 0.8  # times the first fraction of distinct 3-grams
NARROW = 0.3  # times the entropy per token of the first samples
SURE = 2.0  # standard errors of a difference between two means
BEFORE = "before_training"
"""The key of ``run.json`` with the evaluation of the model before training."""


def hacking(run: History) -> Iterator[Finding]:
    """What a reader should look into; of samples only where the reward rose beyond noise."""
    reward = change(run.curve("objective/scores"))
    rose = ""
    if reward is not None and reward.direction > 0:
        rose = f" while the reward rose from {reward.first:.4g} to {reward.last:.4g}"
    yield from _true_reward(run, rose)
    if not rose:
        return
    lengths = change(run.curve("val/length"))
    if lengths and lengths.direction > 0 and lengths.last > GREW * lengths.first:
        text = f"samples grew from {lengths.first:.3g} to {lengths.last:.3g} tokens{rose}: it may reward length;"
        yield Finding("samples grew", f"{text} prefopt compare shows the win rate at equal length", look=True)
    repeats = change(run.curve("val/distinct"))
    if repeats and repeats.direction < 0 and repeats.last < REPEATS * repeats.first:
        text = f"samples repeat themselves: the fraction of distinct 3-grams fell from {repeats.first:.2f} to"
        yield Finding("repeats", f"{text} {repeats.last:.2f}{rose}; read samples.jsonl, and raise --beta", look=True)
    entropy = change(run.curve("policy/entropy_avg"))
    if entropy and entropy.direction < 0 and entropy.last < NARROW * entropy.first:
        text = f"entropy fell from {entropy.first:.3g} to {entropy.last:.3g} nats per token{rose}: the policy gives"
        yield Finding("narrow", f"{text} few different answers; raise --beta, or lower --learning-rate", look=True)


def _true_reward(run: History, rose: str) -> Iterator[Finding]:
    before: Any = run.record.get(BEFORE)
    true = run.curve("objective/true_scores", held_out=True)
    errors = run.curve("objective/true_scores_error", held_out=True)
    start, start_error = (before.get(f"objective/true_scores{x}") for x in ("", "_error")) if before else (None, None)
    if not isinstance(start, int | float) or not isinstance(start_error, int | float) or true.steps != errors.steps:
        return
    values, steps, spreads = [start, *true.values], [0, *true.steps], [start_error, *errors.values]
    best, last = max(range(len(values)), key=values.__getitem__), len(values) - 1

    def noise(one: int) -> float:
        return SURE * float((spreads[one] ** 2 + spreads[last] ** 2) ** 0.5)

    if values[best] - values[last] > noise(best):
        text = (
            f"the true reward on held-out prompts was best at step {steps[best]} ({values[best]:.4g}) and is"
            f" {values[last]:.4g} at step {steps[last]} (noise {noise(best):.2g}){rose}: the reward is exploited; stop"
            " earlier, raise --beta, or give a --kl-target"
        )
        yield Finding("true reward fell", text, look=True)
    elif values[last] - values[0] > noise(0):
        text = f"the true reward on held-out prompts rose from {values[0]:.4g} to {values[last]:.4g}"
        yield Finding("true reward rose", f"{text} (noise {noise(0):.2g})")
