"""Losses that see each response of a pair by itself: its log-ratio against a fixed point, not against the other's.

Columns are [P], one entry per pair, see :data:`prefopt.losses.declare.INPUTS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.common import BETA, LossOutput, Numerators, Target, logistic, loss_option, pair_output
from prefopt.losses.declare import loss


@loss(
    formula="-log sigmoid(beta (h - lambda max(0, -s(w))))",
    paper="Pal et al. 2024 (Smaug, DPO-Positive), arXiv 2402.13228",
    when="Responses that differ in few tokens: the chosen one must not become less likely than under the reference.",
    options=(
        BETA,
        loss_option("penalty", "lambda: cost of a chosen response that is less likely than before", at_least=0),
    ),
)
def dpop(log_ratio_2P: Tensor, target_P: Target, *, beta: float = 0.3, penalty: float = 50.0) -> Numerators:
    """DPO-Positive, Pal et al. 2024 (arXiv 2402.13228).

    The paper used lambda 50 and beta 0.3. Not a loss on the difference, so that no other divergence is valid.
    """
    chosen, rejected = log_ratio_2P
    fall = torch.relu(-chosen)
    return logistic(beta * (chosen - rejected - penalty * fall), label=target_P), {"fall/chosen": fall}


@loss(
    formula="-log sigmoid(beta (h - alpha (D(l) - sg D(w)))), D(y) = sum over t of KL(ref || pi), sg without gradient",
    paper="Zeng et al. 2024, arXiv 2404.11999, versions TDPO1 and TDPO2",
    when="The divergence itself should stay balanced between chosen and rejected. Needs whole distributions: slower.",
    options=(
        BETA,
        loss_option(
            "version",
            "2: alpha weights the divergences, and the chosen one has no gradient; 1: alpha is 1, and both have"
            " gradients",
            choices=("1", "2"),
        ),
        loss_option("alpha", "weight of the difference of divergences", at_least=0, only=("version", "2")),
    ),
)
def tdpo(
    log_ratio_2P: Tensor,
    logp_2P: Tensor,
    chosen_kl_P: Tensor,
    rejected_kl_P: Tensor,
    target_P: Target,
    *,
    beta: float = 0.1,
    version: str = "2",
    alpha: float = 0.5,
) -> LossOutput:
    r"""Token-level DPO, Zeng et al. 2024 (arXiv 2404.11999).

    With :math:`D(y) = \sum_t \mathrm{KL}(\mathrm{ref}_t \parallel \pi_t)`, of the whole distributions at each token of
    y, TDPO1 is :math:`-\log\sigma(\beta(h - (D_l - D_w)))` and TDPO2
    :math:`-\log\sigma(\beta(h - \alpha(D_l - \mathrm{sg}(D_w))))`. The reward of a response, in the metrics, is
    beta (s + D), as in the paper's code.
    """
    chosen, rejected = log_ratio_2P
    anchor = chosen_kl_P.detach() if version == "2" else chosen_kl_P
    drift = (alpha if version == "2" else 1.0) * (rejected_kl_P - anchor)
    numerator = logistic(beta * (chosen - rejected - drift), label=target_P)
    rewards = beta * (chosen + chosen_kl_P), beta * (rejected + rejected_kl_P)
    return pair_output(numerator, *rewards, *logp_2P, metrics={"kl/chosen": chosen_kl_P, "kl/rejected": rejected_kl_P})


@loss(
    formula="-log sigmoid(r(w)) - log sigmoid(-r(w)) / 2 - log sigmoid(-r(l)) / 2, r = beta s",
    paper="Chen et al. 2024 (NCA), arXiv 2402.05369",
    when="The chosen response's likelihood should not fall: its reward has an optimum of its own.",
)
def nca(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Tensor:
    """Noise contrastive alignment on pairs, Chen et al. 2024 (arXiv 2402.05369)."""
    chosen, rejected = chosen_reward_P, rejected_reward_P
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@loss(
    formula="1 - sigmoid(beta s(w)) + sigmoid(beta s(l))",
    paper="D'Oosterlinck et al. 2024 (APO), arXiv 2408.06266, equation 7",
    when="The chosen responses are better than the model's own: they become more likely, the rejected ones less.",
)
def apo_zero(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Tensor:
    r"""Anchored preference optimisation, zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7.

    1 is added, so that it is not negative.
    """
    # sigmoid(-x), not 1 - sigmoid(x): the value keeps its digits where it is small.
    return torch.sigmoid(-chosen_reward_P) + torch.sigmoid(rejected_reward_P)


@loss(
    formula="sigmoid(beta s(w)) + 1 - sigmoid(beta h)",
    paper="D'Oosterlinck et al. 2024 (APO), arXiv 2408.06266, equation 8",
    when="The model is already better than the chosen responses: both become less likely, the rejected more so.",
)
def apo_down(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Tensor:
    r"""Anchored preference optimisation, down, D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8.

    1 is added, so that it is not negative.
    """
    return torch.sigmoid(chosen_reward_P) + torch.sigmoid(rejected_reward_P - chosen_reward_P)


@loss(
    formula="(s(w) - 1/(2 beta))^2 + (s(l) + 1/(2 beta))^2",
    paper="Wu et al. 2024 (SPPO), arXiv 2405.00675, equation 4.7 with hard labels",
    when="Rounds of self-play on the model's own samples: each response has a target, so that neither diverges.",
    options=(loss_option("beta", "1 / eta of the paper: the targets are +-1 / (2 beta)", above=0),),
)
def sppo_hard(chosen_log_ratio_P: Tensor, rejected_log_ratio_P: Tensor, *, beta: float = 0.1) -> Tensor:
    r"""Self-play preference optimisation with hard labels, Wu et al. 2024 (arXiv 2405.00675), equation 4.7.

    The probability of winning is 1 for the chosen and 0 for the rejected response, where the paper estimates it.
    """
    return (chosen_log_ratio_P - 0.5 / beta) ** 2 + (rejected_log_ratio_P + 0.5 / beta) ** 2
