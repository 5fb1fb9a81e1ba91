"""The mathematics of preference optimisation, exact, on spaces so small that every response can be listed.

Arrays end in Y, the responses to one prompt; leading axes may be prompts. Everything is float64 and logarithmic where
it can be. The way from the objective of RLHF to the loss of DPO, with the numbers of Rafailov et al. 2023 (arXiv
2305.18290)::

    max over pi of  E_pi[r] - beta KL(pi || ref)                    (3)    objective
    pi*(y) = ref(y) exp(r(y) / beta) / Z                            (4)    optimal_logp, log_partition
    r(y) = beta log(pi*(y) / ref(y)) + beta log Z                   (5)    implied_reward
    p(y1 > y2) = sigma(r(y1) - r(y2)), where log Z cancels          (6)    bradley_terry
    -E log sigma(r(y1) - r(y2))                                     (2)    reward_model_loss
    -E log sigma(beta log-ratio(y1) - beta log-ratio(y2))           (7)    dpo_loss

>>> ref, reward = normalised([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 0.0])
>>> best = optimal_logp(ref, reward, beta=0.5)
>>> gap = objective(best, ref, reward, beta=0.5) - objective(ref, ref, reward, beta=0.5)
>>> bool(np.isclose(gap, 0.5 * kl(ref, best)))  # what is lost is beta times the divergence from the optimum
True
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, log_softmax, logsumexp

FloatArray = npt.NDArray[np.float64]
Floats = npt.ArrayLike


def _array(x: Floats) -> FloatArray:
    return np.asarray(x, np.float64)


def responses(vocabulary: int, longest: int, stop: int) -> list[tuple[int, ...]]:
    """Every response of at most ``longest`` tokens: those that end with ``stop``, and those that are cut off.

    >>> responses(2, 2, stop=1)
    [(1,), (0, 0), (0, 1)]
    """
    found: list[tuple[int, ...]] = []
    others = [token for token in range(vocabulary) if token != stop]
    for length in range(1, longest + 1):
        for start in itertools.product(others, repeat=length - 1):
            found += [(*start, t) for t in range(vocabulary) if t == stop or length == longest]
    return found


def normalised(score: Floats) -> FloatArray:
    """Log-probabilities [..., Y] in proportion to exp(score)."""
    return _array(log_softmax(score, axis=-1))


# -- the objective and its optimum ---------------------------------------------------------------------------------


def expected(logp: Floats, value: Floats) -> FloatArray:
    """Expectation [...] of ``value`` [..., Y] under probabilities exp(logp)."""
    return _array((np.exp(_array(logp)) * _array(value)).sum(axis=-1))


def kl(logp: Floats, other: Floats) -> FloatArray:
    """KL(p || q) [...] in nats, exact; both arguments are log-probabilities [..., Y]."""
    return expected(logp, _array(logp) - _array(other))


def total_variation(logp: Floats, other: Floats) -> FloatArray:
    """Half the sum of absolute differences of probabilities, [...]."""
    return _array(0.5 * np.abs(np.exp(_array(logp)) - np.exp(_array(other))).sum(axis=-1))


def objective(logp: Floats, ref: Floats, reward: Floats, beta: float) -> FloatArray:
    """E_pi[r] - beta KL(pi || ref), [...]: what RLHF maximises (equation 3)."""
    return expected(logp, reward) - beta * kl(logp, ref)


def log_partition(ref: Floats, reward: Floats, beta: float) -> FloatArray:
    """log Z = log sum over y of ref(y) exp(r(y) / beta), [..., 1] (below equation 4)."""
    return _array(logsumexp(_array(ref) + _array(reward) / beta, axis=-1, keepdims=True))


def optimal_logp(ref: Floats, reward: Floats, beta: float) -> FloatArray:
    """log pi* [..., Y], pi* = ref exp(r / beta) / Z: no policy has a larger objective (equation 4)."""
    return _array(ref) + _array(reward) / beta - log_partition(ref, reward, beta)


def implied_reward(logp: Floats, ref: Floats, beta: float, log_z: Floats = 0.0) -> FloatArray:
    """beta log(pi / ref) + beta log Z: the reward that ``logp`` is the optimum of (equation 5).

    With ``log_z`` at 0 it is the member of its class whose partition function is 1 (theorem 1).
    """
    return beta * (_array(logp) - _array(ref)) + beta * _array(log_z)


# -- preferences ---------------------------------------------------------------------------------------------------


def bradley_terry(reward: Floats) -> FloatArray:
    """p[..., i, j] = sigma(r_i - r_j): the probability that i is preferred to j (equation 1)."""
    r = _array(reward)
    return _array(expit(r[..., :, None] - r[..., None, :]))


def plackett_luce(reward: Floats, ranking: Sequence[int]) -> float:
    """log-probability that responses come in the order ``ranking``, best first (appendix A.3 of the paper).

    The best of those that are left is drawn in proportion to exp(r), again and again; for two it is Bradley-Terry.
    """
    r = _array(reward)[list(ranking)]
    return float(sum(r[k] - logsumexp(r[k:]) for k in range(len(r))))


def same_class(one: Floats, other: Floats, tolerance: float = 1e-12) -> bool:
    """Whether two rewards [..., Y] differ by a function of the prompt alone: then they give the same preferences and
    the same optimal policy (lemmas 1 and 2)."""
    gap = _array(one) - _array(other)
    return bool(np.all(np.abs(gap - gap.mean(axis=-1, keepdims=True)) <= tolerance))


def representative(reward: Floats, ref: Floats, beta: float) -> FloatArray:
    """r - beta log Z: the one reward of the class whose partition function is 1, which a policy can express
    (theorem 1, and the projection below it)."""
    return _array(reward) - beta * log_partition(ref, reward, beta)


# -- losses --------------------------------------------------------------------------------------------------------


def pair_weights(preference: Floats, drawn: Floats) -> FloatArray:
    """w[i, j]: how often i is preferred to j where both are drawn independently from probabilities ``drawn`` [Y]."""
    mu = _array(drawn)
    return mu[:, None] * mu[None, :] * _array(preference)


def reward_model_loss(reward: Floats, weight: Floats) -> float:
    """The sum over pairs of -w[i, j] log p(i > j) = -w[i, j] log sigma(r_i - r_j), of rewards [Y] (equation 2)."""
    r = _array(reward)
    return float(-(_array(weight) * log_expit(r[:, None] - r[None, :])).sum())


def dpo_loss(logp: Floats, ref: Floats, weight: Floats, beta: float) -> float:
    """The loss of a reward model whose reward is the policy's own, beta log(pi / ref) (equation 7)."""
    return reward_model_loss(implied_reward(logp, ref, beta), weight)


