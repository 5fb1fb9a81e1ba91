"""Closed forms: values at zero log-ratio, and where one loss becomes another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from losses.inputs import drawn, leaves, mean
from losses.variants import for_each
from prefopt.losses.common import DIVERGENCES, implied
from prefopt.losses.declare import LOSSES, Value
from prefopt.losses.pairs import dpo, exo, ld_dpo, r_dpo, robust, rpo, sigmoid_norm, tdpo
from prefopt.losses.parse import parse_losses
from prefopt.losses.reference_free import alphapo, simpo
from prefopt.losses.whole_batch import bco

LN2 = math.log(2)
AT_ZERO: dict[str, float] = {
    **dict.fromkeys(["dpo", "robust", "sigmoid_norm", "ld_dpo", "dpop", "tdpo", "beta_dpo"], LN2),
    **dict.fromkeys(["aot", "aot_unpaired"], LN2),
    "ipo": 1 / (4 * 0.1**2),
    "hinge": 1.0,
    "exo": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    "discopop": 0.5 * LN2 + 0.5,
    "nca": 2 * LN2,
    "bco": 2 * LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo_hard": 1 / (2 * 0.001**2),
    "kto": 0.5,
    "bco_unpaired": LN2,
    "apo_zero_unpaired": 0.5,
}
# Their value at zero log-ratio depends on lengths, scores, likelihoods or tiers.
ELSEWHERE = {"r_dpo", "reward_aware", "rpo", "plackett_luce"}


def test_every_loss_with_a_reference_has_its_value_at_zero_in_this_file() -> None:
    assert set(AT_ZERO) | ELSEWHERE == {name for name, loss in LOSSES.items() if loss.needs_reference}


def at_zero(count: int = 6) -> dict[str, torch.Tensor]:
    tensors = drawn(0, count)
    for key in list(tensors):
        if "ref_logp" in key:
            tensors[key.replace("ref_logp", "logp")] = tensors[key]
        elif "_kl_" in key:
            tensors[key] = torch.zeros_like(tensors[key])
    return tensors


@for_each([(*case, divergence) for case in AT_ZERO.items() for divergence in DIVERGENCES])
def test_values_at_zero_log_ratio(name: str, value: float, divergence: str) -> None:
    loss = LOSSES[name]
    options: dict[str, Value] = {"divergence": divergence} if loss.on_difference else {}
    output = loss(at_zero(), loss.start(), **options)
    expected = torch.full_like(output.numerator_R, value)
    torch.testing.assert_close(output.numerator_R, expected, rtol=1e-14, atol=1e-14)


def test_values_at_zero_that_depend_on_the_data() -> None:
    tensors = at_zero()
    tensors.pop("label_P")
    length = tensors["chosen_length_P"] - tensors["rejected_length_P"]
    expected = -torch.nn.functional.logsigmoid(0.01 * length.double())
    torch.testing.assert_close(LOSSES["r_dpo"](tensors).numerator_R, expected, rtol=1e-13, atol=0)
    nll = -tensors["chosen_logp_P"] / tensors["chosen_length_P"]
    torch.testing.assert_close(LOSSES["rpo"](tensors).numerator_R, LN2 + nll)
    gap = torch.sigmoid(tensors["chosen_score_P"] - tensors["rejected_score_P"])
    entropy = gap * gap.log() + (1 - gap) * (1 - gap).log()
    torch.testing.assert_close(LOSSES["reward_aware"](tensors).numerator_R, LN2 + entropy)
    torch.testing.assert_close(
        LOSSES["reward_aware"](tensors, distance="squared").numerator_R,
        (tensors["chosen_score_P"] - tensors["rejected_score_P"]) ** 2,
    )


# s(w) = -2, s(l) = -7, |w| = 10, |l| = 4, D(w) = 3, D(l) = 8, scores 2 and 0.5, policy's -20 and -16.
ONE_PAIR = {
    "chosen_logp_P": -20.0,
    "chosen_ref_logp_P": -18.0,
    "rejected_logp_P": -16.0,
    "rejected_ref_logp_P": -9.0,
    "chosen_length_P": 10,
    "rejected_length_P": 4,
    "chosen_kl_P": 3.0,
    "rejected_kl_P": 8.0,
    "chosen_score_P": 2.0,
    "rejected_score_P": 0.5,
}


def soft(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def bernoulli(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


SIGMOID = {x: 1 / (1 + math.exp(-x)) for x in (0.5, 0.6)}
BY_HAND: list[tuple[str, dict[str, Value], float]] = [
    ("r_dpo", {"alpha": 0.05}, soft(0.1 * 5 + 0.05 * 6)),
    ("dpop", {"beta": 0.1, "penalty": 0.5}, soft(0.1 * (5 - 0.5 * 2))),
    ("tdpo", {"version": "1"}, soft(0.1 * (5 - (8 - 3)))),
    ("tdpo", {"alpha": 0.5}, soft(0.1 * (5 - 0.5 * (8 - 3)))),
    ("rpo", {"nll_weight": 0.5}, soft(0.1 * 5) + 0.5 * 20 / 10),
    ("ipo", {}, (5 - 5) ** 2),
    ("ipo", {"average": True, "beta": 1.0}, (-2 / 10 + 7 / 4 - 0.5) ** 2),
    ("simpo", {}, soft(2 * (-20 / 10 + 16 / 4) - 0.5)),
    ("sppo_hard", {"beta": 0.1}, (-2 - 5) ** 2 + (-7 + 5) ** 2),
    ("cpo", {}, soft(0.1 * -4) + 20 / 10),
    ("cpo", {"average": False}, soft(0.1 * -4) + 20),
    ("slic_hf", {}, 1 + 20 - 16 + 0.1 * 20),
    ("slic_hf", {"average": True}, max(0, 1 + 20 / 10 - 16 / 4) + 0.1 * 20 / 10),
    ("unlikelihood", {"alpha": 0.25}, 20 - 0.25 * 16),
    ("unlikelihood", {"alpha": 1.0, "average": True}, 20 / 10 - 16 / 4),
    ("nll", {}, 2.0),
    ("nll", {"average": "none"}, 20.0),
    ("reward_aware", {"eta": 0.4}, bernoulli(SIGMOID[0.6], SIGMOID[0.5])),
    ("reward_aware", {"eta": 0.4, "distance": "reverse_kl"}, bernoulli(SIGMOID[0.5], SIGMOID[0.6])),
    ("reward_aware", {"eta": 0.4, "distance": "squared"}, (0.5 - 0.6) ** 2),
    ("bco", {"decay": 0.0}, soft(-0.2 + 0.45) + soft(0.7 - 0.45)),
    ("beta_dpo", {"momentum": 0.0}, soft(0.1 * 5)),
    ("beta_dpo", {"momentum": 0.9, "alpha": 2.0}, soft(0.1 * (1 + 2 * (5 - 0.5)) * 5)),
]


@for_each(BY_HAND)
def test_one_pair_by_hand(name: str, options: dict[str, Value], value: float) -> None:
    tensors = {key: torch.tensor([number]).double() for key, number in ONE_PAIR.items()}
    loss = LOSSES[name]
    assert loss(tensors, loss.start(), **options).numerator_R.item() == pytest.approx(value, rel=1e-14, abs=1e-14)


def same(first: Any, second: Any, tensors: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    """Two losses of the same tensors agree in value and in gradient."""
    names = [n for n in leaves(LOSSES["dpo"], tensors) if n in tensors]
    results = []
    for function in (first, second):
        given = {n: tensors[n].clone().requires_grad_() for n in names}
        numerator = function(tensors | given)
        results.append((numerator, torch.autograd.grad(numerator.sum(), list(given.values()))))
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


def call(function: Any, **options: Any) -> Any:
    loss = next(x for x in LOSSES.values() if x.function is function)
    return lambda tensors: (
        loss({k: v for k, v in tensors.items() if k != "label_P"}, loss.start(), **options).numerator_R
    )


IDENTITIES = {
    "robust without flips is dpo": (call(robust, label_smoothing=0.0), call(dpo)),
    "r_dpo without a price of length is dpo": (call(r_dpo, alpha=0.0), call(dpo)),
    "ld_dpo at alpha 1 is dpo": (call(ld_dpo, alpha=1.0), call(dpo)),
    "rpo without likelihood is dpo": (call(rpo, nll_weight=0.0), call(dpo)),
    "tdpo without divergences is dpo": (call(tdpo, alpha=0.0), call(dpo)),
    "alphapo at alpha 0 is simpo": (call(alphapo, alpha=0.0), call(simpo)),
    "beta_dpo that follows and leaves out nothing is dpo": (
        call(LOSSES["beta_dpo"].function, alpha=0.0, keep=1.0),
        call(dpo),
    ),
    "the alpha divergence at 0 is reverse KL": (call(dpo, divergence="alpha", divergence_alpha=0.0), call(dpo)),
    "the alpha divergence at 1 is forward KL": (
        call(dpo, divergence="alpha", divergence_alpha=1.0),
        call(dpo, divergence="forward_kl"),
    ),
}


@for_each([(name,) for name in IDENTITIES])
def test_where_one_loss_is_another(name: str) -> None:
    same(*IDENTITIES[name], drawn(1))


@for_each(
    [
        (call(dpo, divergence="alpha", divergence_alpha=1e-9), call(dpo)),
        (call(alphapo, alpha=1e-9), call(simpo)),
        (call(alphapo, alpha=-1e-9), call(simpo)),
        (call(robust, label_smoothing=1e-9), call(dpo)),
    ]
)
def test_limits_are_approached(near: Any, limit: Any) -> None:
    same(near, limit, drawn(2), tolerance=1e-6)


@for_each([(divergence,) for divergence in DIVERGENCES])
def test_divergences_agree_to_first_order_and_differ_beyond(divergence: str) -> None:
    """f' of each is log rho near rho = 1 (but for JS, whose curvature there is half of it)."""
    small = torch.linspace(-1e-5, 1e-5, 5, dtype=torch.float64)
    scale = 0.5 if divergence == "js" else 1.0
    torch.testing.assert_close(implied(small, divergence, 0.5), scale * small, rtol=1e-4, atol=1e-15)
    wide = torch.linspace(-40, 40, 81, dtype=torch.float64).requires_grad_()
    value = implied(wide, divergence, 0.5)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    assert (slope >= 0).all() and (slope[:60] > 0).all(), "a likelier response has the higher reward"
    assert value.diff().ge(0).all()


