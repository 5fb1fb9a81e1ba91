"""Losses on pairs that sort or measure the whole global batch.

Tensors are [P], one entry per pair of the *global* batch, as :data:`prefopt.losses.declare.INPUTS` describes them.
"""

from __future__ import annotations

import torch

from prefopt.losses.common import BETA, SMOOTHING, hashed, logistic, pair_output
from prefopt.losses.declare import LOSSES, LossOption, LossOutput, loss

BETA_FLOOR = 1e-3


@loss(
    kind="pairs",
    formula="-log sigmoid(beta d(i)), d = sorted(log pi(w) - log pi(l)) - sorted(log ref(w) - log ref(l))",
    paper="Melnyk et al. 2024 (AOT, paired), arXiv 2406.05882",
    when="Margins are to beat the reference's as a distribution, quantile by quantile, not pair by pair.",
    options=(BETA, SMOOTHING),
    whole_batch=True,
    per_row=False,
)
def aot(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    r"""Alignment via optimal transport on paired data, Melnyk et al. 2024 (arXiv 2406.05882).

    The margins of policy and of reference, :math:`\log\pi_w - \log\pi_l` and :math:`\log\mathrm{ref}_w -
    \log\mathrm{ref}_l`, are sorted over the batch; the loss is logistic on the differences of equal rank.
    """
    policy = torch.sort(chosen_logp_P - rejected_logp_P).values
    reference = torch.sort(chosen_ref_logp_P - rejected_ref_logp_P).values
    numerator = logistic(beta * (policy - reference), label_smoothing)
    chosen, rejected = beta * (chosen_logp_P - chosen_ref_logp_P), beta * (rejected_logp_P - rejected_ref_logp_P)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-log sigmoid(beta d(i)), d = sorted(s(w)) - sorted(s(l))",
    paper="Melnyk et al. 2024 (AOT, unpaired), arXiv 2406.05882",
    when="Chosen and rejected responses do not belong together, or pairs carry little: distributions are compared.",
    options=(BETA, SMOOTHING),
    whole_batch=True,
    per_row=False,
)
def aot_unpaired(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    r"""Alignment via optimal transport on unpaired data, Melnyk et al. 2024 (arXiv 2406.05882).

    The log-ratios of chosen and of rejected responses are sorted over the batch, each by itself; the loss is logistic
    on the differences of equal rank.
    """
    chosen, rejected = beta * (chosen_logp_P - chosen_ref_logp_P), beta * (rejected_logp_P - rejected_ref_logp_P)
    numerator = logistic(torch.sort(chosen).values - torch.sort(rejected).values, label_smoothing)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-log sigmoid(b h), b = beta (1 + alpha (mean h of the batch - running mean of h))",
    paper="Wu et al. 2024 (beta-DPO), arXiv 2407.08639",
    when="Pairs of mixed quality: batches with wide margins are held closer to the reference, outliers are left out.",
    options=(
        BETA,
        LossOption(name="alpha", help="how strongly beta follows the batch's mean log-ratio difference", at_least=0),
        LossOption(name="momentum", help="of the running mean", at_least=0, below=1),
        LossOption(name="keep", help="part of the pairs that count", above=0, at_most=1),
        LossOption(
            name="filter",
            help="which pairs count. nearest: those whose h is nearest the running mean; drawn: by lot, with chances"
            " that fall with the distance as a Gaussian of the running deviation does (the authors' code)",
            choices=("nearest", "drawn"),
        ),
        SMOOTHING,
    ),
    whole_batch=True,
    state0={"mean": 0.0, "deviation": 0.0, "batches": 0.0},
    notes="beta moves with the batch and carries no gradient: the loss itself need not fall while margins grow.",
)
def beta_dpo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
    keep: float = 0.8,
    filter: str = "nearest",
    label_smoothing: float = 0.0,
    state: dict[str, torch.Tensor] | None = None,
) -> LossOutput:
    r"""DPO with a beta per batch, Wu et al. 2024 (arXiv 2407.08639).

    :math:`m \leftarrow \mu m + (1-\mu)\overline h`, then :math:`b = \beta(1 + \alpha(\overline h_{kept} - m))`, at
    least 0.001 and without gradient, and :math:`-\log\sigma(b h)` over the pairs that are kept; the others weigh 0.

    Two places where sources differ. The paper measures with :math:`\beta h`, its code with h, as here: alpha of the
    paper is alpha / beta here. The code draws the pairs that count without replacement, each with a chance
    proportional to :math:`e^{-(h-m)^2/2v^2}`, v the running deviation of h (``drawn``); ``nearest`` takes the likeliest
    ones, so that a batch gives one result. A draw depends on how many batches there were and on nothing else, so that
    a resumed run draws the same. ``state`` holds m, v and the number of batches.
    """
    chosen, rejected = chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P
    difference = chosen - rejected
    state = state or LOSSES["beta_dpo"].start(chosen.device)
    assert state is not None
    seen = difference.detach().to(state["mean"].dtype)
    mean = momentum * state["mean"] + (1 - momentum) * seen.mean()
    spread = seen.std() if len(seen) > 1 else torch.zeros_like(mean)
    deviation = momentum * state["deviation"] + (1 - momentum) * spread
    count = max(1, int(keep * len(seen) + 1e-9))
    far = (seen - mean).abs() if filter == "nearest" else _lots(seen, mean, deviation, state["batches"])
    kept = torch.topk(far, count, largest=False).indices
    weight = torch.zeros_like(difference.detach()).index_fill(0, kept, 1.0)
    used = (beta * (1 + alpha * (seen[kept].mean() - mean))).clamp(min=BETA_FLOOR).to(difference.dtype)
    numerator = weight * logistic(used * difference, label_smoothing, label_P)
    rewards = beta * chosen, beta * rejected
    more = {"beta": used.expand_as(weight), "kept": weight}
    new = {"mean": mean, "deviation": deviation, "batches": state["batches"] + 1}
    return pair_output(numerator, *rewards, chosen_logp_P, rejected_logp_P, weight_R=weight, state=new, more=more)


def _lots(seen: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, batches: torch.Tensor) -> torch.Tensor:
    """Numbers [G] of which the k least are a draw of k without replacement, by the Gaussian's chances.

    Log-chances with Gumbel noise give that in log space, where a narrow Gaussian leaves no chance at zero. The noise
    goes by rank, so that the order of a batch does not matter.
    """
    rank = torch.argsort(torch.argsort(seen))
    chance = hashed(rank * 0x9E3779B9 + hashed(batches.long() + 1)).to(seen.dtype) + 0.5
    gumbel = -torch.log(-torch.log((chance / 2**32).clamp(max=1 - 1e-7)))
    return 0.5 * ((seen - mean) / deviation.clamp(min=1e-6)) ** 2 - gumbel