def dpo_gradient(logp: Floats, ref: Floats, weight: Floats, beta: float) -> FloatArray:
    """Its derivative [Y] with respect to each log pi(y), the others held: section 4 of the paper, where a pair weighs
    beta sigma(r_l - r_w), which is large where it is ordered wrongly."""
    h = beta * (_array(logp) - _array(ref))
    pull = beta * _array(weight) * expit(h[None, :] - h[:, None])
    return _array(pull.sum(axis=0) - pull.sum(axis=1))


def through_softmax(gradient: Floats, logp: Floats) -> FloatArray:
    """A derivative with respect to log-probabilities [Y] as one with respect to the logits they come from."""
    g = _array(gradient)
    return _array(g - _array(np.exp(_array(logp))) * g.sum(axis=-1, keepdims=True))


def ipo_loss(logp: Floats, ref: Floats, weight: Floats, tau: float) -> float:
    """The sum over pairs of w[i, j] (h_i - h_j - 1 / (2 tau))^2 (Azar et al. 2023, arXiv 2310.12036, equation 17)."""
    h = _array(logp) - _array(ref)
    return float((_array(weight) * (h[:, None] - h[None, :] - 0.5 / tau) ** 2).sum())


def ipo_optimum(preference: Floats, drawn: Floats, ref: Floats, tau: float) -> FloatArray:
    """log pi* [Y] of IPO: ref exp(p(y > drawn) / tau), normalised (Azar et al. 2023, equation 7 with Psi the identity).

    Unlike the optimum of Bradley-Terry it stays near the reference where labels are deterministic: no log-ratio is
    larger than 1 / tau.
    """
    return optimal_logp(ref, _array(preference) @ _array(drawn), tau)
