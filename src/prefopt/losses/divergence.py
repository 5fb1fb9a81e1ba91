"""What stands for the log-ratio where the pull to the reference is another f-divergence than reverse KL.

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

import torch
import torch.nn.functional as F

from prefopt.losses.declare import LossOption
from prefopt.losses.numeric import expm1_or_line

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

    Exponentials go on as straight lines beyond exp(30) (see :func:`prefopt.losses.numeric.expm1_or_line`).
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
    chosen_ratio_G: torch.Tensor, rejected_ratio_G: torch.Tensor, beta: float, divergence: str, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """beta f'(rho) of both sides of pairs, from their log-ratios."""
    chosen, rejected = (implied(ratio, divergence, alpha) for ratio in (chosen_ratio_G, rejected_ratio_G))
    return beta * chosen, beta * rejected
