"""More losses on the difference of two log-ratios: other curves, other lengths, and terms beside it.

Tensors are [P], one entry per pair, as :data:`prefopt.losses.declare.INPUTS` describes them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from prefopt.losses.common import BETA, DIVERGENCE, SMOOTHING, implied_rewards, logistic, pair_output
from prefopt.losses.declare import LossOption, LossOutput, loss


@loss(
    kind="pairs",
    formula="[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e)",
    paper="Chowdhury, Kini, Natarajan 2024 (rDPO), arXiv 2403.00409",
    when="A known part e of the labels is flipped at random: the mean over flips is the loss on clean labels.",
    options=(
        BETA,
        LossOption(name="label_smoothing", help="e, the part of labels that are flipped", at_least=0, below=0.5),
        *DIVERGENCE,
    ),
    notes="For e above 0 the loss falls without bound as the margin grows: stop early.",
)
def robust(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Provably robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409).

    :math:`[(1-e) L(w, l) - e L(l, w)]/(1-2e)` with DPO's L: an unbiased estimate of the loss on clean labels where a
    part e of them is flipped at random; dpo where e is 0. Not bounded below for e > 0.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    margin, e = chosen - rejected, label_smoothing
    numerator = (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-log sigmoid(beta (s(w)/|w| - s(l)/|l|))",
    paper="Lambert et al. 2024 (Tulu 3), arXiv 2411.15124",
    when="Responses of very different lengths: the mean over tokens gives length no weight. beta about 5.",
    options=(
        LossOption(name="beta", help="scale of the mean log-ratio per token; about 5", above=0),
        SMOOTHING,
        *DIVERGENCE,
    ),
)
def sigmoid_norm(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    rejected_length_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Length-normalised DPO, Lambert et al. 2024 (arXiv 2411.15124).

    :math:`-\log\sigma(\beta s_w/|w| - \beta s_l/|l|)`. With another divergence f'(rho) of the whole response is what
    is divided by the length, as TRL does.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    chosen, rejected = chosen / chosen_length_P, rejected / rejected_length_P
    numerator = logistic(chosen - rejected, label_smoothing, label_P)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-log sigmoid(beta h + alpha (|w| - |l|))",
    paper="Park, Rafailov, Ermon, Finn 2024, arXiv 2403.19159",
    when="Answers grow longer than they should: what length explains of a preference is not learned.",
    options=(
        BETA,
        LossOption(name="alpha", help="reward that is put down to one token more; the paper's scale is 0.01"),
        SMOOTHING,
        *DIVERGENCE,
    ),
    notes="Some code subtracts the length term; a negative alpha gives that.",
)
def r_dpo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    rejected_length_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Length-regularised DPO, Park et al. 2024 (arXiv 2403.19159).

    The reward less :math:`\alpha|y|` is what is maximised, so that the reward itself is :math:`\beta s(y) + \alpha|y|`
    up to a term of the prompt: :math:`-\log\sigma(\beta h + \alpha|w| - \alpha|l|)`. A pair whose chosen response is
    the longer one is explained by that in part, and pulls less. Written with the other sign (some code), the formula
    rewards length; a negative ``alpha`` gives it.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    longer = (chosen_length_P - rejected_length_P).to(chosen.dtype)
    numerator = logistic(chosen - rejected + alpha * longer, label_smoothing, label_P)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-log sigmoid(beta h'), where in s'(y) the tokens beyond the first min(|w|, |l|) weigh alpha",
    paper="Liu et al. 2024, arXiv 2409.06411",
    when="Length leaks into the reward, but what long answers say at their end should count a little.",
    options=(
        BETA,
        LossOption(name="alpha", help="weight of tokens beyond the shorter length; 1 is dpo", at_least=0, at_most=1),
        SMOOTHING,
        *DIVERGENCE,
    ),
)
def ld_dpo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    chosen_head_logp_P: torch.Tensor,
    rejected_head_logp_P: torch.Tensor,
    chosen_head_ref_logp_P: torch.Tensor,
    rejected_head_ref_logp_P: torch.Tensor,
    label_P: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Length-desensitised DPO, Liu et al. 2024 (arXiv 2409.06411).

    With m = min(|w|, |l|), a log-probability is :math:`\log\pi(y_{\le m}) + \alpha\log\pi(y_{>m}|y_{\le m})`: at alpha
    1 it is DPO, at 0 what the longer response has more does not count.
    """

    def weighted(whole: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return head + alpha * (whole - head)

    chosen_ratio = weighted(chosen_logp_P, chosen_head_logp_P) - weighted(chosen_ref_logp_P, chosen_head_ref_logp_P)
    rejected_ratio = weighted(rejected_logp_P, rejected_head_logp_P) - weighted(
        rejected_ref_logp_P, rejected_head_ref_logp_P
    )
    chosen, rejected = implied_rewards(chosen_ratio, rejected_ratio, beta, divergence, divergence_alpha)
    numerator = logistic(chosen - rejected, label_smoothing, label_P)
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="KL([sigmoid(beta h), sigmoid(-beta h)] || [1 - e, e])",
    paper="Ji et al. 2024 (EXO), arXiv 2402.00856, equation 16",
    when="The reverse direction of DPO's divergence: seeks a mode of the preference instead of covering it.",
    options=(
        BETA,
        LossOption(
            name="label_smoothing", help="e, the part of labels taken for wrong; 0.001 in the paper", above=0, below=0.5
        ),
        *DIVERGENCE,
    ),
)
def exo(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.001,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Efficient exact optimisation, EXO-pref, Ji et al. 2024 (arXiv 2402.00856), equation 16 with two responses.

    With :math:`q = \sigma(\beta h)` the loss is :math:`q\log\frac{q}{1-e} + (1-q)\log\frac{1-q}{e}`.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    log_q, log_other = F.logsigmoid(chosen - rejected), F.logsigmoid(rejected - chosen)
    numerator = log_q.exp() * (log_q - math.log1p(-label_smoothing)) + log_other.exp() * (
        log_other - math.log(label_smoothing)
    )
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="-(1 - m) log sigmoid(beta h) + m exp(-beta h), m = sigmoid(beta h / tau)",
    paper="Lu et al. 2024 (DiscoPOP, log-ratio modulated loss), arXiv 2406.08414, equation 5",
    when="A curve that was found by search. Not convex: near a margin of zero it pulls the other way (see its plot).",
    options=(
        BETA,
        LossOption(name="tau", help="width of the passage between the two curves", above=0, at_most=1),
        *DIVERGENCE,
    ),
)
def discopop(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Discovered preference optimisation, Lu et al. 2024 (arXiv 2406.08414), equation 5.

    :math:`(1-m)(-\log\sigma(\beta h)) + m e^{-\beta h}` with :math:`m = \sigma(\beta h/\tau)`. The second product is
    computed as one exponential, which is finite for tau up to 1.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    margin = chosen - rejected
    exponential = torch.exp(F.logsigmoid(margin / tau) - margin)
    numerator = -torch.sigmoid(-margin / tau) * F.logsigmoid(margin) + exponential
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P)


