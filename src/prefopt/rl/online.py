"""Rounds of online learning: draw responses, have them judged, learn from what the judge said, draw again.

A step of the run is one round. What was drawn and judged is in the checkpoint and in the files of the rounds, so that
a run that was stopped or killed while it drew, judged or learned resumes to the same bits, also where a judge would not
say the same again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from prefopt.config.online import OnlineConfig
from prefopt.core.terminal import Reporter
from prefopt.data.sampler import BatchSampler
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import Diverged, RunError
from prefopt.generate.rewards import response_texts
from prefopt.generate.sampler import ROUNDING
from prefopt.losses.rl import per_response
from prefopt.model.check import CheckReport
from prefopt.rl.comparers import Answered, Comparer
from prefopt.rl.drawn import DrawnRounds
from prefopt.rl.judgement import Round
from prefopt.rl.lessons import Lesson, MakeLesson
from prefopt.rl.objective import Targets, rollout_metrics
from prefopt.rl.rollouts import Collector
from prefopt.rl.round_file import RoundFiles
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.columns import Values
from prefopt.train.trainer import Trainer

OF_SCORES = ("objective/scores", "objective/scores_std", "objective/rlhf_reward")
"""Metrics of scores, which a judge that compares does not give."""


class OnlineRounds(DrawnRounds):
    """Rounds whose responses the collector's reward scores, or a ``comparer`` compares. ``make_lesson`` turns a round
    into a batch; ``files`` keep every round."""

    def __init__(
        self,
        config: OnlineConfig,
        collector: Collector,
        order: BatchSampler,
        make_lesson: MakeLesson,
        files: RoundFiles,
        tokenizer: Tokenizer,
        *,
        steps: int,
        comparer: Comparer | None = None,
    ) -> None:
        super().__init__(
            collector, order, steps=steps, seed=config.seed, passes=config.passes, minibatches=config.minibatches
        )
        self.config, self.comparer = config, comparer
        self.round: Round | None = None
        self._make_lesson, self._files, self._tokenizer = make_lesson, files, tokenizer
        self._measured: Record = {}

    def begin(self, trainer: Trainer) -> bool:
        """Draw responses and have them judged, unless a checkpoint held those of the step.

        Raises :class:`Diverged` where the policy is too far from its reference or scores are not finite.
        """
        drawn, config = self.round, self.config
        kept = drawn is not None and drawn.judged  # by a checkpoint
        if drawn is None:
            drawn = Round(self.draw(trainer), judged=self.comparer is None)
            self._refuse_far(trainer.state.step, drawn)
        began = time.monotonic()
        judged = drawn if kept else self._judged(trainer, drawn)
        final = judged.scored(penalty=config.missing_eos_penalty, instead=config.missing_eos_score)
        lesson = self._make_lesson(final)
        self._measured = self._measure(final, lesson)
        if not kept:
            self._keep(trainer, judged, final, lesson)
            trainer.state.times["seconds/judging"] = time.monotonic() - began
        self.round = judged
        self.learn_from(lesson.batch)
        return not kept

    def _refuse_far(self, step: int, found: Round) -> None:
        rollouts = found.rollouts
        kl = float((rollouts.logp_M - rollouts.ref_logp_M).sum()) / len(rollouts.score_N)
        most = self.config.max_kl
        if not (math.isfinite(kl) and kl <= (math.inf if most is None else most)):
            limit = "" if most is None else f", more than --max-kl {most:g}"
            raise Diverged(
                f"step {step + 1}: the divergence from the reference is {kl:.4g} nats per response{limit}: the"
                " policy has diverged from its reference"
            )

    def _judged(self, trainer: Trainer, drawn: Round) -> Round:
        """The round with the judge's word: of this process, or of one that was killed after it was said."""
        step, world = trainer.state.step, trainer.world
        recorded = world.on_first(lambda: self._files.recorded(step, drawn.rollouts))
        if recorded is not None and (recorded.outcomes is None) == (self.comparer is None):
            return recorded
        if self.comparer is None:
            return drawn
        self.round = drawn  # a stop while the judge is asked keeps the samples
        return drawn.compared(self.comparer(f"round {step + 1}", self._answered(step, drawn), trainer.pause_together))

    def _answered(self, step: int, found: Round) -> list[Answered]:
        rows = [self.collector.prompts.rows[i] for i in self.order.batch(step).tolist()]
        groups = found.rollouts.groups
        texts = response_texts(self._tokenizer, self.collector.settings.stop, rows, groups)
        return [Answered(row, many) for row, many in zip(rows, texts, strict=True)]

    def _keep(self, trainer: Trainer, judged: Round, final: Round, lesson: Lesson) -> None:
        """Write the round to its files."""
        step = trainer.state.step

        def write() -> None:
            answered = self._answered(step, final)
            rows, texts = [a.prompt for a in answered], [a.texts for a in answered]
            self._files.write(step, rows, texts, judged, final, lesson.preferences)

        trainer.world.on_first(write)

    def _measure(self, final: Round, lesson: Lesson) -> Record:
        """Metrics of the responses of a round."""
        rollouts, beta = final.rollouts, self.config.beta or 0.0
        nothing = Targets(torch.zeros(0), None)
        found = rollout_metrics(rollouts, rollouts.score_N, nothing, beta)
        found |= {"round/prompts": float(len(rollouts.groups)), "round/skipped": float(lesson.skipped)}
        if final.outcomes is None:
            best = [max(scores) for scores in final.scores()]
            found["round/equal"] = float(sum(len(set(scores)) == 1 for scores in final.scores()))
            found["objective/best_scores"] = sum(best) / len(best)
        else:  # what one response wins another loses: their mean says nothing
            found = {name: value for name, value in found.items() if name not in OF_SCORES}
            every = [x for many in final.outcomes for _, _, x in many]
            found["round/ties"] = float(sum(x == 0.5 for x in every))
            found["round/undecided"] = float(sum(math.isnan(x) for x in every))
        return found

    def end(self, trainer: Trainer, record: Record) -> Record:
        """Add metrics of the round, and times."""
        assert self.round is not None
        drawn = len(self.round.rollouts.score_N)
        self.round = None
        return record | self._measured | self.costs(trainer, drawn)

    def state(self) -> dict[str, Any]:
        return {"episodes": self.episodes}

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The round of the step at hand, judged or not."""
        return self.round.tensors() if self.round is not None else None

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.episodes = state["episodes"]
        self.round = Round.from_tensors(tensors) if tensors is not None else None


class FirstLook:
    """Looks at the first update of a run: before any weight moves, the log-probabilities that it trains on must be
    those of the responses as they were drawn."""

    def __init__(self, config: OnlineConfig, check: CheckReport, dtype: torch.dtype, reporter: Reporter) -> None:
        self._config, self._check, self._dtype, self._reporter = config, check, dtype, reporter

    def __call__(self, step: int, update: int, record: Record, batch: Batch, values: Values) -> bool:
        """Raises :class:`RunError` where they are not."""
        if step or update:
            return False
        length_N = torch.from_numpy(batch.length_N)
        if "old_logp_N" in batch.columns:
            old_N, new_N = torch.from_numpy(batch.columns["old_logp_N"]), values["logp_N"].double().cpu()
        else:
            old_N = per_response(torch.from_numpy(batch.columns["old_logp_M"]), length_N)
            new_N = per_response(values["logp_M"].double().cpu(), length_N)
        gap = float((new_N - old_N).abs().max())
        longest = int(length_N.max())
        allowed = self._check.tolerance(longest) / min(1.0, self._config.temperature)
        if not self._config.gradient:  # they are the sampler's, whose passes round otherwise
            allowed = max(allowed, longest * ROUNDING.get(self._dtype, ROUNDING[torch.bfloat16]))
        if not gap <= allowed:
            raise RunError(
                f"step 1: before any weight has moved, the log-probability of a response differs by {gap:.2g} nats from"
                f" that of the same weights when it was drawn (rounding explains {allowed:.1g}); try --attention loop"
                " or --dtype float32, and please report this architecture"
            )
        self._reporter.say(f"step 1: ratios are 1 within {gap:.1g}, as they must be before any weight moves")
        return True
