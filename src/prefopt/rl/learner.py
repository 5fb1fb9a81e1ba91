"""PPO's and RLOO's loss on packed minibatches of rollouts, whose advantages are computed once for all its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
from prefopt.model.kernels.distributions import TokenScores
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import Scorer, response_sums
from prefopt.rl.critic import Critic, hidden_wanted
from prefopt.rl.rollouts import Rollouts
from prefopt.runs.metrics import Record
from prefopt.train.results import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnOptions:
    """See :class:`prefopt.config.ppo.PpoConfig` for each."""

    algorithm: str
    clip: float
    whiten_advantages: bool
    whiten_rewards: bool
    gamma: float
    gae_lambda: float | None = None
    value_clip: float | None = None
    value_coefficient: float | None = None
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What the responses of a step are to be moved by, on the CPU, float64.

    ``advantage`` is per token [M] for PPO, per response [N] for RLOO; ``return_M`` is what the critic is to learn.
    """

    advantage: torch.Tensor
    return_M: torch.Tensor | None


class Learner:
    """``targets`` of rollouts, and the loss of a part of them."""

    def __init__(self, options: LearnOptions, scorer: Scorer, critic: Critic | None, temperature: float) -> None:
        self.options, self.scorer, self.critic, self.temperature = options, scorer, critic, temperature

    def train(self, mode: bool = True) -> None:
        """Into training mode, or out of it, both networks."""
        self.scorer.train(mode)
        if self.critic is not None:
            self.critic.train(mode)

    def scores(self, rollouts: Rollouts) -> torch.Tensor:
        """Scores [N] after what is done to responses that did not end."""
        o = self.options
        return without_end(
            rollouts.score_N, rollouts.finished_N, penalty=o.missing_eos_penalty, instead=o.missing_eos_score
        )

    def targets(self, rollouts: Rollouts, beta: float) -> Targets:
        """Rewards of tokens, whitened where asked, to advantages, whitened where asked."""
        o, length_N = self.options, rollouts.length_N
        reward_M = token_rewards(rollouts.logp_M, rollouts.ref_logp_M, self.scores(rollouts), length_N, beta)
        if o.algorithm == "rloo":
            return_N = per_response(reward_M, length_N)
            return_N = whiten(return_N, shift_mean=False) if o.whiten_rewards else return_N
            advantage_N = leave_one_out(return_N, rollouts.group_N)
            return Targets(whiten(advantage_N) if o.whiten_advantages else advantage_N, None)
        if o.whiten_rewards:
            reward_M = whiten(reward_M, shift_mean=False)
        assert rollouts.value_M is not None and o.gae_lambda is not None
        advantage_M, return_M = gae(reward_M, rollouts.value_M, length_N, gamma=o.gamma, lam=o.gae_lambda)
        return Targets(whiten(advantage_M) if o.whiten_advantages else advantage_M, return_M)

    def look(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities [M] at the sampling temperature, and values [M] where there is a critic."""
        with self.scorer.at_temperature(self.temperature):
            found = self.scorer(batch, hidden_wanted(self.critic))
        logp_M, hidden_M = (found.logp_M, found.hidden_M) if isinstance(found, TokenScores) else (found, None)
        return logp_M, None if self.critic is None else self.critic.values(batch, hidden_M)

    def loss(
        self,
        rollouts: Rollouts,
        targets: Targets,
        part: Sequence[int],
        batch: PackedBatch,
        tokens: int,
        responses: int,
    ) -> Outcome:
        """The share of the groups ``part``, packed as ``batch``, in a minibatch of so many tokens and responses."""
        at_M = rollouts.tokens_of(part)
        logp_M, value_M = self.look(batch)

        def here(x: torch.Tensor, at: torch.Tensor = at_M) -> torch.Tensor:
            return x[at].to(logp_M.device, logp_M.dtype)

        old_M = here(rollouts.logp_M)
        if self.options.algorithm == "rloo":
            logp_N, old_N = (response_sums(x, batch) for x in (logp_M, old_M))
            advantage_N = targets.advantage[rollouts.responses_of(part)].to(logp_N.device, logp_N.dtype)
            policy, many = policy_loss(logp_N, old_N, advantage_N, self.options.clip), responses
        else:
            policy, many = policy_loss(logp_M, old_M, here(targets.advantage), self.options.clip), tokens
        total = policy.numerator.sum() / many
        shares = {"loss/policy_avg": total}
        with torch.no_grad():
            metrics = _ratio_metrics(logp_M, old_M)
            metrics["policy/clipfrac_avg"] = _counted(policy.clipped)
        if value_M is not None:
            assert targets.return_M is not None and rollouts.value_M is not None
            assert self.options.value_coefficient is not None
            value = value_loss(value_M, here(rollouts.value_M), here(targets.return_M), self.options.value_clip)
            shares["loss/value_avg"] = value.numerator.sum() / tokens
            metrics["val/clipfrac_avg"] = _counted(value.clipped)
            total = total + self.options.value_coefficient * shares["loss/value_avg"]
        return Outcome(total, {"loss": total, **shares}, metrics, {})


def _ratio_metrics(logp_M: torch.Tensor, old_M: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """How far the policy has moved since the responses were drawn."""
    gap_M = logp_M - old_M
    ratio_M = gap_M.exp()
    return {
        "policy/approxkl_avg": _counted(k2(gap_M)),
        "policy/entropy_avg": _counted(-logp_M),
        "val/ratio": _counted(ratio_M),
        "val/ratio_square": _counted(ratio_M.square()),
        "val/log_ratio_square": _counted(gap_M.square()),
    }


def _counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.sum(), x.new_tensor(float(x.numel()))


def rollout_metrics(rollouts: Rollouts, score_N: torch.Tensor, targets: Targets, beta: float) -> Record:
    """What the responses of a step tell, before anything is learned from them; ``score_N`` after penalties.

    ``objective/kl`` is the sequence-level k1 on the policy's own samples, ``objective/kl_error`` its standard error,
    ``objective/kl_k3`` the sum over tokens of k3.
    """
    gap_M, length_N = rollouts.logp_M - rollouts.ref_logp_M, rollouts.length_N
    kl_N = per_response(k1(gap_M), length_N)
    n = len(length_N)
    mismatch_M = (rollouts.sampled_logp_M - rollouts.logp_M).abs()
    record = {
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
        "val/sampler_gap": float(mismatch_M.mean()),
        "val/sampler_gap_max": float(mismatch_M.max()),
    }
    if targets.return_M is not None and rollouts.value_M is not None:
        spread = float(targets.return_M.var(unbiased=False))
        left = float((targets.return_M - rollouts.value_M).var(unbiased=False))
        record["val/explained_variance"] = 1 - left / spread if spread > 0 else 0.0
    return record
