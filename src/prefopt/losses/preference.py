"""Losses on the difference of two log-ratios: DPO and what changes the curve or the scale of it.

Tensors are [G], one entry per pair, as :data:`prefopt.losses.declare.INPUTS` describes them.
"""

from __future__ import annotations

import torch

from prefopt.losses.declare import LossOption, LossOutput, loss
from prefopt.losses.divergence import DIVERGENCE, implied_rewards
from prefopt.losses.metrics import BETA, SMOOTHING, pair_output
from prefopt.losses.numeric import logistic

__all__ = ["LossOutput", "dpo", "hinge", "ipo"]


@loss(
    kind="pairs",
    formula="-log sigmoid(beta h)",
    paper="Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing: Mitchell 2023 (conservative DPO)",
    when="The place to begin. Soft labels and smoothing are for data that people disagree on.",
    options=(BETA, SMOOTHING, *DIVERGENCE),
)
def dpo(
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
    chosen_ref_logp_G: torch.Tensor,
    rejected_ref_logp_G: torch.Tensor,
    label_G: torch.Tensor | None = None,
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
    ``label_G``, the probability that the chosen response is the better one, takes the place of 1 there.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_G - chosen_ref_logp_G, rejected_logp_G - rejected_ref_logp_G, beta, divergence, divergence_alpha
    )
    numerator = logistic(chosen - rejected, label_smoothing, label_G)
    return pair_output(numerator, chosen, rejected, chosen_logp_G, rejected_logp_G)


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
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
    chosen_ref_logp_G: torch.Tensor,
    rejected_ref_logp_G: torch.Tensor,
    chosen_length_G: torch.Tensor,
    rejected_length_G: torch.Tensor,
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
        chosen_logp_G - chosen_ref_logp_G, rejected_logp_G - rejected_ref_logp_G, 1.0, divergence, divergence_alpha
    )
    if average:
        chosen, rejected = chosen / chosen_length_G, rejected / rejected_length_G
    numerator = (chosen - rejected - 1 / (2 * beta)) ** 2
    return pair_output(numerator, beta * chosen, beta * rejected, chosen_logp_G, rejected_logp_G)


@loss(
    kind="pairs",
    formula="max(0, 1 - beta h)",
    paper="Liu et al. 2023 (RSO), arXiv 2309.06657",
    when="A pair stops pulling once its margin is 1: less over-optimisation of what is already told apart.",
    options=(BETA, *DIVERGENCE),
)
def hinge(
    chosen_logp_G: torch.Tensor,
    rejected_logp_G: torch.Tensor,
    chosen_ref_logp_G: torch.Tensor,
    rejected_ref_logp_G: torch.Tensor,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Hinge on normalised likelihoods, Liu et al. 2023 (arXiv 2309.06657): :math:`\max(0, 1 - \beta h)`."""
    chosen, rejected = implied_rewards(
        chosen_logp_G - chosen_ref_logp_G, rejected_logp_G - rejected_ref_logp_G, beta, divergence, divergence_alpha
    )
    numerator = torch.relu(1 - (chosen - rejected))
    return pair_output(numerator, chosen, rejected, chosen_logp_G, rejected_logp_G)
