"""What losses share: the metrics that every loss on pairs gives, under the names that dashboards know, and options.

Wang, Jiang, Yang, Liu, Chen 2023, *Beyond Reverse KL* (arXiv 2309.16240), table 1: with rho = pi / ref
the implied reward is beta f'(rho) plus a term of the prompt alone, which falls out of a difference of two responses.
Only losses that see nothing but the difference are valid with it.

| name | f'(rho) up to a constant, with s = log rho |
| --- | --- |
| reverse_kl | s |
| forward_kl | 1 - exp(-s) |
| js | log 2 + log sigmoid(s), which is log(2 rho / (1 + rho)) |
| alpha | (1 - exp(-alpha s)) / alpha: reverse KL at alpha 0, forward KL at alpha 1 |

Some code writes alpha the other way round, as (exp((a - 1) s) - 1) / (a - 1): that is alpha = 1 - a.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from prefopt.losses.declare import LossOption, LossOutput

BETA = LossOption(name="beta", help="strength of the pull to the reference; 0.01 to 0.5 is usual", above=0)
SMOOTHING = LossOption(
    name="label_smoothing", help="assumed part of labels that are wrong (conservative DPO)", at_least=0, below=0.5
)


NLL_WEIGHT = LossOption(name="nll_weight", help="weight of the chosen response's negative log-likelihood", at_least=0)


def pair_output(
    numerator_R: torch.Tensor,
    chosen_reward_P: torch.Tensor,
    rejected_reward_P: torch.Tensor,
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    *,
    weight_R: torch.Tensor | None = None,
    state: dict[str, torch.Tensor] | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
) -> LossOutput:
    """The output of a loss on pairs, each of weight 1 unless told, with rewards as the loss implies them.

    Metrics carry no gradients. A tie is half right: equal responses under an untrained policy give an accuracy of 0.5,
    not 0. ``more`` are further metrics.
    """
    margin = chosen_reward_P.detach() - rejected_reward_P.detach()
    metrics = {
        "rewards/chosen": chosen_reward_P.detach(),
        "rewards/rejected": rejected_reward_P.detach(),
        "rewards/margins": margin,
        "rewards/accuracies": right(margin),
        "logps/chosen": chosen_logp_P.detach(),
        "logps/rejected": rejected_logp_P.detach(),
    }
    metrics |= {name: value.detach() for name, value in (more or {}).items()}
    return LossOutput(numerator_R, torch.ones_like(margin) if weight_R is None else weight_R, metrics, state)


def right(margin: torch.Tensor) -> torch.Tensor:
    """1 where the margin is positive, 1/2 where it is zero, 0 below."""
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)


LINE = 30.0  # exp(30) is 1e13; its square still fits into float32


def expm1_or_line(x: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 up to x = 30, and its tangent there beyond: finite, rising, and with a gradient everywhere."""
    low = x.clamp(max=LINE)  # passes no gradient where the line has taken over
    return torch.expm1(low) + math.exp(LINE) * torch.relu(x - LINE)


def log1m_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of -log 2."""
    middle = -0.6931471805599453
    near, far = x.clamp(min=middle), x.clamp(max=middle)
    return torch.where(x > middle, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def logistic(margin: torch.Tensor, label_smoothing: float = 0.0, label: torch.Tensor | None = None) -> torch.Tensor:
    """-p log sigmoid(margin) - (1 - p) log sigmoid(-margin), element by element.

    p is the probability that the chosen response is the better one: ``label``, or 1 where there is none, of which
    ``label_smoothing`` e is assumed to be flipped: p (1 - e) + (1 - p) e.
    """
    if label is None and not label_smoothing:
        return -F.logsigmoid(margin)
    right = 1.0 if label is None else label.to(margin.dtype)
    p = right * (1 - label_smoothing) + (1 - right) * label_smoothing
    return -p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin)


def hashed(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers [...] below 2^32 that look drawn at random, the same for the same int64 ``x``, on any device.

    A generator's state would have to be told to the device and be waited for.
    """
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """A weight per pair, declared; ``function`` maps a loss's output and the inputs to the weighted output."""

    name: str
    formula: str
    paper: str
    when: str
    inputs: tuple[str, ...]
    options: tuple[LossOption, ...]
    function: Callable[..., LossOutput]


def wpo(
    output: LossOutput, chosen_wpo_P: torch.Tensor, rejected_wpo_P: torch.Tensor, *, clip: bool = False
) -> LossOutput:
    r"""Weighted preference optimisation, Zhou et al. 2024 (arXiv 2406.11827), equation 2 with aligned weights.

    The weight of a pair is :math:`\exp(c_w + c_l)`, c the mean over tokens of :math:`\log(\pi(y_t)/\sum_v \pi(v)^2)`:
    1 where every token is as likely as one drawn from the policy is in the mean. The sum of weights is not divided
    by: pairs that the policy would not write count less. ``clip`` holds the weight at 1, as the authors' code does.
    """
    weight = (chosen_wpo_P + rejected_wpo_P).detach().to(output.numerator_R.dtype).exp()
    if clip:
        weight = weight.clamp(max=1)
    metrics = output.metrics | {"wpo_weight": weight}
    return output._replace(numerator_R=output.numerator_R * weight, metrics=metrics)


WEIGHTINGS = {
    "wpo": Weighting(
        name="wpo",
        formula="loss * exp(c(w) + c(l)), c(y) = mean over tokens of log(pi(token) / sum over vocabulary of pi^2)",
        paper="Zhou et al. 2024 (WPO), arXiv 2406.11827, equation 2",
        when="Pairs that another model wrote: those that the policy would not write count less.",
        inputs=("chosen_wpo_P", "rejected_wpo_P"),
        options=(LossOption(name="clip", default=False, help="hold the weight at 1, as the authors' code does"),),
        function=wpo,
    )
}


DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")

DIVERGENCE = (
    LossOption(
        name="divergence",
        help="divergence from the reference whose optimum is sought (Wang 2023)",
        choices=DIVERGENCES,
    ),
    LossOption(
        name="divergence_alpha",
        help="0 is reverse_kl, 1 is forward_kl",
        at_least=0,
        at_most=1,
        only=("divergence", "alpha"),
    ),
)


def implied(log_ratio: torch.Tensor, divergence: str, alpha: float) -> torch.Tensor:
    """f'(exp(log_ratio)) of the named divergence, any shape; ``alpha`` counts for ``alpha`` alone.

    Exponentials go on as straight lines beyond exp(30) (see :func:`prefopt.losses.common.expm1_or_line`).
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 0):
        return log_ratio
    if divergence == "forward_kl":
        return -expm1_or_line(-log_ratio)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    assert divergence == "alpha", divergence
    return -expm1_or_line(-alpha * log_ratio) / alpha


def implied_rewards(
    chosen_ratio_P: torch.Tensor, rejected_ratio_P: torch.Tensor, beta: float, divergence: str, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """beta f'(rho) of both sides of pairs, from their log-ratios."""
    chosen, rejected = (implied(ratio, divergence, alpha) for ratio in (chosen_ratio_P, rejected_ratio_P))
    return beta * chosen, beta * rejected