def test_divergences_are_their_formulas() -> None:
    s = torch.linspace(-8, 8, 9, dtype=torch.float64)
    rho = s.exp()
    expected = {
        "reverse_kl": rho.log(),
        "forward_kl": 1 - 1 / rho,
        "js": (2 * rho / (1 + rho)).log(),
        "alpha": (1 - rho**-0.3) / 0.3,
    }
    for name, value in expected.items():
        torch.testing.assert_close(implied(s, name, 0.3), value, rtol=1e-11, atol=1e-13)


def test_the_line_behind_an_exponential_is_its_tangent() -> None:
    edge = torch.tensor([-30.0 - 1e-9, -30.0 + 1e-9, -40.0], dtype=torch.float64, requires_grad=True)
    value = implied(edge, "forward_kl", 0.5)
    (slope,) = torch.autograd.grad(value.sum(), edge)
    torch.testing.assert_close(slope, torch.full_like(slope, math.exp(30)), rtol=1e-8, atol=0)
    assert value[2].item() == pytest.approx(1 - 11 * math.exp(30), rel=1e-12)


@for_each([(name,) for name, loss in LOSSES.items() if "label_P" in loss.optional_inputs])
def test_soft_labels_mix_the_two_directions(name: str) -> None:
    """A label of 1 is none, 1/2 is symmetric, and p is smoothing with 1 - p."""
    loss, tensors = LOSSES[name], drawn(3)
    tensors.pop("label_P")
    hard = loss(tensors, loss.start()).numerator_R
    one = torch.ones_like(hard)
    torch.testing.assert_close(loss(tensors | {"label_P": one}, loss.start()).numerator_R, hard)
    soft = loss(tensors | {"label_P": 0.7 * one}, loss.start()).numerator_R
    smooth = loss(tensors, loss.start(), label_smoothing=0.3).numerator_R
    torch.testing.assert_close(soft, smooth, rtol=1e-13, atol=0)
    both = loss(tensors | {"label_P": 0.9 * one}, loss.start(), label_smoothing=0.2).numerator_R
    torch.testing.assert_close(
        both, loss(tensors | {"label_P": (0.9 * 0.8 + 0.1 * 0.2) * one}, loss.start()).numerator_R
    )


