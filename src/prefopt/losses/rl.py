"""The clipped losses of PPO (Schulman et al. 2017, arXiv 1707.06347): numerators per token or per response, to be
divided by how many there are in the global minibatch.

Episodes are ragged and never padded: tensors [M] hold the tokens of all N responses end to end, ``length_N`` says how
many each has. A value is that of the state *before* its token; after the last token there is none, and nothing to
bootstrap from.

With ``log_ratio`` = log p(y) - log q(y) at samples y of p (so that r = q / p in Schulman's notation, log r =
-log_ratio), KL(p || q) is the expectation of k1 and of k3; k2 is half the square. See Schulman 2020,
http://joschu.net/blog/kl-approx.html.

As a *reward* k1 is unbiased. As a *loss* differentiated with respect to p's parameters, on samples of p, k2 has the
gradient of KL(p || q), k1's is zero in expectation, and k3's is that of KL(q || p).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from prefopt.losses.common import logistic


class Clipped(NamedTuple):
    """``numerator`` carries the gradient; ``clipped`` is 1 where the clipped branch was the larger loss, else 0."""

    numerator: torch.Tensor
    clipped: torch.Tensor


def policy_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, clip: float) -> Clipped:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(logp - old_logp) (equation 7, as a loss).

    Of tokens for PPO; of whole responses, whose log-probabilities are sums, for RLOO. At r = 1 its gradient is that of
    -A logp: the policy gradient.
    """
    ratio = torch.exp(logp - old_logp)
    plain, held = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return Clipped(torch.maximum(plain, held), (held > plain).to(logp.dtype).detach())


def value_loss(value: torch.Tensor, old_value: torch.Tensor, target: torch.Tensor, clip: float | None) -> Clipped:
    """Half the larger of (V - R)^2 and (clip(V, V_old - clip, V_old + clip) - R)^2, as OpenAI's baselines have it.

    Without ``clip`` half of (V - R)^2.
    """
    plain = (value - target).square()
    if clip is None:
        return Clipped(0.5 * plain, torch.zeros_like(plain).detach())
    near = torch.clamp(value, old_value - clip, old_value + clip)
    held = (near - target).square()
    return Clipped(0.5 * torch.maximum(plain, held), (held > plain).to(value.dtype).detach())


def ends(length_N: torch.Tensor) -> torch.Tensor:
    """Index of each response's last token, [N]."""
    return length_N.cumsum(0) - 1


def owners(length_N: torch.Tensor) -> torch.Tensor:
    """The response that each token belongs to, [M]."""
    return torch.repeat_interleave(torch.arange(len(length_N), device=length_N.device), length_N)


