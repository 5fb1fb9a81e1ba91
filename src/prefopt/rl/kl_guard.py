"""``--max-kl`` of a run on fixed data: the KL of the policy from its reference, on samples of the policy itself.

Log-ratios on the data say nothing of it: a policy may stay near its reference there and run away elsewhere. So prompts
of the data are answered every so often, always with the same random numbers, and the run stops where the answers have
left the reference too far behind. The last weights that had not are kept as a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.config.dpo import DpoConfig
from prefopt.core.phases import phase
from prefopt.data.chat.ends import trained_ends
from prefopt.errors import ConfigError, Diverged
from prefopt.generate.model_io import PromptSet
from prefopt.generate.rewards import TextRewardScorer
from prefopt.generate.sampler import SamplingParams
from prefopt.losses.rl import k1, per_response
from prefopt.records import Comparison, Message
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
from prefopt.rewards import Reward
from prefopt.rl.collect import collect
from prefopt.rl.last_good import going_on, otherwise, write_last_good
from prefopt.rl.rollouts import Collector
from prefopt.rl.samplers import LocalSampler
from prefopt.rl.watch import NO_STEP
from prefopt.runs.metrics import Record
from prefopt.train.data import DataBatches
from prefopt.train.offline import OfflineRun
from prefopt.train.policy import Policy
from prefopt.train.reference import ReferencePlan
from prefopt.train.trainer import Trainer

TIMES = 20
"""Measurements of a run without ``--kl-every``."""
KL, KL_ERROR = "objective/kl", "objective/kl_error"


@dataclass(slots=True)
class KlGuard:
    """Measures the policy of ``offline`` and keeps its weights while they are good. ``every``: steps."""

    offline: OfflineRun
    collector: Collector
    every: int
    ends: tuple[int, ...]
    good_step: int | None = None
    """The step whose weights are kept."""

    @phase("KL")
    def measure(self, trainer: Trainer, step: int) -> Record:
        """The KL of the weights after ``step``, with its standard error. Raises :class:`Diverged` where it is more than
        ``--max-kl``."""
        rollouts, _ = collect(trainer, self.collector, NO_STEP, range(len(self.collector.prompts.ids)))
        kl_N = per_response(k1(rollouts.logp_M - rollouts.ref_logp_M), rollouts.length_N)
        kl, error = float(kl_N.mean()), float(kl_N.std()) / len(kl_N) ** 0.5 if len(kl_N) > 1 else 0.0
        trainer.train_mode()
        run, most = self.offline.run, self.offline.run.config.max_kl
        if not (math.isfinite(kl) and kl <= most):
            raise Diverged(
                f"step {step}: the divergence from the reference is {kl:.4g} nats per response, on {len(kl_N)} samples"
                f" of the policy, more than --max-kl {most:g}",
                self._remedy(),
            )
        policy: Any = self.offline.policy
        write_last_good(policy, run.folder.last_good, self.offline.start.tokenizer, self.ends, run.world)
        self.good_step = step
        run.say(
            f"step {step}: KL {kl:.3g} (error {error:.2g}) from the reference, on {len(kl_N)} samples of the policy"
        )
        return {KL: kl, KL_ERROR: error}

    def measure_saved(self, trainer: Trainer) -> dict[str, str]:
        """The KL of the weights that the run is about to save, for the card. Raises as :meth:`measure`."""
        best = trainer.state.best_step
        found = self.measure(trainer, trainer.state.step if best is None else best)
        return {"KL from the reference, on samples": f"{found[KL]:.3g} nats per response (error {found[KL_ERROR]:.2g})"}

    def _remedy(self) -> str:
        run = self.offline.run
        if self.good_step is None:
            return f"no good weights were measured before: start a new run elsewhere with {otherwise(run.config)}"
        how = going_on(run.config, run.folder.last_good, named=run.given is None)
        return f"the last good weights, after step {self.good_step}, are a model: {how}"


class GuardedBatches(DataBatches):
    """Batches of data, before some of which the policy is measured by ``guard``, if there is one."""

    guard: KlGuard | None = None
    _measured: tuple[int, Record] = (0, {})

    def begin(self, trainer: Trainer) -> bool:
        step = trainer.state.step
        if self.guard is not None and step and step % self.guard.every == 0 and self._measured[0] != step:
            self._measured = (step, self.guard.measure(trainer, step))
        return super().begin(trainer)

    def end(self, trainer: Trainer, record: Record) -> Record:
        """The KL that was measured before the step is in its metrics."""
        step, found = self._measured
        return super().end(trainer, record) | (found if step == trainer.state.step else {})

    def state(self) -> dict[str, Any]:
        good = self.guard.good_step if self.guard is not None else None
        return {**super().state(), "measured": list(self._measured), "good_step": good}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        super().restore(state, tensors)
        step, record = state.get("measured", (0, {}))
        self._measured = (step, record)
        if self.guard is not None:
            self.guard.good_step = state.get("good_step")


def kl_guard(offline: OfflineRun, plan: ReferencePlan) -> KlGuard | None:
    """The guard of ``--max-kl``; None without it. ``offline`` has not trained yet: without a fixed reference, the KL is
    measured from its model as it is now. Raises :class:`ConfigError` for weights in shards."""
    run, policy, data = offline.run, offline.policy, offline.data
    config: DpoConfig = run.config
    if config.max_kl is None:
        return None
    assert isinstance(policy, Policy) and config.kl_samples is not None and config.max_new_tokens is not None
    if policy.sharded:
        raise ConfigError("--max-kl samples from whole weights in every process: give --shard none")
    if plan.reference is not None and config.ref_model_sync_steps is None:
        reference = plan.reference.in_memory(policy.scorer, policy.masters, data.groups, moves=False)
    else:
        reference = InMemoryReference(policy.scorer, SwappedWeights(policy.masters))
    places = data.held_out or data.train
    ids = {p.tobytes(): p for p in (data.groups[i].prompt for i in places) if len(p)}
    room = offline.start.limit - config.max_new_tokens
    fitting = [p for p in ids.values() if len(p) <= room][: config.kl_samples]
    if not fitting:
        raise ConfigError(f"--max-kl: no prompt leaves room for --max-new-tokens {config.max_new_tokens}; lower that")
    ends = tuple(trained_ends(data.groups, offline.start.tokenizer))
    nothing = Comparison((Message("user", ""),), (), (), 0, text=True)
    prompts = PromptSet(rows=[nothing] * len(fitting), ids=[*fitting])
    unread = TextRewardScorer(Reward("none", lambda asked, said: [0.0] * len(said)), offline.start.tokenizer, ends)
    num = -(-config.kl_samples // len(fitting))
    sampler = LocalSampler(policy.scorer)
    known = run.folder.record.get("sampled_at_once")
    sampler.rows = known or sampler.estimate_rows(max(map(len, fitting)) + config.max_new_tokens)
    run.folder.remember(sampled_at_once=sampler.rows)
    never = (policy.scorer.vision.token_id,) if policy.pictures else ()
    settings = SamplingParams(config.max_new_tokens, ends, seed=config.seed, never=never)
    collector = Collector(prompts, sampler, settings, num, unread, policy.scorer, None, reference, run.world)
    every = config.kl_every or max(1, round(offline.steps / TIMES))
    run.say(
        f"KL: measured every {every} steps on {num * len(fitting)} samples of the policy; over {config.max_kl:g} stops"
    )
    return KlGuard(offline, collector, every, ends)
