"""Losses that see each response of a pair by itself: its log-ratio against a fixed point, not against the other's.

Tensors are [P], one entry per pair, as :data:`prefopt.losses.declare.INPUTS` describes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prefopt.losses.common import BETA, pair_output
from prefopt.losses.declare import LOSSES, LossOption, LossOutput, loss


@loss(
    kind="pairs",
    formula="-log sigmoid(r(w)) - log sigmoid(-r(w)) / 2 - log sigmoid(-r(l)) / 2, r = beta s",
    paper="Chen et al. 2024 (NCA), arXiv 2402.05369",
    when="The chosen response's likelihood should not fall: its reward has an optimum of its own.",
    options=(BETA,),
)
def nca(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
) -> LossOutput:
    r"""Noise contrastive alignment on pairs, Chen et al. 2024 (arXiv 2402.05369).

    :math:`-\log\sigma(r_w) - \tfrac12\log\sigma(-r_w) - \tfrac12\log\sigma(-r_l)` with :math:`r = \beta s`.
    """
    chosen, rejected = beta * (chosen_logp_P - chosen_ref_logp_P), beta * (rejected_logp_P - rejected_ref_logp_P)
    numerator = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="1 - sigmoid(beta s(w)) + sigmoid(beta s(l))",
    paper="D'Oosterlinck et al. 2024 (APO), arXiv 2408.06266, equation 7",
    when="The chosen responses are better than what the model writes: they become likelier, the rejected less so.",
    options=(BETA,),
)
def apo_zero(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
) -> LossOutput:
    r"""Anchored preference optimisation, zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7.

    :math:`-\sigma(\beta s_w) + \sigma(\beta s_l)`, here with 1 added so that it is not negative.
    """
    chosen, rejected = beta * (chosen_logp_P - chosen_ref_logp_P), beta * (rejected_logp_P - rejected_ref_logp_P)
    # sigmoid(-x), not 1 - sigmoid(x): the value keeps its digits where it is small.
    numerator = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="sigmoid(beta s(w)) + 1 - sigmoid(beta h)",
    paper="D'Oosterlinck et al. 2024 (APO), arXiv 2408.06266, equation 8",
    when="The model already writes better than the chosen responses: both fall, the rejected further.",
    options=(BETA,),
)
def apo_down(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
) -> LossOutput:
    r"""Anchored preference optimisation, down, D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8.

    :math:`\sigma(\beta s_w) - \sigma(\beta h)`, here with 1 added so that it is not negative.
    """
    chosen, rejected = beta * (chosen_logp_P - chosen_ref_logp_P), beta * (rejected_logp_P - rejected_ref_logp_P)
    numerator = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="(s(w) - 1/(2 beta))^2 + (s(l) + 1/(2 beta))^2",
    paper="Wu et al. 2024 (SPPO), arXiv 2405.00675, equation 4.7 with hard labels",
    when="Rounds of self-play on the model's own samples: each side has a target, so that neither runs away.",
    options=(LossOption(name="beta", help="1 / eta of the paper: the targets are +-1 / (2 beta)", above=0),),
)
def sppo_hard(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
) -> LossOutput:
    r"""Self-play preference optimisation with hard labels, Wu et al. 2024 (arXiv 2405.00675), equation 4.7.

    :math:`(s_w - \tfrac1{2\beta})^2 + (s_l + \tfrac1{2\beta})^2`: the probability of winning is taken as 1 for the
    chosen and 0 for the rejected response, where the paper estimates it.
    """
    chosen, rejected = chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P
    numerator = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return pair_output(numerator, beta * chosen, beta * rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-log sigmoid(r(w) - delta) - log sigmoid(-(r(l) - delta)), r = beta s, delta the mean reward so far",
    paper="Jung et al. 2024 (BCO), arXiv 2404.04656",
    when="A classifier of good and bad: an upper bound of DPO's loss that the shift makes tight.",
    options=(
        BETA,
        LossOption(name="shift", help="subtract delta; false takes 0, as TRL's bco_pair does"),
        LossOption(
            name="decay",
            help="what the mean remembers: 1 all batches alike (TRL's own BCO trainer), 0 this batch alone, between"
            " them older batches less and less",
            at_least=0,
            at_most=1,
            only=("shift", True),
        ),
    ),
    whole_batch=True,
    state0={"mean": 0.0, "count": 0.0},
)
def bco(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
    shift: bool = True,
    decay: float = 1.0,
    state: dict[str, torch.Tensor] | None = None,
) -> LossOutput:
    r"""Binary classifier optimisation, Jung et al. 2024 (arXiv 2404.04656).

    :math:`-\log\sigma(r_w - \delta) - \log\sigma(-(r_l - \delta))`, :math:`r = \beta s`. Delta, without gradient, is
    the mean reward of all responses, chosen and rejected; sources differ on what they average over, and some code has
    no delta at all: ``decay`` and ``shift``. This batch counts before delta is used. ``state`` holds the mean and how
    many rewards it stands for. For thumbs up and down without pairs there is ``bco_unpaired``.
    """
    chosen, rejected = beta * (chosen_logp_P - chosen_ref_logp_P), beta * (rejected_logp_P - rejected_ref_logp_P)
    state = state or LOSSES["bco"].start(chosen.device)
    assert state is not None
    rewards = torch.cat([chosen, rejected]).detach().to(state["mean"].dtype)
    count = decay * state["count"] + len(rewards)
    mean = state["mean"] + (rewards.sum() - len(rewards) * state["mean"]) / count
    delta = mean.to(chosen.dtype) if shift else torch.zeros_like(mean, dtype=chosen.dtype)
    numerator = -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
    new = {"mean": mean, "count": count}
    more = {"delta": delta.expand_as(numerator)}
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P, state=new, more=more)
