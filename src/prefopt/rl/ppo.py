"""Rounds of PPO and RLOO: their responses become advantages and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from prefopt.config.ppo import PpoConfig
from prefopt.core.terminal import Reporter
from prefopt.data.sampler import BatchSampler
from prefopt.errors import Diverged, RunError
from prefopt.losses.rl import KlController
from prefopt.rl.importance import importance_metrics
from prefopt.rl.judgement import Round
from prefopt.rl.objective import Targets, corrected, final_scores, rollout_metrics, targets_of
from prefopt.rl.prompts import PtxTerm
from prefopt.rl.rollouts import Collector, Rollouts
from prefopt.rl.rounds import Rounds
from prefopt.rl.sample_log import SampleLog
from prefopt.rl.scores import ScoreScale
from prefopt.rl.watch import Watch, reference_scale
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.columns import Values
from prefopt.train.source import AuxiliaryLoss
from prefopt.train.trainer import Trainer


class PpoRounds(Rounds):
    """``ratio_tolerance``: the root mean square of log-ratios per token that rounding explains before any weight moves.
    ``reference`` draws from the reference, where that is not the model before training."""

    def __init__(
        self,
        config: PpoConfig,
        collector: Collector,
        order: BatchSampler,
        kl: KlController,
        *,
        steps: int,
        ratio_tolerance: float,
        watch: Watch,
        samples: SampleLog,
        reference: Collector | None = None,
        ptx: PtxTerm | None = None,
    ) -> None:
        super().__init__(
            collector,
            order,
            steps=steps,
            seed=config.seed,
            passes=config.ppo_epochs,
            minibatches=config.minibatches,
            max_kl=config.max_kl,
        )
        self.config, self.kl, self.ptx = config, kl, ptx
        self.watch, self.samples, self.reference = watch, samples, reference or collector
        self.ratio_tolerance = ratio_tolerance
        self.scale = ScoreScale() if config.normalise_scores != "none" else None

    def before(self, trainer: Trainer) -> None:
        """Watch what the step before made of the policy; before the first one, measure the model and the scores of the
        reference."""
        if trainer.state.step:
            self.watch.after(trainer, trainer.state.step)
            return
        self.watch.before(trainer)
        if self.scale is not None and self.config.normalise_scores == "reference":
            self.scale = scale = reference_scale(trainer, self.reference)
            trainer.reporter.say(
                f"scores of the reference: mean {scale.mean:.4g}, deviation {scale.deviation:.4g}, over {scale.count}"
                " responses; scores are scaled by these"
            )

    def learn(self, trainer: Trainer, judged: Round, *, fresh: bool) -> tuple[Batch, Record]:
        """The rollouts with advantages and returns, whose scores are scaled. Raises :class:`Diverged` where advantages
        are not finite."""
        rollouts, config = self._scaled(judged.rollouts, fresh), self.config
        targets = corrected(config, targets_of(config, rollouts, self.kl.coefficient), rollouts)
        measured = rollout_metrics(judged.rollouts, final_scores(config, rollouts), targets, self.kl.coefficient)
        if self.scale is not None:
            measured |= {"objective/scale_mean": self.scale.mean, "objective/scale_std": self.scale.deviation}
        if config.importance_cap is not None:
            measured |= importance_metrics(rollouts, config.importance_cap, whole=config.algorithm == "rloo")
        if fresh:
            _refuse_not_finite(trainer.state.step, rollouts, targets)
        self._skipped = 0
        return targets.batch(rollouts), measured

    def _scaled(self, rollouts: Rollouts, fresh: bool) -> Rollouts:
        """With scores on the scale, which counts each step's scores once."""
        if self.scale is None:
            return rollouts
        if fresh and self.config.normalise_scores == "running":
            self.scale = self.scale.with_scores(rollouts.score_N)
        return replace(rollouts, score_N=self.scale.of(rollouts.score_N))

    def applies(self, update: int, record: Record) -> bool:
        """Whether the policy is still near the one that drew the responses. If not, the step ends with this update."""
        limit = self.config.max_update_kl
        if limit is None or record["policy/approxkl_avg"] <= limit:
            return True
        self._skipped = self.updates - update
        self.updates = update + 1
        return False

    def auxiliary(self, step: int, update: int) -> AuxiliaryLoss | None:
        """The pre-training term, if there is one."""
        if self.ptx is None:
            return None
        number = step * self.config.ppo_epochs * self.config.minibatches + update
        return AuxiliaryLoss(self.ptx.objective, self.ptx.batch(number), self.ptx.coefficient, "loss/ptx_avg")

    def end(self, trainer: Trainer, record: Record) -> Record:
        """As of all rounds; the KL controller takes its step, and samples are kept."""
        assert self.round is not None
        rollouts, step = self.round.rollouts, trainer.state.step
        record = super().end(trainer, record | {"policy/updates_skipped": float(self._skipped)})
        self.kl = self.kl.after(self._measured["objective/kl"], len(rollouts.score_N))
        if trainer.world.first:
            self.samples.write(step + 1, self.order.batch(step).tolist(), rollouts)
        return record

    def state(self) -> dict[str, Any]:
        scale = self.scale.state() if self.scale is not None else None
        return {**super().state(), "beta": self.kl.coefficient, "scale": scale, "said": [*self.watch.said]}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        super().restore(state, tensors)
        self.kl = self.kl.at(state["beta"])
        self.watch.said = list(state.get("said", ()))
        if self.scale is not None and state.get("scale"):
            self.scale = ScoreScale.from_state(state["scale"])

    def inspect(self, reporter: Reporter, step: int, update: int, record: Record, batch: Batch, values: Values) -> None:
        """Raises :class:`RunError` where ratios of new to old probabilities are not 1 before any weight moves."""
        if update:
            return
        gap, allowed = record["val/log_ratio_square"] ** 0.5, self.ratio_tolerance
        if not gap <= allowed:
            raise RunError(
                f"step {step + 1}: before any weight has moved, log-probabilities differ from those of the"
                f" same weights by {gap:.2g} nats per token (rounding explains {allowed:.1g}); try --attention loop or"
                " --dtype float32, and please report this architecture"
            )
        if step == 0:
            reporter.say(f"step 1: ratios are 1 within {gap:.1g}, as they must be before any weight moves")


def _refuse_not_finite(step: int, rollouts: Rollouts, targets: Targets) -> None:
    if all(bool(x.isfinite().all()) for x in (targets.advantage, targets.return_M) if x is not None):
        return
    given = {"scores": rollouts.score_N, "the critic's values": rollouts.value_M}
    ranges = [f"{name} from {x.min():.4g} to {x.max():.4g}" for name, x in given.items() if x is not None]
    raise Diverged(f"step {step + 1}: the advantages are not finite, with {' and '.join(ranges)}")
