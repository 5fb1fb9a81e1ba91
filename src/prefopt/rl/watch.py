"""Held-out prompts that are answered and scored while a run learns, also by the reward that is meant.

A policy that exploits its reward scores higher and higher on it, while what the reward stands for falls. That shows
only on a second measure, and on prompts that are not trained on. The samples of every evaluation are drawn with the
same random numbers, so that two evaluations differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prefopt.core.phases import phase
from prefopt.generate.rewards import RewardScorer, WeightedRewards
from prefopt.losses.rl import k1, per_response
from prefopt.rl.collect import collect
from prefopt.rl.objective import distinct
from prefopt.rl.rollouts import Collector, Rollouts
from prefopt.rl.scores import ScoreScale
from prefopt.runs.findings import Finding
from prefopt.runs.hacking import BEFORE, hacking
from prefopt.runs.history import read_history, read_metrics
from prefopt.runs.metrics import Record, note

if TYPE_CHECKING:
    from prefopt.train.trainer import Trainer

NO_STEP = 2**32
"""Responses to held-out prompts are drawn as if in this step, those that scores are scaled by in the next: no run has
so many."""
TRAINED, TRUE = "trained", "true"
SCALED_BY = 256
"""Responses of the reference, or a few more, whose scores give mean and deviation: that is then known within 5 %."""


def reference_scale(trainer: Trainer, collector: Collector) -> ScoreScale:
    """The scale of the scores of the reference's own responses. ``collector`` draws them: from the model before it is
    trained, or from another reference."""
    prompts = range(min(SCALED_BY, len(collector.prompts.ids)))
    drawing = replace(collector, critic=None, num=-(-SCALED_BY // len(prompts)))
    rollouts, _ = collect(trainer, drawing, NO_STEP + 1, prompts)
    return ScoreScale().with_scores(rollouts.score_N)


def with_true_reward(judge: RewardScorer, true: RewardScorer | None) -> WeightedRewards:
    """A judge whose scores are those of ``judge``, with those of ``true`` beside them."""
    parts: dict[str, tuple[float, RewardScorer]] = {TRAINED: (1.0, judge)}
    return WeightedRewards(parts if true is None else {**parts, TRUE: (0.0, true)})


@dataclass(slots=True)
class Watch:
    """``held_out`` answers the held-out prompts every ``every`` steps, if there are any; ``remember`` keeps values in
    ``run.json``. Warnings are looked for every ``look_every`` steps, and each is said once."""

    held_out: Collector | None
    every: int
    look_every: int
    steps: int
    remember: Callable[..., None]
    known: bool = False
    """Whether ``run.json`` has the evaluation before training."""
    said: list[str] = field(default_factory=list)

    def before(self, trainer: Trainer) -> None:
        """Measure the model as it is before training."""
        if self.held_out is not None and not self.known:
            record = self._measure(trainer)
            trainer.reporter.say(f"held out, before training: {', '.join(note(record))}")
            self.remember(**{BEFORE: record})
            self.known = True

    def after(self, trainer: Trainer, step: int) -> None:
        """Measure the weights after ``step``, which is counted, where that is due and the metrics do not have it yet;
        say what in the metrics is a sign that the reward is exploited. Raises
        :class:`prefopt.core.dispatch.ServersLost` where no server is left that draws or judges."""
        due = self.held_out is not None and (step % self.every == 0 or step == self.steps)
        if due and not trainer.world.on_first(lambda: _is_measured(trainer, step)):
            record = self._measure(trainer)
            trainer.metrics.write({"step": step, **{f"eval_{name}": value for name, value in record.items()}})
            trainer.reporter.say(f"step {step}: held out: {', '.join(note(record))}")
        if step % self.look_every == 0 or step == self.steps:
            for finding in trainer.world.on_first(lambda: _findings(trainer)):
                if finding.look and finding.name not in self.said:
                    self.said.append(finding.name)
                    trainer.reporter.say(f"step {step}: {finding.text}")

    @phase("evaluation")
    def _measure(self, trainer: Trainer) -> Record:
        assert self.held_out is not None
        prompts = range(len(self.held_out.prompts.ids))
        rollouts, _ = collect(trainer, self.held_out, NO_STEP, prompts)
        return held_out_metrics(rollouts)


def _is_measured(trainer: Trainer, step: int) -> bool:
    """Whether the metrics have an evaluation of the weights after ``step``: a run that was killed since is resumed."""
    lines = read_metrics(trainer.metrics.path.parent)
    return any(line["step"] == step and any(name.startswith("eval_") for name in line) for line in lines)


def _findings(trainer: Trainer) -> list[Finding]:
    return list(hacking(read_history(trainer.metrics.path.parent)))


def held_out_metrics(rollouts: Rollouts) -> Record:
    """Metrics of responses to held-out prompts, with the names that those of training have."""
    length_N, n = rollouts.length_N, len(rollouts.length_N)
    kl_N = per_response(k1(rollouts.logp_M - rollouts.ref_logp_M), length_N)
    found = {
        "objective/scores": float(rollouts.part_N[TRAINED].mean()),
        "objective/kl": float(kl_N.mean()),
        "objective/entropy": float(-per_response(rollouts.logp_M, length_N).mean()),
        "val/length": float(length_N.double().mean()),
        "val/eos_rate": float(rollouts.finished_N.double().mean()),
        "val/distinct": float(distinct(rollouts.groups).mean()),
    }
    if rollouts.unscored is not None:
        found["objective/unscored"] = float(rollouts.unscored)
    if TRUE in rollouts.part_N:
        true_N = rollouts.part_N[TRUE]
        found["objective/true_scores"] = float(true_N.mean())
        found["objective/true_scores_error"] = float(true_N.std()) / n**0.5 if n > 1 else 0.0
    return found
