"""Losses on pairs with a reference: DPO and its variants.

The first ones see the difference of two log-ratios. Those from :func:`dpop` on see each response by itself: its
log-ratio against a fixed point, not against the other's. Columns are [P], one entry per pair, see
:data:`prefopt.losses.declare.INPUTS`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.common import (
    BETA,
    DIVERGENCE,
    NLL_WEIGHT,
    LossOutput,
    Numerators,
    Target,
    implied,
    logistic,
    loss_option,
    pair_output,
)
from prefopt.losses.declare import loss


@loss(
    formula="-log sigmoid(beta h)",
    paper="Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing: Mitchell 2023 (conservative DPO)",
    when="The place to begin. Soft labels and smoothing are for data on which annotators disagree.",
)
def dpo(margin_P: Tensor, target_P: Target) -> Tensor:
    r"""Direct Preference Optimization, Rafailov et al. 2023 (arXiv 2305.18290), equation 7.

    With :math:`h = (\log\pi_w - \log\mathrm{ref}_w) - (\log\pi_l - \log\mathrm{ref}_l)` the loss of a pair is
    :math:`-\log\sigma(\beta h)`.

    ``label_smoothing`` e, in [0, 0.5), assumes that this fraction of the labels is flipped (conservative DPO, Mitchell
    2023): :math:`-(1-e)\log\sigma(\beta h) - e\log\sigma(-\beta h)`, with its minimum at :math:`\sigma(\beta h) = 1-e`.
    ``label_P``, the probability that the chosen response is better, takes the place of 1 there.
    """
    return logistic(margin_P, label=target_P)


@loss(
    formula="(s(w)/|w| - s(l)/|l| - 1/(2 beta))^2, or with sums",
    paper="Azar et al. 2023, arXiv 2310.12036, equation 17",
    when="Labels that are nearly deterministic: the margin has a target, so that the KL penalty keeps its effect.",
    options=(
        loss_option("beta", "tau of the paper: the target margin is 1 / (2 beta)", above=0),
        loss_option(
            "average",
            "log-ratios as means over tokens (as TRL does; its authors confirmed that the paper ran this); false: as"
            " sums (the paper's formula, and the original DPO repository). With means take a beta of about 1",
        ),
    ),
)
def ipo(
    implied_2P: Tensor, logp_2P: Tensor, length_2P: Tensor, *, beta: float = 0.1, average: bool = False
) -> LossOutput:
    r"""Identity Preference Optimization, Azar et al. 2023 (arXiv 2310.12036), equation 17.

    :math:`(h - 1/(2\beta))^2`. Sources disagree on the scale of h: the formula has sums over tokens, TRL divides each
    log-ratio by its length and says that the authors confirmed it. ``average`` chooses, and beta has another meaning in
    each: 0.1 is a target of 5 nats for the sum, about as far as dpo's loss goes with the same beta, but of 5 nats for
    every token with averages, which no policy reaches without leaving the reference behind. So the default is the sum.
    """
    mean_2P = implied_2P / length_2P if average else implied_2P
    return pair_output((mean_2P[0] - mean_2P[1] - 1 / (2 * beta)) ** 2, *(beta * mean_2P), *logp_2P)


@loss(
    formula="max(0, 1 - beta h)",
    paper="Liu et al. 2023 (RSO), arXiv 2309.06657",
    when="A pair has no gradient once its margin is 1: less over-optimisation of pairs that are already separated.",
)
def hinge(margin_P: Tensor) -> Tensor:
    r"""Hinge on normalised likelihoods, Liu et al. 2023 (arXiv 2309.06657): :math:`\max(0, 1 - \beta h)`."""
    return torch.relu(1 - margin_P)


@loss(
    formula="-log sigmoid(beta h) - nll_weight log pi(w) / |w|",
    paper="Pang et al. 2024 (Iterative RPO), arXiv 2404.19733, equation 1",
    when="Reasoning and code, where the chosen answer is correct: its likelihood is kept up.",
    options=(NLL_WEIGHT,),
)
def rpo(
    margin_P: Tensor, chosen_logp_P: Tensor, chosen_length_P: Tensor, target_P: Target, *, nll_weight: float = 1.0
) -> Numerators:
    r"""DPO with the negative log-likelihood of the chosen response, Pang et al. 2024 (arXiv 2404.19733), equation 1.

    The same as the sum ``dpo:1,nll:alpha``.
    """
    nll = -chosen_logp_P / chosen_length_P
    return logistic(margin_P, label=target_P) + nll_weight * nll, {"nll_loss": nll}


@loss(
    formula="[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e)",
    paper="Chowdhury, Kini, Natarajan 2024 (rDPO), arXiv 2403.00409",
    when="A known fraction e of the labels is flipped at random: the expected loss is that on clean labels.",
    options=(loss_option("label_smoothing", "e, the fraction of flipped labels", at_least=0, below=0.5),),
    notes="For e above 0 the loss falls without bound as the margin grows, by beta e / (1 - 2 e) a nat of h: stop"
    " early, or take dpo with label_smoothing, which has a minimum.",
)
def robust(margin_P: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    r"""Provably robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409).

    :math:`[(1-e) L(w, l) - e L(l, w)]/(1-2e)` with DPO's L: an unbiased estimate of the loss on clean labels where a
    fraction e of them is flipped at random; dpo for e = 0, TRL's default. Unbounded below for e > 0, as published: a
    floor would make it biased, which is what it is for.
    """
    e = label_smoothing
    return (-(1 - e) * F.logsigmoid(margin_P) + e * F.logsigmoid(-margin_P)) / (1 - 2 * e)


@loss(
    formula="-log sigmoid(beta (s(w)/|w| - s(l)/|l|))",
    paper="Lambert et al. 2024 (Tulu 3), arXiv 2411.15124",
    when="Responses of very different lengths: the mean over tokens gives length no weight. beta about 5.",
    options=(loss_option("beta", "scale of the mean log-ratio per token; about 5", above=0),),
)
def sigmoid_norm(
    implied_2P: Tensor, logp_2P: Tensor, length_2P: Tensor, target_P: Target, *, beta: float = 5.0
) -> LossOutput:
    r"""Length-normalised DPO, Lambert et al. 2024 (arXiv 2411.15124).

    With another divergence f'(rho) of the whole response is divided by the length, as in TRL.
    """
    reward_2P = beta * implied_2P / length_2P
    return pair_output(logistic(reward_2P[0] - reward_2P[1], label=target_P), *reward_2P, *logp_2P)


@loss(
    formula="-log sigmoid(beta h + alpha (|w| - |l|))",
    paper="Park, Rafailov, Ermon, Finn 2024, arXiv 2403.19159",
    when="Answers grow longer than they should: the part of a preference that length explains is not learned.",
    options=(loss_option("alpha", "reward that one more token explains; the paper's scale is 0.01"),),
    notes="Some code subtracts the length term; a negative alpha gives that.",
)
def r_dpo(margin_P: Tensor, length_2P: Tensor, target_P: Target, *, alpha: float = 0.01) -> Tensor:
    r"""Length-regularised DPO, Park et al. 2024 (arXiv 2403.19159).

    The reward less :math:`\alpha|y|` is maximised, so that the reward itself is :math:`\beta s(y) + \alpha|y|` up to a
    term of the prompt. Length explains a part of a pair whose chosen response is longer, which then has a smaller
    gradient. With the other sign (some code) the formula rewards length.
    """
    longer_P = (length_2P[0] - length_2P[1]).to(margin_P.dtype)
    return logistic(margin_P + alpha * longer_P, label=target_P)


@loss(
    formula="-log sigmoid(beta h'), where in s'(y) the tokens beyond the first min(|w|, |l|) weigh alpha",
    paper="Liu et al. 2024, arXiv 2409.06411",
    when="Length leaks into the reward, but the ends of long answers should count a little.",
    options=(
        BETA,
        loss_option("alpha", "weight of tokens beyond the shorter length; 1 is dpo", at_least=0, at_most=1),
        *DIVERGENCE,
    ),
)
def ld_dpo(
    logp_2P: Tensor,
    ref_logp_2P: Tensor,
    head_logp_2P: Tensor,
    head_ref_logp_2P: Tensor,
    target_P: Target,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossOutput:
    r"""Length-desensitised DPO, Liu et al. 2024 (arXiv 2409.06411).

    With m = min(|w|, |l|), a log-probability is :math:`\log\pi(y_{\le m}) + \alpha\log\pi(y_{>m}|y_{\le m})`: DPO at
    alpha 1; at 0 the further tokens of the longer response do not count.
    """
    policy_2P = head_logp_2P + alpha * (logp_2P - head_logp_2P)
    reference_2P = head_ref_logp_2P + alpha * (ref_logp_2P - head_ref_logp_2P)
    reward_2P = beta * implied(policy_2P - reference_2P, divergence, divergence_alpha)
    return pair_output(logistic(reward_2P[0] - reward_2P[1], label=target_P), *reward_2P, *logp_2P)


@loss(
    formula="KL([sigmoid(beta h), sigmoid(-beta h)] || [1 - e, e])",
    paper="Ji et al. 2024 (EXO), arXiv 2402.00856, equation 16",
    when="The reverse direction of DPO's divergence: seeks a mode of the preference instead of covering it.",
    options=(
        loss_option("label_smoothing", "e, the fraction of wrong labels; 0.001 in the paper", above=0, below=0.5),
    ),
)
def exo(margin_P: Tensor, *, label_smoothing: float = 0.001) -> Tensor:
    r"""Efficient exact optimisation, EXO-pref, Ji et al. 2024 (arXiv 2402.00856), equation 16 with two responses.

    The target margin is :math:`\log((1-e)/e)`: 6.9 for an e of 0.001, which TRL takes too where none is given. The
    authors' code has log-probabilities of 0 and -10 in place of those of 1 - e and e: an e of 4.5e-5 and a target
    of 10.
    """
    log_q, log_other = F.logsigmoid(margin_P), F.logsigmoid(-margin_P)
    return log_q.exp() * (log_q - math.log1p(-label_smoothing)) + log_other.exp() * (
        log_other - math.log(label_smoothing)
    )


@loss(
    formula="-(1 - m) log sigmoid(beta h) + m exp(-beta h), m = sigmoid(beta h / tau)",
    paper="Lu et al. 2024 (DiscoPOP, log-ratio modulated loss), arXiv 2406.08414, equation 5",
    when="A loss found by search. Not convex: near a margin of zero its gradient is reversed (see its plot).",
    options=(loss_option("tau", "width of the transition between the two terms", above=0, at_most=1),),
)
def discopop(margin_P: Tensor, *, tau: float = 0.05) -> Tensor:
    r"""Discovered preference optimisation, Lu et al. 2024 (arXiv 2406.08414), equation 5.

    The second product is computed as one exponential, which is finite for tau up to 1.
    """
    exponential = torch.exp(F.logsigmoid(margin_P / tau) - margin_P)
    return -torch.sigmoid(-margin_P / tau) * F.logsigmoid(margin_P) + exponential


@loss(
    formula="D(eta (score(w) - score(l)), beta h), D the KL of Bernoullis with these logits, or a square",
    paper="Adler et al. 2024 (Nemotron-4 340B, RPO), arXiv 2406.11704; Sun et al. 2025, arXiv 2502.00203",
    when="The data have scores: their difference sets the target margin.",
    options=(
        loss_option("eta", "margin of reward per point of score", above=0),
        loss_option(
            "distance",
            "kl: from the Bernoulli of the scores to that of the policy (NeMo's rpo_bwd_kl); reverse_kl: the other"
            " direction (rpo_fwd_kl); squared: of the logits' difference (rpo_sq)",
            choices=("kl", "reverse_kl", "squared"),
        ),
    ),
)
def reward_aware(
    margin_P: Tensor, chosen_score_P: Tensor, rejected_score_P: Tensor, *, eta: float = 1.0, distance: str = "kl"
) -> Numerators:
    r"""Reward-aware preference optimisation (NeMo's RPO), Adler et al. 2024 (arXiv 2406.11704).

    With :math:`a = \beta h` and :math:`b = \eta(r_w - r_l)`, ``kl`` is
    :math:`\sigma(b)\log\frac{\sigma(b)}{\sigma(a)} + (1-\sigma(b))\log\frac{1-\sigma(b)}{1-\sigma(a)}`, zero where the
    implied margin is that of the scores; ``squared`` is :math:`(a-b)^2`. A pair without scores gives NaN: leave it out.
    """
    target = eta * (chosen_score_P - rejected_score_P).to(margin_P.dtype)
    metrics = {"rewards/target_margins": target.detach()}
    if distance == "squared":
        return (margin_P - target) ** 2, metrics
    p, q = (target, margin_P) if distance == "kl" else (margin_P, target)
    numerator = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q)) + torch.sigmoid(-p) * (
        F.logsigmoid(-p) - F.logsigmoid(-q)
    )
    return numerator, metrics


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
    options=(loss_option("beta", "1 / eta of the paper, whose eta is 1000: targets are +-1 / (2 beta)", above=0),),
    notes="Targets of 500 nats are out of reach: the gradient is the same for all pairs, and the learning rate and the"
    " number of steps decide how far the policy goes. A beta of 0.1 has targets of 5 nats.",
)
def sppo_hard(chosen_log_ratio_P: Tensor, rejected_log_ratio_P: Tensor, *, beta: float = 0.001) -> Tensor:
    r"""Self-play preference optimisation with hard labels, Wu et al. 2024 (arXiv 2405.00675), equation 4.7.

    The probability of winning is 1 for the chosen and 0 for the rejected response, where the paper estimates it. The
    two squares are added, as in TRL; the authors' code takes half of that, which is another learning rate for plain
    gradient descent and the same for Adam and RMSprop, unless gradients are clipped.
    """
    return (chosen_log_ratio_P - 0.5 / beta) ** 2 + (rejected_log_ratio_P + 0.5 / beta) ** 2