def test_robust_is_right_on_average_over_flips() -> None:
    tensors, e = drawn(4), 0.2
    clean = call(dpo)(tensors)
    swapped = {
        k.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected"): v for k, v in tensors.items()
    }
    kept, flipped = (call(robust, label_smoothing=e)(t) for t in (tensors, swapped))
    torch.testing.assert_close((1 - e) * kept + e * flipped, clean)


def test_exo_is_least_where_the_policy_is_as_sure_as_its_target() -> None:
    best = math.log(0.9 / 0.1)
    margin = torch.tensor([best - 0.1, best, best + 0.1], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    value = exo(margin, zero, zero, zero, beta=1.0, label_smoothing=0.1).numerator_R
    (slope,) = torch.autograd.grad(value.sum(), margin)
    assert slope[0] < 0 < slope[2] and abs(slope[1]) < 1e-15 and value[1].abs() < 1e-15


@for_each([("kl",), ("reverse_kl",), ("squared",)])
def test_reward_aware_is_zero_where_margins_are_those_of_scores(distance: str) -> None:
    tensors = drawn(5)
    target = 2.0 * (tensors["chosen_score_P"] - tensors["rejected_score_P"])
    for side, share in (("chosen", 0.25), ("rejected", -0.75)):
        tensors[f"{side}_logp_P"] = tensors[f"{side}_ref_logp_P"] + share * target / 0.1
    value = LOSSES["reward_aware"](tensors, eta=2.0, distance=distance).numerator_R
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)


