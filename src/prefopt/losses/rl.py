"""The clipped losses of PPO (Schulman et al. 2017, arXiv 1707.06347), rewards, advantages and the KL penalty.

Losses are numerators per token or response, to be divided by their number in the global minibatch. Episodes are ragged
and never padded: tensors [M] hold the tokens of all N responses one after another, ``length_N`` their numbers of
tokens. A value is that of the state *before* its token; after the last token nothing is bootstrapped.

With ``log_ratio`` = log p(y) - log q(y) at samples y of p (so that r = q / p in Schulman's notation, log r =
-log_ratio), KL(p || q) is the expectation of k1 and of k3; k2 is half the square. See Schulman 2020,
http://joschu.net/blog/kl-approx.html.

As a *reward* k1 is unbiased. As a *loss* differentiated with respect to p's parameters, on samples of p, k2 has the
gradient of KL(p || q), k1's is zero in expectation, and k3's is that of KL(q || p).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.losses.common import logistic


class Clipped(NamedTuple):
    """``numerator`` carries the gradient; ``clipped`` is 1 where the clipped branch was the larger loss, else 0."""

    numerator: Tensor
    clipped: Tensor


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float, clip_high: float | None = None
) -> Clipped:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip_high)), r = exp(logp - old_logp) (equation 7, as a loss).

    Per token for PPO and GRPO; per response, with sums of log-probabilities, for RLOO, and with their means over tokens
    for GSPO. At r = 1 the gradient is that of -A logp: the policy gradient. ``clip_high``, by default ``clip``, is
    DAPO's (Yu et al. 2025, arXiv 2503.14476, equation 10): a larger one leaves unlikely tokens room to grow.
    """
    ratio = torch.exp(logp - old_logp)
    high = clip if clip_high is None else clip_high
    plain, held = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + high)
    return Clipped(torch.maximum(plain, held), (held > plain).to(logp.dtype).detach())


def truncated_importance(logp: Tensor, sampled_logp: Tensor, cap: float) -> Tensor:
    """min(p / q, cap) at samples of q, whose log-probabilities are ``sampled_logp``, for expectations under p.

    Per token, or per response with sums of log-probabilities. Truncated importance sampling (Ionides 2008,
    doi:10.1198/106186008X320456): its variance is bounded, and its bias only underweights what q rarely draws. Per
    token as the rho of V-trace (Espeholt et al. 2018, arXiv 1802.01561, section 4.1).
    """
    return torch.exp(logp - sampled_logp).clamp(max=cap)


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float | None) -> Clipped:
    """Half the larger of (V - R)^2 and (clip(V, V_old - clip, V_old + clip) - R)^2, as in OpenAI's baselines.

    Without ``clip`` half of (V - R)^2.
    """
    plain = (value - target).square()
    if clip is None:
        return Clipped(0.5 * plain, torch.zeros_like(plain).detach())
    near = torch.clamp(value, old_value - clip, old_value + clip)
    held = (near - target).square()
    return Clipped(0.5 * torch.maximum(plain, held), (held > plain).to(value.dtype).detach())


def ends(length_N: Tensor) -> Tensor:
    """Index of each response's last token, [N]."""
    return length_N.cumsum(0) - 1


def owners(length_N: Tensor) -> Tensor:
    """The response that each token belongs to, [M]."""
    return torch.repeat_interleave(torch.arange(len(length_N), device=length_N.device), length_N)


def per_response(value_M: Tensor, length_N: Tensor) -> Tensor:
    """Sums over each response's tokens, [N]."""
    return value_M.new_zeros(len(length_N)).index_add(0, owners(length_N), value_M)


def without_end(
    score_N: Tensor, finished_N: Tensor, *, penalty: float | None = None, instead: float | None = None
) -> Tensor:
    """Scores [N] with a penalty for responses without an end token.

    ``instead`` replaces their score (Stiennon et al. 2020 and Huang et al. 2024, arXiv 2403.17031: -1); ``penalty`` is
    subtracted from it (TRL's missing_eos_penalty).
    """
    if instead is not None:
        return torch.where(finished_N, score_N, torch.full_like(score_N, instead))
    return score_N if penalty is None else torch.where(finished_N, score_N, score_N - penalty)


def token_rewards(logp_M: Tensor, ref_logp_M: Tensor, score_N: Tensor, length_N: Tensor, beta: float) -> Tensor:
    """-beta (log pi - log ref) at every token, and the response's score at its last one, [M].

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2, with the penalty at each token; no gradients.
    """
    return (-beta * (logp_M - ref_logp_M)).index_add(0, ends(length_N), score_N.to(logp_M.dtype))


