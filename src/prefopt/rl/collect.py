"""Rollouts that are drawn while a trainer runs: they follow its token budget and its stop requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefopt.model.costs import MEMORY_ERRORS
from prefopt.rl.rollouts import Collector, Rollouts

if TYPE_CHECKING:
    from prefopt.train.trainer import Trainer


def collect(
    trainer: Trainer, collector: Collector, step: int, prompts: Sequence[int]
) -> tuple[Rollouts, dict[str, float]]:
    """Rollouts, and the seconds of each phase. Where memory runs out, with half the token budget. A stop request is
    followed while they are drawn, with a checkpoint. Raises as :meth:`Collector.collect`."""

    def progress(ended: int, drawn: int) -> None:
        trainer.pause()

    while True:
        try:
            trainer.train_mode(False)
            return collector.collect(step, prompts, trainer.token_budget, progress)
        except MEMORY_ERRORS as error:
            trainer.halve(error, "scoring the responses")