def test_a_length_of_one_needs_no_normalisation() -> None:
    tensors = drawn(6)
    tensors |= {f"{side}_length_P": torch.ones(6) for side in ("chosen", "rejected")}
    same(call(sigmoid_norm, beta=0.1), call(dpo), tensors)
    same(call(LOSSES["ipo"].function, average=True), call(LOSSES["ipo"].function, average=False), tensors)


def test_the_shift_of_bco_is_the_mean_reward_so_far() -> None:
    state, seen = LOSSES["bco"].start(), []
    for step in range(4):
        tensors = drawn(step, count=5 + step)
        output = LOSSES["bco"](tensors, state, beta=0.3)
        state = output.state
        ratios = [tensors[f"{s}_logp_P"] - tensors[f"{s}_ref_logp_P"] for s in ("chosen", "rejected")]
        seen.append(0.3 * torch.cat(ratios))
        assert output.metrics["delta"][0].item() == pytest.approx(torch.cat(seen).mean().item(), rel=1e-12)
        alone = LOSSES["bco"](tensors, state, beta=0.3, decay=0.0)
        assert alone.metrics["delta"][0].item() == pytest.approx(seen[-1].mean().item(), rel=1e-12)
        none = bco(**{k: tensors[k] for k in LOSSES["bco"].inputs}, beta=0.3, shift=False)
        assert none.metrics["delta"].eq(0).all()


@for_each([(middle, decay) for middle in ("labels", "responses") for decay in (1.0, 0.6, 0.0)])
def test_the_shift_of_bco_on_labels_lies_between_the_means_of_both(middle: str, decay: float) -> None:
    state, seen = LOSSES["bco_unpaired"].start(), []
    for step, rated in enumerate(([1, 1, 1, 0], [1, 1], [0, 0, 1], [0, 0, 0])):
        reward, wanted = 0.3 * torch.arange(1.0, 1 + len(rated)).double() * (step - 1.5), torch.tensor(rated).bool()
        tensors = {"logp_N": reward / 0.3, "ref_logp_N": torch.zeros(len(rated)).double(), "label_N": wanted}
        output = LOSSES["bco_unpaired"](tensors, state, beta=0.3, middle=middle, decay=decay)
        state = output.state
        seen = [(r, y, w * decay) for r, y, w in seen] + [
            (float(r), y, 1.0) for r, y in zip(reward, rated, strict=True)
        ]
        sides = [[(r, w) for r, y, w in seen if y == side and w] for side in (1, 0)]
        if middle == "labels":
            means = [sum(r * w for r, w in side) / sum(w for _, w in side) for side in sides if side]
            delta = sum(means) / len(means)
        else:
            delta = sum(r * w for side in sides for r, w in side) / sum(w for side in sides for _, w in side)
        assert output.metrics["delta"][0].item() == pytest.approx(delta, rel=1e-12)
        signed = torch.where(wanted, reward - delta, delta - reward)
        torch.testing.assert_close(output.numerator_R, -torch.nn.functional.logsigmoid(signed))
    unshifted = LOSSES["bco_unpaired"](
        tensors, state, beta=0.3, shift=False, desirable_weight=2.0, undesirable_weight=3.0
    )
    torch.testing.assert_close(unshifted.numerator_R, -3 * torch.nn.functional.logsigmoid(-reward))


def test_bco_on_pairs_split_in_two_is_bco() -> None:
    tensors = drawn(3)
    tensors |= {"label_N": torch.tensor([True] * 6 + [False] * 6)}
    for name in ("logp", "ref_logp"):
        tensors[f"{name}_N"] = torch.cat([tensors[f"{side}_{name}_P"] for side in ("chosen", "rejected")])
    whole, split = LOSSES["bco"](tensors), LOSSES["bco_unpaired"](tensors)
    torch.testing.assert_close(whole.numerator_R, split.numerator_R[:6] + split.numerator_R[6:])


