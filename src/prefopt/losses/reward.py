"""The loss of a reward model: Bradley-Terry on pairs, with margins and centring. Tensors are [R], one per pair."""

from __future__ import annotations

import torch

from prefopt.losses.numeric import logistic


def bradley_terry(
    chosen_reward_R: torch.Tensor,
    rejected_reward_R: torch.Tensor,
    label_R: torch.Tensor | None = None,
    margin_R: torch.Tensor | None = None,
    *,
    centre: float = 0.0,
) -> torch.Tensor:
    r"""Loss of each pair: :math:`-\log\sigma(r_w - r_l - m) + \eta (r_w + r_l)^2`.

    The first term is Bradley and Terry 1952, as Stiennon et al. 2020 (arXiv 2009.01325) take it; the margin m is Llama
    2's (Touvron et al. 2023, arXiv 2307.09288, equation 2); ``centre``, eta, holds the sum of the two rewards near 0,
    which the first term leaves open (Eisenstein et al. 2023, arXiv 2312.09244, equation 4; they took 0.01).
    ``label_R`` is the probability that the chosen response is the better one, 1 where it is not given: the pair counts
    as much the other way round as is left, with the same margin.
    """
    difference = chosen_reward_R - rejected_reward_R
    if margin_R is None:
        loss = logistic(difference, 0.0, label_R)
    else:
        loss = logistic(difference - margin_R)
        if label_R is not None:
            loss = label_R * loss + (1 - label_R) * logistic(-difference - margin_R)
    return loss + centre * (chosen_reward_R + rejected_reward_R).square() if centre else loss
