"""What a loss on pairs can be multiplied by, pair by pair, without gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefopt.losses.declare import LossOption, LossOutput


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
    output: LossOutput, chosen_wpo_G: torch.Tensor, rejected_wpo_G: torch.Tensor, *, clip: bool = False
) -> LossOutput:
    r"""Weighted preference optimisation, Zhou et al. 2024 (arXiv 2406.11827), equation 2 with aligned weights.

    The weight of a pair is :math:`\exp(c_w + c_l)`, c the mean over tokens of :math:`\log(\pi(y_t)/\sum_v \pi(v)^2)`:
    1 where every token is as likely as one drawn from the policy is in the mean. The sum of weights is not divided
    by: pairs that the policy would not write count less. ``clip`` holds the weight at 1, as the authors' code does.
    """
    weight = (chosen_wpo_G + rejected_wpo_G).detach().to(output.numerator_G.dtype).exp()
    if clip:
        weight = weight.clamp(max=1)
    metrics = output.metrics | {"wpo_weight": weight}
    return output._replace(numerator_G=output.numerator_G * weight, metrics=metrics)


WEIGHTINGS = {
    "wpo": Weighting(
        name="wpo",
        formula="loss * exp(c(w) + c(l)), c(y) = mean over tokens of log(pi(token) / sum over vocabulary of pi^2)",
        paper="Zhou et al. 2024 (WPO), arXiv 2406.11827, equation 2",
        when="Pairs that another model wrote: those that the policy would not write count less.",
        inputs=("chosen_wpo_G", "rejected_wpo_G"),
        options=(LossOption(name="clip", default=False, help="hold the weight at 1, as the authors' code does"),),
        function=wpo,
    )
}
