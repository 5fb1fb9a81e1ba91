"""Losses on pairs without a reference: log-probabilities of the policy, as sums or means over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.losses.common import NLL_WEIGHT, LossOutput, Target, implied, log1m_exp, logistic, loss_option, pair_output
from prefopt.losses.declare import loss


@loss(
    formula="-log pi(w), over |w|, over the tokens of the whole batch, or as a sum",
    paper="Pang et al. 2024 (Iterative RPO), arXiv 2404.19733, as a second term; else maximum likelihood",
    when="As a second term, such as dpo:1,nll:0.2, to keep up the likelihood of the chosen responses.",
    options=(
        loss_option(
            "average",
            "response: mean over a response's tokens, then over pairs; tokens: mean over all tokens of the batch; none:"
            " sum over a response's tokens",
            choices=("response", "tokens", "none"),
        ),
    ),
)
def nll(logp_2P: Tensor, chosen_length_P: Tensor, *, average: str = "response") -> LossOutput:
    r"""Negative log-likelihood of the chosen response, as in supervised fine-tuning.

    The mean per pair is the term of Iterative RPO (Pang et al. 2024, arXiv 2404.19733, equation 1). Sources disagree on
    the average: TRL's ``sft`` and the second term of its CPO take the mean over all tokens of the batch (``tokens``:
    long responses weigh more), CPO's paper the sum (``none``).
    """
    chosen = logp_2P[0]
    length = chosen_length_P.to(chosen.dtype)
    numerator = -chosen / length if average == "response" else -chosen
    weight = length if average == "tokens" else torch.ones_like(numerator)
    return pair_output(numerator, *logp_2P, *logp_2P, weight_P=weight, metrics={"nll_loss": -chosen / length})


@loss(
    formula="-log pi(w) + alpha log pi(l)",
    paper="Rafailov et al. 2023 (DPO), arXiv 2305.18290, section 6: a baseline",
    when="As a baseline: pairs have no weights, and the paper saw meaningless text on summaries.",
    options=(
        loss_option("alpha", "weight of the rejected response; the paper used 0 to 1", at_least=0, at_most=1),
        loss_option("average", "log-probabilities as means over tokens; false: as sums (the paper)"),
    ),
    notes="It has no lower bound: the likelihood of the rejected response can fall without end.",
)
def unlikelihood(logp_2P: Tensor, length_2P: Tensor, *, alpha: float = 0.5, average: bool = False) -> LossOutput:
    r"""The unlikelihood baseline of DPO's paper, Rafailov et al. 2023 (arXiv 2305.18290), section 6.

    The probability of the chosen response is raised, that of the rejected one lowered. Welleck et al. 2019 (arXiv
    1908.04319), whose name it borrows, lower it by :math:`-\log(1 - p)` of each token instead.
    """
    chosen, rejected = logp_2P / length_2P if average else logp_2P
    metrics = {"nll_loss": -logp_2P[0] / length_2P[0]}
    return pair_output(alpha * rejected - chosen, chosen, rejected, *logp_2P, metrics=metrics)


@loss(
    formula="-log sigmoid(beta (log pi(w)/|w| - log pi(l)/|l|) - gamma)",
    paper="Meng, Xia, Chen 2024, arXiv 2405.14734, equation 6",
    when="No memory or time for a reference. Sensitive to the learning rate: watch a benchmark beside the margin.",
    options=(
        loss_option("beta", "scale of the mean log-probability; the paper used 2 to 10", above=0),
        loss_option("gamma", "target margin; a quarter to a half of beta is usual", at_least=0),
    ),
)
def simpo(logp_2P: Tensor, length_2P: Tensor, target_P: Target, *, beta: float = 2.0, gamma: float = 0.5) -> LossOutput:
    """SimPO, Meng et al. 2024 (arXiv 2405.14734), equation 6.

    The option of their code is gamma / beta, by default 0.25; TRL's is gamma, as here, by default 0.5. Both are a gamma
    of 0.5 at beta 2. Raise it with beta.
    """
    reward_2P = beta * logp_2P / length_2P
    return pair_output(logistic(reward_2P[0] - reward_2P[1] - gamma, label=target_P), *reward_2P, *logp_2P)


@loss(
    formula="-log sigmoid(r(w) - r(l) - gamma), r = beta (1 - p^-alpha) / alpha, p = pi^(1/|y|)",
    paper="Gupta et al. 2025 (AlphaPO), arXiv 2501.03884",
    when="SimPO with a reward other than the logarithm: alpha controls how far likelihoods move.",
    options=(
        loss_option("beta", "scale of the reward", above=0),
        loss_option("alpha", "curvature of the reward; 0 is simpo", at_least=-10, at_most=10),
        loss_option("gamma", "target margin", at_least=0),
    ),
    notes="p^-alpha grows without bound as p falls: beyond exp(30) it continues as a straight line.",
)
def alphapo(
    logp_2P: Tensor, length_2P: Tensor, target_P: Target, *, beta: float = 2.0, alpha: float = 0.25, gamma: float = 0.5
) -> LossOutput:
    """AlphaPO, Gupta et al. 2025 (arXiv 2501.03884)."""
    reward_2P = beta * implied(logp_2P / length_2P, "alpha", alpha)
    return pair_output(logistic(reward_2P[0] - reward_2P[1] - gamma, label=target_P), *reward_2P, *logp_2P)


@loss(
    formula="-log sigmoid(beta (log pi(w) - log pi(l))) - nll_weight log pi(w) / |w|",
    paper="Xu et al. 2024 (CPO), arXiv 2401.08417",
    when="DPO with a uniform reference and a likelihood term on the chosen responses (translation).",
    options=(
        loss_option("beta", "scale of the log-probability", above=0),
        NLL_WEIGHT,
        loss_option("average", "the likelihood as a mean over the response's tokens; false: as a sum (the paper)"),
    ),
)
def cpo(
    logp_2P: Tensor,
    chosen_length_P: Tensor,
    target_P: Target,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    average: bool = True,
) -> LossOutput:
    r"""Contrastive preference optimisation, Xu et al. 2024 (arXiv 2401.08417).

    Sources disagree on the second term: a sum in the paper, the mean over all tokens of the batch in TRL. Here it is
    the mean over the response's tokens; ``average`` false is the paper's, and ``cpo:1,nll:1`` with ``cpo.nll_weight=0``
    and ``nll.average=tokens`` TRL's.
    """
    reward_2P = beta * logp_2P
    nll = -logp_2P[0] / chosen_length_P
    numerator = logistic(reward_2P[0] - reward_2P[1], label=target_P)
    numerator = numerator + nll_weight * (nll if average else -logp_2P[0])
    return pair_output(numerator, *reward_2P, *logp_2P, metrics={"nll_loss": nll})


@loss(
    formula="-log p(w) - beta log sigmoid(log odds(w) - log odds(l)), p = pi^(1/|y|), odds = p / (1 - p)",
    paper="Hong, Lee, Thorne 2024 (ORPO), arXiv 2403.07691, equations 6 and 7",
    when="From a base model in one stage: the likelihood term is the fine-tuning. No reference.",
    options=(loss_option("beta", "lambda of the paper: weight of the odds ratio", above=0),),
    notes="The odds diverge where p is 1: log p is clamped to -1e-6 in 1 - p.",
)
def orpo(logp_2P: Tensor, length_2P: Tensor, target_P: Target, *, beta: float = 0.1) -> LossOutput:
    r"""Odds ratio preference optimisation, Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7.

    Sources disagree on the first term: TRL takes it over the tokens of prompt and response, the paper (and this
    function) over the response's.
    """
    mean_2P = logp_2P / length_2P
    log_odds_2P = mean_2P - log1m_exp(mean_2P.clamp(max=-1e-6))
    ratio = log_odds_2P[0] - log_odds_2P[1]
    odds = logistic(ratio, label=target_P)
    metrics = {"nll_loss": -mean_2P[0], "log_odds_ratio": -odds, "log_odds_chosen": ratio}
    return pair_output(beta * odds - mean_2P[0], *(beta * mean_2P), *logp_2P, metrics=metrics)


@loss(
    formula="max(0, delta - log pi(w) + log pi(l)) - nll_weight log pi(w)",
    paper="Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425",
    when="A hinge on sequence likelihoods; instead of a reference only a likelihood term.",
    options=(
        loss_option("delta", "target margin of the log-probability", at_least=0),
        NLL_WEIGHT,
        loss_option("average", "all log-probabilities as means over tokens; false: as sums (the paper)"),
    ),
)
def slic_hf(
    logp_2P: Tensor, length_2P: Tensor, *, delta: float = 1.0, nll_weight: float = 0.1, average: bool = False
) -> LossOutput:
    r"""Sequence likelihood calibration from feedback, Zhao et al. 2023 (arXiv 2305.10425).

    The likelihood term is of the chosen response here; the paper also uses that of supervised fine-tuning.
    """
    chosen, rejected = logp_2P / length_2P if average else logp_2P
    numerator = torch.relu(delta - chosen + rejected) - nll_weight * chosen
    metrics = {"nll_loss": -logp_2P[0] / length_2P[0]}
    return pair_output(numerator, chosen, rejected, *logp_2P, metrics=metrics)
