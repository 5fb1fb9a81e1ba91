"""Losses on the difference of two log-ratios: DPO and what changes the curve or the scale of it.

Tensors are [P], one entry per pair, as :data:`prefopt.losses.declare.INPUTS` describes them.

Tensors are [P], one entry per pair, as :data:`prefopt.losses.declare.INPUTS` describes them.
"""

from __future__ import annotations

import torch

from prefopt.losses.common import BETA, DIVERGENCE, NLL_WEIGHT, SMOOTHING, implied_rewards, logistic, pair_output
from prefopt.losses.declare import LossOption, LossOutput, loss

__all__ = ["LossOutput", "dpo", "hinge", "ipo"]


@loss(
    kind="pairs",
    formula="-log sigmoid(beta h)",
    paper="Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing: Mitchell 2023 (conservative DPO)",
    when="The place to begin. Soft labels and smoothing are for data that people disagree on.",
    options=(BETA, SMOOTHING, *DIVERGENCE),
)
def dpo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Direct Preference Optimization, Rafailov et al. 2023 (arXiv 2305.18290), equation 7.

    With :math:`h = (\log\pi_w - \log\mathrm{ref}_w) - (\log\pi_l - \log\mathrm{ref}_l)` the loss of a pair is
    :math:`-\log\sigma(\beta h)`.

    ``label_smoothing`` e, in [0, 0.5), assumes that this part of the labels is flipped (conservative DPO, Mitchell
    2023): :math:`-(1-e)\log\sigma(\beta h) - e\log\sigma(-\beta h)`, least where :math:`\sigma(\beta h) = 1-e`.
    ``label_P``, the probability that the chosen response is the better one, takes the place of 1 there.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    numerator = logistic(chosen - rejected, label_smoothing, label_P)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="(s(w)/|w| - s(l)/|l| - 1/(2 beta))^2, or with sums",
    paper="Azar et al. 2023, arXiv 2310.12036, equation 17",
    when="Labels that are close to deterministic: the margin has a target, so that the pull to the reference stays.",
    options=(
        LossOption(name="beta", help="tau of the paper: the margin aimed at is 1 / (2 beta)", above=0),
        LossOption(
            name="average",
            help="log-ratios as means over tokens (as TRL does, on its authors' word of what the paper ran) or, false,"
            " as sums (the paper's formula, and the original DPO repository)",
        ),
        *DIVERGENCE,
    ),
)
def ipo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    rejected_length_P: torch.Tensor,
    *,
    beta: float = 0.1,
    average: bool = True,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Identity Preference Optimization, Azar et al. 2023 (arXiv 2310.12036), equation 17.

    :math:`(h - 1/(2\beta))^2`. Sources disagree on the scale of h: the formula has sums over tokens, TRL divides each
    log-ratio by its length and says that the authors confirmed it. ``average`` chooses; beta means something else in
    each (an average of 5 nats per token, for beta 0.1, is a long way).
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, 1.0, divergence, divergence_alpha
    )
    if average:
        chosen, rejected = chosen / chosen_length_P, rejected / rejected_length_P
    numerator = (chosen - rejected - 1 / (2 * beta)) ** 2
    return pair_output(numerator, beta * chosen, beta * rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="max(0, 1 - beta h)",
    paper="Liu et al. 2023 (RSO), arXiv 2309.06657",
    when="A pair stops pulling once its margin is 1: less over-optimisation of what is already told apart.",
    options=(BETA, *DIVERGENCE),
)
def hinge(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Hinge on normalised likelihoods, Liu et al. 2023 (arXiv 2309.06657): :math:`\max(0, 1 - \beta h)`."""
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    numerator = torch.relu(1 - (chosen - rejected))
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-log sigmoid(beta (h - lambda max(0, -s(w))))",
    paper="Pal et al. 2024 (Smaug, DPO-Positive), arXiv 2402.13228",
    when="Responses that differ in few tokens: the chosen one must not become less likely than under the reference.",
    options=(
        BETA,
        LossOption(name="penalty", help="lambda: how much a fall of the chosen response costs", at_least=0),
        SMOOTHING,
    ),
)
def dpop(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 0.3,
    penalty: float = 50.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    r"""DPO-Positive, Pal et al. 2024 (arXiv 2402.13228).

    :math:`-\log\sigma(\beta(h - \lambda\max(0, \log\mathrm{ref}_w - \log\pi_w)))`; the paper took lambda 50 and beta
    0.3. Not a loss on the difference, so that no other divergence is valid.
    """
    chosen = chosen_logp_P - chosen_ref_logp_P
    rejected = rejected_logp_P - rejected_ref_logp_P
    fall = torch.relu(-chosen)
    more = {"fall/chosen": fall}
    numerator = logistic(beta * (chosen - rejected - penalty * fall), label_smoothing, label_P)
    return pair_output(numerator, beta * chosen, beta * rejected, chosen_logp_P, rejected_logp_P, more=more)


@loss(
    kind="pairs",
    formula="-log sigmoid(beta h) - nll_weight log pi(w) / |w|",
    paper="Pang et al. 2024 (Iterative RPO), arXiv 2404.19733, equation 1",
    when="Reasoning and code, where the chosen answer is right: its likelihood is held up.",
    options=(BETA, NLL_WEIGHT, SMOOTHING, *DIVERGENCE),
)
def rpo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""DPO with the negative log-likelihood of the chosen response, Pang et al. 2024 (arXiv 2404.19733), equation 1.

    :math:`-\log\sigma(\beta h) - \alpha\log\pi_w/|w|`: the same as the sum ``dpo:1,nll:alpha``.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    nll = -chosen_logp_P / chosen_length_P
    numerator = logistic(chosen - rejected, label_smoothing, label_P) + nll_weight * nll
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P, more={"nll_loss": nll})


@loss(
    kind="pairs",
    formula="-log sigmoid(beta (h - alpha (D(l) - sg D(w)))), D(y) = sum over t of KL(ref || pi), sg without gradient",
    paper="Zeng et al. 2024, arXiv 2404.11999, versions TDPO1 and TDPO2",
    when="The divergence itself should stay balanced between chosen and rejected. Needs whole distributions: slower.",
    options=(
        BETA,
        LossOption(
            name="version",
            help="2: alpha weighs the divergences, and none flows back through the chosen one; 1: alpha is 1, and both"
            " carry gradients",
            choices=("1", "2"),
        ),
        LossOption(name="alpha", help="weight of the difference of divergences", at_least=0, only=("version", "2")),
        SMOOTHING,
    ),
)
def tdpo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    chosen_kl_P: torch.Tensor,
    rejected_kl_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    version: str = "2",
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> LossOutput:
    r"""Token-level DPO, Zeng et al. 2024 (arXiv 2404.11999).

    With :math:`D(y) = \sum_t \mathrm{KL}(\mathrm{ref}_t \parallel \pi_t)`, of the whole distributions at each token of
    y, TDPO1 is :math:`-\log\sigma(\beta(h - (D_l - D_w)))` and TDPO2
    :math:`-\log\sigma(\beta(h - \alpha(D_l - \mathrm{sg}(D_w))))`. The reward of a response, in the metrics, is
    beta (s + D), as in the paper's code.
    """
    chosen = chosen_logp_P - chosen_ref_logp_P
    rejected = rejected_logp_P - rejected_ref_logp_P
    anchor = chosen_kl_P.detach() if version == "2" else chosen_kl_P
    drift = (alpha if version == "2" else 1.0) * (rejected_kl_P - anchor)
    numerator = logistic(beta * (chosen - rejected - drift), label_smoothing, label_P)
    more = {"kl/chosen": chosen_kl_P, "kl/rejected": rejected_kl_P}
    rewards = beta * (chosen + chosen_kl_P), beta * (rejected + rejected_kl_P)
    return pair_output(numerator, *rewards, chosen_logp_P, rejected_logp_P, more=more)
