"""PPO and RLOO: targets from rollouts, the objective, and metrics of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prefopt.config.ppo import PpoConfig
from prefopt.data.group import Group
from prefopt.losses.rl import (
    gae,
    k1,
    k2,
    k3,
    leave_one_out,
    per_response,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
    without_end,
)
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel, Scorer, response_sums
from prefopt.rl.critic import Critic, look
from prefopt.rl.importance import importance
from prefopt.rl.rollouts import Rollouts
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch, Column, LossResult
from prefopt.train.columns import Values
from prefopt.train.objective import Normaliser, Objective


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Advantages and returns of a step, on the CPU in float64.

    ``advantage`` is per token [M] for PPO, per response [N] for RLOO; ``return_M`` is the critic's target.
    """

    advantage: torch.Tensor
    return_M: torch.Tensor | None

    def batch(self, rollouts: Rollouts) -> Batch:
        """The rollouts with columns for :class:`PpoObjective`."""
        columns: dict[str, Column] = {"old_logp_M": rollouts.logp_M.numpy()}
        if self.return_M is None:
            columns["advantage_N"] = self.advantage.numpy()
            return Batch(rollouts.groups, columns)
        assert rollouts.value_M is not None
        columns |= {"advantage_M": self.advantage.numpy(), "return_M": self.return_M.numpy()}
        return Batch(rollouts.groups, columns | {"old_value_M": rollouts.value_M.numpy()})


def final_scores(config: PpoConfig, rollouts: Rollouts) -> torch.Tensor:
    """Scores [N], with the penalty of responses that did not end."""
    penalty, instead = config.missing_eos_penalty, config.missing_eos_score
    return without_end(rollouts.score_N, rollouts.finished_N, penalty=penalty, instead=instead)


def corrected(config: PpoConfig, targets: Targets, rollouts: Rollouts) -> Targets:
    """With ``importance_cap``, advantages are multiplied by truncated importance weights: the clipped loss is linear in
    advantages, so that this weights every row of it."""
    if config.importance_cap is None:
        return targets
    weight = importance(rollouts, config.importance_cap, whole=config.algorithm == "rloo")
    return replace(targets, advantage=targets.advantage * weight)


def targets_of(config: PpoConfig, rollouts: Rollouts, beta: float) -> Targets:
    """Advantages and returns from token rewards, each whitened if configured."""
    length_N = rollouts.length_N
    scores_N = final_scores(config, rollouts)
    reward_M = token_rewards(rollouts.logp_M, rollouts.ref_logp_M, scores_N, length_N, beta)
    if config.algorithm == "rloo":
        return_N = per_response(reward_M, length_N)
        return_N = whiten(return_N, shift_mean=False) if config.whiten_rewards else return_N
        advantage_N = leave_one_out(return_N, rollouts.group_N)
        return Targets(whiten(advantage_N) if config.whiten_advantages else advantage_N, None)
    if config.whiten_rewards:
        reward_M = whiten(reward_M, shift_mean=False)
    assert rollouts.value_M is not None and config.gae_lambda is not None
    advantage_M, return_M = gae(reward_M, rollouts.value_M, length_N, gamma=config.gamma, lam=config.gae_lambda)
    return Targets(whiten(advantage_M) if config.whiten_advantages else advantage_M, return_M)


class PpoObjective(Objective):
    """The clipped policy loss on tokens (PPO) or responses (RLOO) and, with a critic, the clipped value loss.

    Columns: ``old_logp_M`` and, with a critic, ``advantage_M``, ``return_M`` and ``old_value_M``; without one
    ``advantage_N``. Schulman et al. 2017 (arXiv 1707.06347), equation 7; RLOO: Ahmadian et al. 2024 (arXiv 2402.14740).
    """

    def __init__(self, config: PpoConfig, critic: Critic | None, *, device: torch.device) -> None:
        super().__init__(device)
        self.config, self.critic = config, critic
        if critic is not None and critic.scorer is not None:
            self.other_models = (critic.scorer,)

    def normaliser(self, batch: Batch) -> Normaliser:
        """Numbers of tokens and responses in the minibatch."""
        return (torch.tensor(float(batch.length_N.sum())), torch.tensor(float(len(batch.length_N))))

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """Log-probabilities ``logp_M`` and, with a critic, ``value_M``."""
        assert isinstance(scorer, Scorer)
        logp_M, value_M = look(scorer, self.critic, self.config.temperature, packed)
        found = {"logp_M": logp_M}
        if self.critic is None:
            old_M = batch.on_device(logp_M.device)["old_logp_M"].to(logp_M.dtype)
            found |= {"logp_N": response_sums(logp_M, packed), "old_logp_N": response_sums(old_M, packed)}
        return found if value_M is None else {**found, "value_M": value_M}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        tokens, responses = (float(n) for n in normaliser)
        logp_M = values["logp_M"]

        def column(name: str, like: torch.Tensor = logp_M) -> torch.Tensor:
            return batch.on_device(like.device)[name].to(like.dtype)

        old_M = column("old_logp_M")
        if self.critic is None:
            logp_N = values["logp_N"]
            policy = policy_loss(logp_N, values["old_logp_N"], column("advantage_N", logp_N), self.config.clip)
            total = policy.numerator.sum() / responses
        else:
            policy = policy_loss(logp_M, old_M, column("advantage_M"), self.config.clip)
            total = policy.numerator.sum() / tokens
        shares = {"loss/policy_avg": total}
        with torch.no_grad():
            metrics = ratio_metrics(logp_M, old_M)
            metrics["policy/clipfrac_avg"] = counted(policy.clipped)
        if self.critic is not None:
            assert self.config.value_coefficient is not None
            value = value_loss(values["value_M"], column("old_value_M"), column("return_M"), self.config.value_clip)
            shares["loss/value_avg"] = value.numerator.sum() / tokens
            metrics["val/clipfrac_avg"] = counted(value.clipped)
            total = total + self.config.value_coefficient * shares["loss/value_avg"]
        return LossResult(total, {"loss": total, **shares}, metrics)

    def derived(self, record: Record) -> Record:
        """With the variance of the ratio in place of averages of squares."""
        return without_squares(record)