@loss(
    kind="pairs",
    formula="D(eta (score(w) - score(l)), beta h), D the KL of Bernoullis with these logits, or a square",
    paper="Adler et al. 2024 (Nemotron-4 340B, RPO), arXiv 2406.11704; Sun et al. 2025, arXiv 2502.00203",
    when="The data have scores: how much better the chosen response is sets the margin to aim at.",
    options=(
        BETA,
        LossOption(name="eta", help="margin of reward per point of score", above=0),
        LossOption(
            name="distance",
            help="kl: from the scores' Bernoulli to the policy's (NeMo's rpo_bwd_kl); reverse_kl: the other way round"
            " (rpo_fwd_kl); squared: of the logits' difference (rpo_sq)",
            choices=("kl", "reverse_kl", "squared"),
        ),
        *DIVERGENCE,
    ),
)
def reward_aware(
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    chosen_ref_logp_P: torch.Tensor,
    rejected_ref_logp_P: torch.Tensor,
    chosen_score_P: torch.Tensor,
    rejected_score_P: torch.Tensor,
    *,
    beta: float = 0.1,
    eta: float = 1.0,
    distance: str = "kl",
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Reward-aware preference optimisation (NeMo's RPO), Adler et al. 2024 (arXiv 2406.11704).

    With :math:`a = \beta h` and :math:`b = \eta(r_w - r_l)`, ``kl`` is
    :math:`\sigma(b)\log\frac{\sigma(b)}{\sigma(a)} + (1-\sigma(b))\log\frac{1-\sigma(b)}{1-\sigma(a)}`, zero where the
    implied margin is that of the scores; ``squared`` is :math:`(a-b)^2`. A pair without scores gives NaN: leave it out.
    """
    chosen, rejected = implied_rewards(
        chosen_logp_P - chosen_ref_logp_P, rejected_logp_P - rejected_ref_logp_P, beta, divergence, divergence_alpha
    )
    margin = chosen - rejected
    target = eta * (chosen_score_P - rejected_score_P).to(margin.dtype)
    if distance == "squared":
        numerator = (margin - target) ** 2
    else:
        p, q = (target, margin) if distance == "kl" else (margin, target)
        numerator = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q)) + torch.sigmoid(-p) * (
            F.logsigmoid(-p) - F.logsigmoid(-q)
        )
    more = {"rewards/target_margins": target.detach()}
    return pair_output(numerator, chosen, rejected, chosen_logp_P, rejected_logp_P, more=more)