def per_response(value_M: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
    """Sums over each response's tokens, [N]."""
    return value_M.new_zeros(len(length_N)).index_add(0, owners(length_N), value_M)


def without_end(
    score_N: torch.Tensor, finished_N: torch.Tensor, *, penalty: float | None = None, instead: float | None = None
) -> torch.Tensor:
    """Scores [N] where responses that did not end by themselves are worse.

    ``instead`` takes the place of their score (Stiennon et al. 2020 and Huang et al. 2024, arXiv 2403.17031: -1);
    ``penalty`` is subtracted from it (what TRL's missing_eos_penalty does). Neither: scores stay as they are.
    """
    if instead is not None:
        return torch.where(finished_N, score_N, torch.full_like(score_N, instead))
    return score_N if penalty is None else torch.where(finished_N, score_N, score_N - penalty)


def token_rewards(
    logp_M: torch.Tensor, ref_logp_M: torch.Tensor, score_N: torch.Tensor, length_N: torch.Tensor, beta: float
) -> torch.Tensor:
    """-beta (log pi - log ref) at every token, and the response's score at its last one, [M].

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2, with the penalty where it arises; all three without gradient.
    """
    return (-beta * (logp_M - ref_logp_M)).index_add(0, ends(length_N), score_N.to(logp_M.dtype))


def gae(
    reward_M: torch.Tensor, value_M: torch.Tensor, length_N: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [M] and returns [M] by generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t, where V behind the last token is 0, and A_t = delta_t + gamma lam A_{t+1}
    (equations 10 and 16); returns are A + V, what the critic is to learn.
    """
    last = ends(length_N)
    next_value_M = torch.cat([value_M[1:], value_M.new_zeros(1)]).index_fill(0, last, 0.0)
    delta_M = reward_M + gamma * next_value_M - value_M
    advantage_M = delta_M.clone()
    # All responses at once, from their ends: a step of the recursion for each token of the longest.
    for back in range(1, int(length_N.max())):
        at = (last - back)[length_N > back]
        advantage_M[at] = delta_M[at] + gamma * lam * advantage_M[at + 1]
    return advantage_M, advantage_M + value_M


def leave_one_out(return_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """Each response's return less the mean of the others to the same prompt, [N]: the advantage of RLOO.

    Ahmadian et al. 2024 (arXiv 2402.14740), equation 4. ``group_N`` numbers the prompts from 0; a prompt with one
    response has nothing to compare with. Raises ``ValueError`` there.
    """
    groups = int(group_N.max()) + 1
    many_G = torch.bincount(group_N, minlength=groups)
    if int(many_G.min()) < 2:
        raise ValueError("leave-one-out needs two responses to every prompt at least")
    sum_G = return_N.new_zeros(groups).index_add(0, group_N, return_N)
    return return_N - (sum_G[group_N] - return_N) / (many_G[group_N] - 1)


def whiten(x: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """``x`` with a standard deviation of 1 and, with ``shift_mean``, a mean of 0: over all real tokens, as there are no
    others. One number alone is only shifted."""
    mean = x.mean()
    scaled = (x - mean) * torch.rsqrt(x.var(unbiased=False) + 1e-8)
    return scaled if shift_mean else scaled + mean


def k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, and of high variance (it is negative at some samples)."""
    return log_ratio


def k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """(log p - log q)^2 / 2: biased, of low variance where the two are near."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """q / p - 1 + log p - log q: unbiased, and never negative."""
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True, slots=True)
class FixedKl:
    """A coefficient of the penalty that stays, beta."""

    coefficient: float

    def after(self, kl: float, episodes: int) -> FixedKl:
        """The same, whatever the divergence was."""
        return self

    def at(self, coefficient: float) -> FixedKl:
        """The same at another coefficient: where an interrupted run was."""
        return FixedKl(coefficient)


@dataclass(frozen=True, slots=True)
class AdaptiveKl:
    """A coefficient that brings the divergence to ``target`` nats per response, over about ``horizon`` episodes.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, with the error clipped at 20 % as in their code.

    >>> AdaptiveKl(0.15, target=6.0, horizon=10_000).after(kl=12.0, episodes=512).coefficient
    0.151536
    """

    coefficient: float
    target: float
    horizon: float

    def after(self, kl: float, episodes: int) -> AdaptiveKl:
        """The controller for the next batch, where ``episodes`` responses had a mean divergence of ``kl`` nats."""
        error = min(0.2, max(-0.2, kl / self.target - 1))
        return self.at(self.coefficient * (1 + error * episodes / self.horizon))

    def at(self, coefficient: float) -> AdaptiveKl:
        """The same at another coefficient: where an interrupted run was."""
        return AdaptiveKl(coefficient, self.target, self.horizon)


KlController = FixedKl | AdaptiveKl


def bradley_terry(
    chosen_reward_P: torch.Tensor,
    rejected_reward_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    margin_P: torch.Tensor | None = None,
    *,
    centre: float = 0.0,
) -> torch.Tensor:
    r"""Loss of each pair: :math:`-\log\sigma(r_w - r_l - m) + \eta (r_w + r_l)^2`.

    The first term is Bradley and Terry 1952, as Stiennon et al. 2020 (arXiv 2009.01325) take it; the margin m is Llama
    2's (Touvron et al. 2023, arXiv 2307.09288, equation 2); ``centre``, eta, holds the sum of the two rewards near 0,
    which the first term leaves open (Eisenstein et al. 2023, arXiv 2312.09244, equation 4; they took 0.01).
    ``label_P`` is the probability that the chosen response is the better one, 1 where it is not given: the pair counts
    as much the other way round as is left, with the same margin.
    """
    difference = chosen_reward_P - rejected_reward_P
    if margin_P is None:
        loss = logistic(difference, 0.0, label_P)
    else:
        loss = logistic(difference - margin_P)
        if label_P is not None:
            loss = label_P * loss + (1 - label_P) * logistic(-difference - margin_P)
    return loss + centre * (chosen_reward_P + rejected_reward_P).square() if centre else loss