def without_squares(record: Record) -> Record:
    """``record`` with the variance of the ratio in place of averages of squares."""
    found = dict(record)
    found.pop("val/log_ratio_square")
    found["val/ratio_var"] = max(0.0, found.pop("val/ratio_square") - found["val/ratio"] ** 2)
    return found


def ratio_metrics(logp_M: torch.Tensor, old_M: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The policy's change since the responses were drawn."""
    gap_M = logp_M - old_M
    ratio_M = gap_M.exp()
    return {
        "policy/approxkl_avg": counted(k2(gap_M)),
        "policy/entropy_avg": counted(-logp_M),
        "val/ratio": counted(ratio_M),
        "val/ratio_square": counted(ratio_M.square()),
        "val/log_ratio_square": counted(gap_M.square()),
    }


def counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A metric of values that all weigh the same."""
    return x.sum(), x.new_full((), x.numel())


def rollout_metrics(rollouts: Rollouts, score_N: torch.Tensor, targets: Targets, beta: float) -> Record:
    """Metrics of the responses of a step. ``score_N`` includes penalties.

    ``objective/kl`` is the sequence-level k1 on the policy's own samples, ``objective/kl_error`` its standard error,
    ``objective/kl_k3`` the sum over tokens of k3.
    """
    gap_M, length_N = rollouts.logp_M - rollouts.ref_logp_M, rollouts.length_N
    kl_N = per_response(k1(gap_M), length_N)
    n = len(length_N)
    mismatch_M = (rollouts.sampled_logp_M - rollouts.logp_M).abs()
    parts = {
        f"{what}/{name}": found
        for name, part_N in rollouts.part_N.items()
        for what, found in (
            ("objective/scores", float(part_N.mean())),
            ("objective/scores_std", float(part_N.std(unbiased=False))),
        )
    }
    record = {
        **parts,
        "objective/scores": float(rollouts.score_N.mean()),
        "objective/scores_std": float(rollouts.score_N.std(unbiased=False)),
        "objective/kl": float(kl_N.mean()),
        "objective/kl_error": float(kl_N.std()) / n**0.5 if n > 1 else 0.0,
        "objective/kl_k3": float(per_response(k3(gap_M), length_N).mean()),
        "objective/non_score_reward": float(-beta * kl_N.mean()),
        "objective/rlhf_reward": float((score_N - beta * kl_N).mean()),
        "objective/entropy": float(-per_response(rollouts.logp_M, length_N).mean()),
        "objective/beta": beta,
        "val/num_eos_tokens": float(rollouts.finished_N.sum()),
        "val/eos_rate": float(rollouts.finished_N.double().mean()),
        "val/length": float(length_N.double().mean()),
        "val/distinct": float(distinct(rollouts.groups).mean()),
        "val/sampler_gap": float(mismatch_M.mean()),
        "val/sampler_gap_max": float(mismatch_M.max()),
    }
    if targets.return_M is not None and rollouts.value_M is not None:
        spread = float(targets.return_M.var(unbiased=False))
        left = float((targets.return_M - rollouts.value_M).var(unbiased=False))
        record["val/explained_variance"] = 1 - left / spread if spread > 0 else 0.0
    if rollouts.unscored is not None:
        record["objective/unscored"] = float(rollouts.unscored)
    return record


NGRAM = 3
"""Tokens of the n-grams that :func:`distinct` counts."""


def distinct(groups: Sequence[Group]) -> torch.Tensor:
    """The fraction of n-grams of each response [N] that occur in it for the first time: 1 where nothing is repeated,
    near 0 where a phrase is said over and over (Li et al. 2016, arXiv 1510.03055, distinct-n, here within a response).
    A response with fewer tokens than one n-gram repeats nothing."""
    found = []
    for ids in (c.ids.tolist() for g in groups for c in g.continuations):
        grams = [tuple(ids[t : t + NGRAM]) for t in range(len(ids) - NGRAM + 1)]
        found.append(len(set(grams)) / len(grams) if grams else 1.0)
    return torch.tensor(found, dtype=torch.float64)
