"""What losses share: their output, the metrics of pairs, stable functions, divergences and options.

Divergences are those of Wang, Jiang, Yang, Liu, Chen 2023, *Beyond Reverse KL* (arXiv 2309.16240), table 1: with
rho = pi / ref the implied reward is beta f'(rho), up to a term of the prompt that cancels in the margin of two
responses. They are valid only for losses that see nothing but the margin.

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
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.core.options import Option, bounds


class LossOutput(NamedTuple):
    """The output of a loss on R rows: pairs [P], labelled responses [N] or rankings [G].

    ``weight_R`` is constant with respect to the policy. ``metrics`` [R] carry no gradients and are averaged, without
    NaN, which stands for a row without a value. ``state``: running state after this batch, of losses that keep one.
    """

    numerator_R: Tensor
    weight_R: Tensor
    metrics: dict[str, Tensor]
    state: dict[str, Tensor] | None = None


Numerators = tuple[Tensor, dict[str, Tensor]]
"""Numerators of a loss, and further metrics."""


def pair_output(
    numerator_P: Tensor,
    chosen_reward_P: Tensor,
    rejected_reward_P: Tensor,
    chosen_logp_P: Tensor,
    rejected_logp_P: Tensor,
    *,
    weight_P: Tensor | None = None,
    state: dict[str, Tensor] | None = None,
    metrics: Mapping[str, Tensor] | None = None,
) -> LossOutput:
    """The output of a loss on pairs, of weight 1 by default, with the usual metrics and further ones.

    A tie counts as half correct: equal responses under an untrained policy give an accuracy of 0.5, not 0.
    """
    margin = chosen_reward_P.detach() - rejected_reward_P.detach()
    found = {
        "rewards/chosen": chosen_reward_P,
        "rewards/rejected": rejected_reward_P,
        "rewards/margins": margin,
        "rewards/accuracies": accuracy(margin),
        "logps/chosen": chosen_logp_P,
        "logps/rejected": rejected_logp_P,
        **(metrics or {}),
    }
    weight = torch.ones_like(margin) if weight_P is None else weight_P
    return LossOutput(numerator_P, weight, {name: value.detach() for name, value in found.items()}, state)


def accuracy(margin: Tensor) -> Tensor:
    """1 for a positive margin, 1/2 for zero, 0 for a negative one."""
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)


Target = Tensor | float | None
"""Probability that the chosen response is better; None for 1."""


def smoothed(label: Target, label_smoothing: float, dtype: torch.dtype) -> Target:
    """p (1 - e) + (1 - p) e: the probability p = ``label``, where a fraction e = ``label_smoothing`` is flipped."""
    if label is None and not label_smoothing:
        return None
    right = label.to(dtype) if isinstance(label, Tensor) else 1.0 if label is None else label
    return right * (1 - label_smoothing) + (1 - right) * label_smoothing


def logistic(margin: Tensor, label_smoothing: float = 0.0, label: Target = None) -> Tensor:
    """-p log sigmoid(margin) - (1 - p) log sigmoid(-margin), element by element, with p of :func:`smoothed`."""
    p = smoothed(label, label_smoothing, margin.dtype)
    if p is None:
        return -F.logsigmoid(margin)
    return -p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin)


LINE = 30.0  # exp(30) is 1e13; its square still fits into float32


def expm1_or_line(x: Tensor) -> Tensor:
    """exp(x) - 1 up to x = 30, its tangent beyond: finite, increasing, and with a gradient everywhere."""
    low = x.clamp(max=LINE)  # no gradient where the line takes over
    return torch.expm1(low) + math.exp(LINE) * torch.relu(x - LINE)


def log1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of -log 2."""
    middle = -0.6931471805599453
    near, far = x.clamp(min=middle), x.clamp(max=middle)
    return torch.where(x > middle, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def implied(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(exp(log_ratio)) of a divergence, any shape. Exponentials continue as straight lines beyond exp(30)."""
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 0):
        return log_ratio
    if divergence == "forward_kl":
        return -expm1_or_line(-log_ratio)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    assert divergence == "alpha", divergence
    return -expm1_or_line(-alpha * log_ratio) / alpha


def loss_option(
    name: str,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    only: tuple[str, object] | None = None,
    default: Any = None,
    **limits: float,
) -> Option:
    """An option of a loss; type and default are those of the loss's signature.

    ``limits``: ``at_least``, ``above``, ``at_most``, ``below``. ``only``: another option and the value of it without
    which this one is not read.
    """
    kind: Any = type(default) if isinstance(default, (bool, str)) else float
    text = "required" if default is None else f"{default:g}" if kind is float else str(default)
    return Option(
        name=name,
        help=help,
        type=Literal[choices] if choices else kind,
        group="loss",
        required=default is None,
        default=default,
        default_text=text.lower() if kind is bool else text,
        limits=bounds(**limits),
        only=only,
    )


BETA = loss_option(
    "beta",
    "KL penalty coefficient: larger keeps the policy closer to the reference; 0.01 to 0.5 is usual",
    default=0.1,
    above=0,
)
SMOOTHING = loss_option(
    "label_smoothing", "assumed fraction of wrong labels (conservative DPO)", default=0.0, at_least=0, below=0.5
)
NLL_WEIGHT = loss_option("nll_weight", "weight of the chosen response's negative log-likelihood", at_least=0)
DIVERGENCE = (
    loss_option(
        "divergence",
        "divergence from the reference to regularise with (Wang 2023)",
        choices=DIVERGENCES,
        default="reverse_kl",
    ),
    loss_option(
        "divergence_alpha",
        "0 is reverse_kl, 1 is forward_kl",
        only=("divergence", "alpha"),
        default=0.5,
        at_least=0,
        at_most=1,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """A weight per pair. ``function`` maps the output of a loss, and the inputs, to the weighted output."""

    name: str
    formula: str
    paper: str
    when: str
    inputs: tuple[str, ...]
    options: tuple[Option, ...]
    function: Callable[..., LossOutput]

    @property
    def defaults(self) -> dict[str, Any]:
        return {o.name: o.default for o in self.options}


def wpo(output: LossOutput, chosen_wpo_P: Tensor, rejected_wpo_P: Tensor, *, clip: bool = True) -> LossOutput:
    r"""Weighted preference optimisation, Zhou et al. 2024 (arXiv 2406.11827), equation 2 with aligned weights.

    The weight of a pair is :math:`\exp(c_w + c_l)`, c the mean over tokens of :math:`\log(\pi(y_t)/\sum_v \pi(v)^2)`:
    1 where every token is as likely as a token drawn from the policy is on average. The loss is not divided by the sum
    of weights: pairs that the policy would not write count less. ``clip`` caps the weight at 1, as the authors' code
    does.

    On pairs of another model weights are small, and so are loss and gradient: a 24th of dpo's on a sample of ours. Adam
    does not see the scale, but gradients that ``--max-grad-norm`` would clip for dpo are not clipped here; lower it
    where single batches dominate.
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
        when="Pairs written by another model: pairs that the policy would not write count less.",
        inputs=("chosen_wpo_P", "rejected_wpo_P"),
        options=(loss_option("clip", "cap the weight at 1, as the authors' code does", default=True),),
        function=wpo,
    )
}
