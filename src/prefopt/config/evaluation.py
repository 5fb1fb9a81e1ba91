"""What runs hold out and sample by default.

>>> default_fraction(10_000, read=10_000), default_fraction(399, read=399)
(0.05, 0.0)
>>> round(10_000 * default_fraction(10_000, read=320))
20
"""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.training import MethodOptions
from prefopt.core.options import option
from prefopt.errors import ConfigError

HELD_OUT = 0.05
LEAST_PROMPTS = 400
"""With fewer prompts nothing is held out by default: on 20 pairs the standard error of an accuracy is 11 points, and on
fewer it says nothing, while those rows would be missed in training."""


LEAST_HELD_OUT = round(HELD_OUT * LEAST_PROMPTS)
"""Prompts that are held out by default, where any are."""


def default_fraction(prompts: int, *, read: int) -> float:
    """The fraction of ``prompts`` that is held out where the options name none. A run that stops early, after ``read``
    rows, holds out fewer, :data:`LEAST_HELD_OUT` at least: it should not spend more time on evaluations than on
    training."""
    if prompts < LEAST_PROMPTS:
        return 0.0
    return HELD_OUT * min(max(read, LEAST_PROMPTS), prompts) / prompts


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(MethodOptions):
    """The same for preferences, of which some are held out by default."""

    eval_fraction: float | None = option(
        None,
        "fraction of the prompts to hold out for evaluation; no prompt is in both sets, and 0 trains on all",
        group="data",
        default_text=f"{HELD_OUT:g} with {LEAST_PROMPTS} prompts or more and no --eval-data, else 0; where --max-steps"
        f" ends the run early, {HELD_OUT:g} of the rows that it reads, {LEAST_HELD_OUT} prompts at least",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions(MethodOptions):
    """Samples of a run, for methods whose models write text."""

    samples: int = option(
        8,
        "held-out prompts to sample before and after training with the same random numbers, in samples.jsonl of the"
        " output folder; 0 for none",
        group="evaluation",
        at_least=0,
    )

    def check(self) -> None:
        if self.samples and self.is_given("samples") and not self.evaluates:
            raise ConfigError(
                f"--samples {self.samples} needs held-out prompts: give --eval-data or --eval-fraction, or leave it out"
            )