def test_a_draw_of_beta_dpo_is_one_without_replacement_by_the_gaussian() -> None:
    """The first of the drawn falls on a pair as often as its chance says, and a batch's order does not matter."""
    h = torch.tensor([-3.0, 0.5, 1.0, 2.0, 6.0], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    names = ("chosen_logp_P", "rejected_logp_P", "chosen_ref_logp_P", "rejected_ref_logp_P")

    def kept(seed: int, h: torch.Tensor, keep: float) -> torch.Tensor:
        state = {"mean": 1.0, "deviation": 2.0, "batches": float(seed)}
        given = {name: torch.tensor(value).double() for name, value in state.items()}
        tensors = dict(zip(names, (h, zero, zero, zero), strict=True))
        return LOSSES["beta_dpo"](tensors, given, keep=keep, momentum=1 - 1e-12, filter="drawn").weight_R

    draws = 4000
    one = torch.stack([kept(seed, h, 0.2) for seed in range(draws)]).mean(0)
    chance = torch.exp(-0.5 * ((h - 1) / 2) ** 2)
    chance = chance / chance.sum()
    assert ((one - chance).abs() < 4 * (chance * (1 - chance) / draws).sqrt()).all()
    order = torch.tensor([3, 0, 4, 2, 1])
    for seed in range(20):
        assert kept(seed, h, 0.6).sum() == 3
        assert torch.equal(kept(seed, h, 0.6)[order], kept(seed, h[order], 0.6))


def test_beta_follows_the_batch_and_leaves_out_what_is_far() -> None:
    state = {n: torch.tensor(x).double() for n, x in (("mean", 2.0), ("deviation", 0.0), ("batches", 3.0))}
    h = torch.tensor([1.0, 2.0, 3.0, 4.0, -90.0], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    tensors = {"chosen_logp_P": h, "rejected_logp_P": zero, "chosen_ref_logp_P": zero, "rejected_ref_logp_P": zero}
    output = LOSSES["beta_dpo"](tensors, state, beta=0.1, alpha=0.5)
    mean_h = 0.9 * 2.0 + 0.1 * -16.0
    assert output.state is not None and output.state["mean"].item() == pytest.approx(mean_h)
    assert output.weight_R.tolist() == [1, 1, 1, 1, 0]
    beta = 0.1 * (1 + 0.5 * (2.5 - mean_h))
    assert output.metrics["beta"].tolist() == pytest.approx([beta] * 5)
    expected = torch.nn.functional.softplus(-beta * h[:4]).mean().item()
    assert mean(output).item() == pytest.approx(expected, rel=1e-12)
    assert output.state["batches"].item() == 4
    assert output.state["deviation"].item() == pytest.approx(0.1 * h.std().item())
    low = LOSSES["beta_dpo"](tensors, state | {"mean": torch.tensor(1e4, dtype=torch.float64)}, beta=0.1)
    assert low.metrics["beta"][0].item() == pytest.approx(1e-3)


def test_sorted_losses_are_one_sided_comparisons_of_distributions() -> None:
    """aot compares quantiles: which pair a margin belongs to does not matter."""
    tensors = drawn(7)
    swapped = dict(tensors)
    for name in ("chosen_logp_P", "rejected_logp_P"):
        swapped[name] = tensors[name].roll(1)
    assert mean(LOSSES["aot"](swapped)).item() == pytest.approx(mean(LOSSES["aot"](tensors)).item(), rel=1e-14)
    for name in ("rejected_logp_P", "rejected_ref_logp_P"):
        tensors[name] = tensors[name].roll(2)
    other = mean(LOSSES["aot_unpaired"](tensors)).item()
    assert other == pytest.approx(mean(LOSSES["aot_unpaired"](drawn(7))).item(), rel=1e-14)


def test_a_weighted_sum_keeps_the_normaliser_of_each_part() -> None:
    tensors = drawn(8)
    terms = parse_losses("dpo:0.7,nll:0.2", ["average=tokens"])
    assert [t.weight for t in terms] == [0.7, 0.2]
    nll = terms[1](tensors)
    expected = -tensors["chosen_logp_P"].sum() / tensors["chosen_length_P"].sum()
    assert mean(nll).item() == pytest.approx(expected.item(), rel=1e-14)
    one = parse_losses("rpo", ["nll_weight=0.3"])[0](tensors).numerator_R
    parts = [t.weight * t(tensors).numerator_R for t in parse_losses("dpo:1,nll:0.3")]
    torch.testing.assert_close(one, parts[0] + parts[1])
