"""Losses on pairs that need no reference: the policy's own log-probabilities, summed or averaged over tokens."""

from __future__ import annotations

import torch

from prefopt.losses.declare import LossOption, LossOutput, loss
from prefopt.losses.metrics import SMOOTHING, pair_metrics
from prefopt.losses.numeric import logistic

SCALE = LossOption(name="beta", help="scale of the implied reward", above=0)


@loss(
    kind="pairs",
    formula="-log pi(w), over |w|, over the tokens of the whole batch, or as a sum",
    paper="Pang et al. 2024 (Iterative RPO), arXiv 2404.19733, as a second term; else maximum likelihood",
    when="As a second term, such as dpo:1,nll:0.2, where the chosen responses' likelihood must not fall.",
    options=(
        LossOption(
            name="average",
            help="response: the mean over a response's tokens, then over pairs; tokens: over all tokens of the batch;"
            " none: the sum over a response's tokens",
            choices=("response", "tokens", "none"),
        ),
    ),
)
def nll(
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
    chosen_length_G: torch.Tensor,
    *,
    average: str = "response",
) -> LossOutput:
    r"""Negative log-likelihood of the chosen response, as in supervised fine-tuning.

    :math:`-\log\pi_w/|w|` per pair is the term of Iterative RPO (Pang et al. 2024, arXiv 2404.19733, equation 1).
    Sources disagree on the average: TRL's ``sft`` and the second term of its CPO take the mean over all tokens of the
    batch (``tokens``: long responses weigh more), CPO's paper the sum (``none``).
    """
    length = chosen_length_G.to(chosen_logp_G.dtype)
    numerator = -chosen_logp_G / length if average == "response" else -chosen_logp_G
    weight = length if average == "tokens" else torch.ones_like(numerator)
    metrics = pair_metrics(chosen_logp_G, rejected_logp_G, chosen_logp_G, rejected_logp_G)
    return LossOutput(numerator, weight, metrics | {"nll_loss": (-chosen_logp_G / length).detach()})


@loss(
    kind="pairs",
    formula="-log sigmoid(beta (log pi(w)/|w| - log pi(l)/|l|) - gamma)",
    paper="Meng, Xia, Chen 2024, arXiv 2405.14734, equation 6",
    when="No memory or time for a reference. Sensitive to the learning rate: watch a benchmark beside the margin.",
    options=(
        LossOption(name="beta", help="scale of the mean log-probability; the paper took 2 to 10", above=0),
        LossOption(name="gamma", help="margin aimed at; the paper took 0.3 to 1.6 times beta", at_least=0),
        SMOOTHING,
    ),
)
def simpo(
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
    chosen_length_G: torch.Tensor,
    rejected_length_G: torch.Tensor,
    label_G: torch.Tensor | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    r"""SimPO, Meng et al. 2024 (arXiv 2405.14734), equation 6.

    :math:`-\log\sigma(\beta\log\pi_w/|w| - \beta\log\pi_l/|l| - \gamma)`. Their code takes the ratio gamma / beta as
    its option, TRL gamma as here.
    """
    chosen = beta * chosen_logp_G / chosen_length_G
    rejected = beta * rejected_logp_G / rejected_length_G
    numerator = logistic(chosen - rejected - gamma, label_smoothing, label_G)
    metrics = pair_metrics(chosen, rejected, chosen_logp_G, rejected_logp_G)
    return LossOutput(numerator, torch.ones_like(numerator), metrics)
