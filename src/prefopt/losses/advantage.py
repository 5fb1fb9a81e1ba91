"""From scores of responses to advantages of tokens.

Episodes are ragged and never padded: tensors [M] hold the tokens of all N responses end to end, ``length_N`` says how
many each has. A value is that of the state *before* its token; after the last token there is none, and nothing to
bootstrap from.
"""

from __future__ import annotations

import torch


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
