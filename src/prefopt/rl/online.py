"""Rounds of online learning: draw responses, have them judged, learn from what the judge said, draw again.

A step of the run is one round. What was drawn and judged is in the checkpoint and in the files of the rounds, so that
a run that was stopped or killed while it drew, judged or learned resumes to the same bits, also where a judge would not
say the same again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from prefopt.config.online import OnlineConfig
from prefopt.core.terminal import Reporter
from prefopt.data.sampler import BatchSampler
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import RunError
from prefopt.generate.rewards import response_texts
from prefopt.generate.sampler import ROUNDING
from prefopt.losses.rl import per_response
from prefopt.model.check import CheckReport
from prefopt.rl.comparers import Answered, Comparer
from prefopt.rl.importance import importance_metrics
from prefopt.rl.judgement import Round
from prefopt.rl.lessons import Lesson, MakeLesson
from prefopt.rl.objective import Targets, rollout_metrics
from prefopt.rl.rollouts import Collector
from prefopt.rl.round_file import RoundFiles
from prefopt.rl.rounds import Rounds
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.columns import Values
from prefopt.train.trainer import Trainer

OF_SCORES = ("objective/scores", "objective/scores_std", "objective/rlhf_reward")
"""Metrics of scores, which a judge that compares does not give."""


class OnlineRounds(Rounds):
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
            collector,
            order,
            steps=steps,
            seed=config.seed,
            passes=config.passes,
            minibatches=config.minibatches,
            max_kl=config.max_kl,
        )
        self.config, self.comparer = config, comparer
        self._make_lesson, self._files, self._tokenizer = make_lesson, files, tokenizer

    def draw(self, trainer: Trainer) -> Round:
        """As of all rounds; what a comparer has not seen yet is not judged."""
        return replace(super().draw(trainer), judged=self.comparer is None)

    def judge(self, trainer: Trainer, drawn: Round) -> Round:
        """The round with the judge's word: of this process, or of one that was killed after it was said."""
        step, world = trainer.state.step, trainer.world
        with _judging(trainer):
            recorded = world.on_first(lambda: self._files.recorded(step, drawn.rollouts))
            if recorded is not None and (recorded.outcomes is None) == (self.comparer is None):
                return recorded
            if self.comparer is None:
                return drawn
            if self.collector.sampler.remote:
                trainer.keep()  # a server does not draw the same again
            answered = self._answered(step, drawn)
            return drawn.compared(self.comparer(f"round {step + 1}", answered, trainer.pause_together))

    def learn(self, trainer: Trainer, judged: Round, *, fresh: bool) -> tuple[Batch, Record]:
        """The lesson of a round; its files are written."""
        config = self.config
        with _judging(trainer):
            final = judged.scored(penalty=config.missing_eos_penalty, instead=config.missing_eos_score)
            lesson = self._make_lesson(final)
            if fresh:
                self._keep(trainer, judged, final, lesson)
        return lesson.batch, self._measure(final, lesson)

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
        if (cap := self.config.importance_cap) is not None:
            found |= importance_metrics(rollouts, cap, whole=self.config.average is None)
        found |= {"round/prompts": float(len(rollouts.groups)), "round/skipped": float(lesson.skipped)}
        if final.outcomes is None:
            best = [max(scores) for scores in final.scores()]
            found["round/equal"] = float(sum(len(set(scores)) == 1 for scores in final.scores()))
            found["objective/best_scores"] = sum(best) / len(best)
        else:  # what one response wins another loses: their mean says nothing
            found = {name: value for name, value in found.items() if name not in OF_SCORES}
            every = [x for many in final.outcomes for _, _, x in many]
            found["round/ties"] = sum(x == 0.5 for x in every) / len(every)
            found["round/undecided"] = sum(math.isnan(x) for x in every) / len(every)
        return found


@contextmanager
def _judging(trainer: Trainer) -> Iterator[None]:
    """Count the time of this block as that of judging."""
    began = time.monotonic()
    yield
    times = trainer.state.times
    times["seconds/judging"] = times.get("seconds/judging", 0.0) + time.monotonic() - began


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