def gae(reward_M: Tensor, value_M: Tensor, length_N: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages [M] and returns [M] by generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token, and A_t = delta_t + gamma lam A_{t+1}
    (equations 10 and 16); returns, the targets of the critic, are A + V.
    """
    last = ends(length_N)
    next_value_M = torch.cat([value_M[1:], value_M.new_zeros(1)]).index_fill(0, last, 0.0)
    delta_M = reward_M + gamma * next_value_M - value_M
    advantage_M = delta_M.clone()
    # All responses at once, from their ends: one step of the recursion per token of the longest.
    for back in range(1, int(length_N.max())):
        at = (last - back)[length_N > back]
        advantage_M[at] = delta_M[at] + gamma * lam * advantage_M[at + 1]
    return advantage_M, advantage_M + value_M


def leave_one_out(return_N: Tensor, group_N: Tensor) -> Tensor:
    """Each response's return less the mean of the others to the same prompt, [N]: the advantage of RLOO.

    Ahmadian et al. 2024 (arXiv 2402.14740), equation 4. ``group_N`` numbers the prompts from 0. Raises ``ValueError``
    for a prompt with one response.
    """
    groups = int(group_N.max()) + 1
    many_G = torch.bincount(group_N, minlength=groups)
    if int(many_G.min()) < 2:
        raise ValueError("leave-one-out needs at least two responses per prompt")
    sum_G = return_N.new_zeros(groups).index_add(0, group_N, return_N)
    return return_N - (sum_G[group_N] - return_N) / (many_G[group_N] - 1)


STD_FLOOR = 1e-4
"""Added to the deviation of a group: equal scores differ by rounding, which must not become an advantage."""


def group_relative(return_N: Tensor, group_N: Tensor, *, std: bool) -> Tensor:
    """Each response's return less the mean of its group, itself included, [N]: the advantage of GRPO.

    Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1.2. ``std`` divides by the standard deviation of the
    group, as they do; without it prompts that are nearly always or hardly ever answered well do not weigh more than
    others (Liu et al. 2025, Dr. GRPO, arXiv 2503.20783, section 3.1). ``group_N`` numbers the prompts from 0.
    """
    groups = int(group_N.max()) + 1
    many_G = torch.bincount(group_N, minlength=groups).to(return_N.dtype)

    def mean_N(x_N: Tensor) -> Tensor:
        return (return_N.new_zeros(groups).index_add(0, group_N, x_N) / many_G)[group_N]

    gap_N = return_N - mean_N(return_N)
    return gap_N / (mean_N(gap_N.square()).sqrt() + STD_FLOOR) if std else gap_N


def overlong_penalty(length_N: Tensor, longest: int, buffer: int) -> Tensor:
    """0 for responses of up to ``longest - buffer`` tokens, then falling linearly to -1 at ``longest``, [N].

    Yu et al. 2025 (DAPO, arXiv 2503.14476), equation 13, which is added to the score.
    """
    return ((longest - buffer - length_N).double() / buffer).clamp(-1.0, 0.0)


def averaged_tokens(loss_M: Tensor, length_N: Tensor, average: str, longest: int) -> Tensor:
    """The losses of tokens [M] as numerators [M], to be divided by :func:`averaging_weight` of the global batch.

    ``rows``: the mean over responses of each response's mean over tokens (GRPO, arXiv 2402.03300, equation 3), in which
    a token of a long response counts less. ``tokens``: the mean over all tokens (DAPO, arXiv 2503.14476, equation 8).
    ``constant``: the sum over tokens by ``longest``, the same for all responses, and the mean over these (Dr. GRPO,
    arXiv 2503.20783, section 3.2): the gradient of the expected return, up to a factor.
    """
    if average == "rows":
        return loss_M / length_N.to(loss_M.dtype)[owners(length_N)]
    return loss_M / longest if average == "constant" else loss_M


def averaging_weight(length_N: Tensor, average: str) -> Tensor:
    """What :func:`averaged_tokens` are divided by: the number of tokens, or of responses."""
    return length_N.sum().double() if average == "tokens" else length_N.new_tensor(float(len(length_N))).double()


def whiten(x: Tensor, *, shift_mean: bool = True) -> Tensor:
    """``x`` with a standard deviation of 1 and, with ``shift_mean``, a mean of 0; one number is only shifted."""
    mean = x.mean()
    scaled = (x - mean) * torch.rsqrt(x.var(unbiased=False) + 1e-8)
    return scaled if shift_mean else scaled + mean


def k1(log_ratio: Tensor) -> Tensor:
    """log p - log q: unbiased, with high variance (negative at some samples)."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: biased, with low variance where the two are close."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """q / p - 1 + log p - log q: unbiased, and never negative."""
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True, slots=True)
class KlController:
    """The KL penalty coefficient; with a ``target`` in nats per response it adapts over about ``horizon`` episodes.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, with the error clipped at 20 % as in their code.

    >>> KlController(0.15, target=6.0, horizon=10_000).after(kl=12.0, episodes=512).coefficient
    0.151536
    """

    coefficient: float
    target: float | None = None
    horizon: float | None = None

    def after(self, kl: float, episodes: int) -> KlController:
        """The controller for the next batch, after ``episodes`` responses with a mean KL of ``kl`` nats."""
        if self.target is None or self.horizon is None:
            return self
        error = min(0.2, max(-0.2, kl / self.target - 1))
        return self.at(self.coefficient * (1 + error * episodes / self.horizon))

    def at(self, coefficient: float) -> KlController:
        """The same controller at another coefficient, to resume a run."""
        return replace(self, coefficient=coefficient)


def bradley_terry(
    chosen_reward_P: Tensor,
    rejected_reward_P: Tensor,
    label_P: Tensor | None = None,
    margin_P: Tensor | None = None,
    *,
    centre: float = 0.0,
) -> Tensor:
    r"""Loss of each pair: :math:`-\log\sigma(r_w - r_l - m) + \eta (r_w + r_l)^2`.

    The first term is Bradley and Terry 1952, as Stiennon et al. 2020 (arXiv 2009.01325) take it; the margin m is Llama
    2's (Touvron et al. 2023, arXiv 2307.09288, equation 2); ``centre``, eta, keeps the sum of the two rewards, which
    the first term does not determine, near 0 (Eisenstein et al. 2023, arXiv 2312.09244, equation 4; they used 0.01).
    ``label_P`` is the probability that the chosen response is better, 1 by default; the reversed pair counts with the
    remaining probability and the same margin.
    """
    difference = chosen_reward_P - rejected_reward_P
    if margin_P is None:
        loss = logistic(difference, 0.0, label_P)
    else:
        loss = logistic(difference - margin_P)
        if label_P is not None:
            loss = label_P * loss + (1 - label_P) * logistic(-difference - margin_P)
    return loss + centre * (chosen_reward_P + rejected_reward_P).square() if centre else loss
