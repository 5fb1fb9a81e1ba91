"""What holds for every loss there is: gradients, extremes, batches, permutations, metrics, declarations."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from losses.inputs import drawn, leaves, mean
from losses.variants import every, for_each
from prefopt.losses.common import WEIGHTINGS, LossOutput, wpo
from prefopt.losses.declare import INPUTS, LOSSES, Loss, Value

Options = dict[str, Value]
CASES = for_each(every())
DTYPES = (torch.float32, torch.float64)
DASHBOARD = {
    *(f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")),
    *(f"logps/{side}" for side in ("chosen", "rejected")),
}
# Statistics of the batch that carry no gradient: finite differences would see through them.
FROZEN: dict[str, Options] = {"bco": {"shift": False}, "bco_unpaired": {"shift": False}, "beta_dpo": {"alpha": 0.0}}


def run(name: str, tensors: dict[str, torch.Tensor], options: Options) -> LossOutput:
    loss = LOSSES[name]
    return loss(tensors, loss.start(), **options)


@CASES
def test_gradients_are_those_of_the_values(name: str, options: Options) -> None:
    loss, tensors = LOSSES[name], drawn(1)  # with soft labels, where they are read
    options = {**options, **FROZEN.get(name, {})}
    names = leaves(loss, tensors)
    if name == "tdpo" and options.get("version", "2") == "2":
        names.remove("chosen_kl_P")
    given = [tensors[n].clone().requires_grad_() for n in names]

    def numerator(*values: torch.Tensor) -> torch.Tensor:
        return run(name, tensors | dict(zip(names, values, strict=True)), options).numerator_R

    assert torch.autograd.gradcheck(numerator, given)


def test_the_chosen_divergence_of_tdpo_is_held_in_its_second_version() -> None:
    tensors = drawn(1)
    kl = tensors["chosen_kl_P"].requires_grad_()
    moved = {v: mean(run("tdpo", tensors, {"version": v})).requires_grad for v in ("1", "2")}
    assert moved == {"1": True, "2": False} and kl.requires_grad


@pytest.mark.parametrize("name", ["bco", "beta_dpo"])
def test_statistics_of_the_batch_carry_no_gradient(name: str) -> None:
    tensors = drawn(2)
    tensors.pop("label_P")
    names = leaves(LOSSES[name], tensors)
    given = [tensors[n].requires_grad_() for n in names]
    output = run(name, tensors, {})
    got = torch.autograd.grad(mean(output), given)
    s = {side: 0.1 * (tensors[f"{side}_logp_P"] - tensors[f"{side}_ref_logp_P"]) for side in ("chosen", "rejected")}
    if name == "bco":
        delta = output.metrics["delta"]
        expected = -torch.nn.functional.logsigmoid(s["chosen"] - delta)
        expected = (expected - torch.nn.functional.logsigmoid(delta - s["rejected"])).mean()
    else:
        beta, kept = output.metrics["beta"], output.metrics["kept"]
        margin = beta * (s["chosen"] - s["rejected"]) / 0.1
        expected = -(kept * torch.nn.functional.logsigmoid(margin)).sum() / kept.sum()
    assert mean(output).item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(got, torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@for_each([(*case, dtype) for case in every() for dtype in DTYPES])
def test_extreme_log_ratios_stay_finite(name: str, options: Options, dtype: torch.dtype) -> None:
    loss, tensors = LOSSES[name], drawn(3, count=18, dtype=dtype)
    sides = torch.tensor(list(itertools.product([-1e4, 0.0, 1e4], repeat=2)) * 2, dtype=dtype)
    length = torch.tensor([1] * 9 + [100] * 9)
    for i, side in enumerate(("chosen", "rejected")):
        ref = torch.full((18,), -1.5e4, dtype=dtype)
        changed = {"ref_logp": ref, "logp": ref + sides[:, i], "length": length, "kl": sides[:, i].abs()}
        changed |= {"head_ref_logp": ref / 2, "head_logp": ref / 2 + sides[:, i] / 2, "score": sides[:, 1 - i]}
        tensors |= {f"{side}_{key}_P": value for key, value in changed.items()}
    tensors |= {"logp_N": tensors["chosen_logp_P"], "ref_logp_N": tensors["chosen_ref_logp_P"]}
    tensors |= {"mismatched_logp_N": tensors["rejected_logp_P"], "mismatched_ref_logp_N": tensors["chosen_logp_P"]}
    check_finite(loss, tensors, options)


@for_each([(*case, dtype, logp) for case in every() for dtype in DTYPES for logp in (-2.5, -1e-8, 0.0)])
def test_equal_responses_of_one_token_stay_finite(name: str, options: Options, dtype: torch.dtype, logp: float) -> None:
    tensors = drawn(3, dtype=dtype)
    for key, value in tensors.items():
        if "logp" in key:
            tensors[key] = torch.full_like(value, logp)
        elif "length" in key:
            tensors[key] = torch.ones_like(value)
        elif "kl" in key or "score" in key:
            tensors[key] = torch.zeros_like(value)
    output = check_finite(LOSSES[name], tensors, options)
    accuracy = output.metrics["rewards/accuracies"]
    assert accuracy[~accuracy.isnan()].eq(0.5).all(), "a tie is half right"


def check_finite(loss: Loss, tensors: dict[str, torch.Tensor], options: Options) -> LossOutput:
    names = leaves(loss, tensors)
    given = [tensors[n].clone().requires_grad_() for n in names]
    output = run(loss.name, tensors | dict(zip(names, given, strict=True)), options)
    gradients = torch.autograd.grad(mean(output), given, materialize_grads=True)
    assert output.numerator_R.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    by_label = loss.kind == "labels"
    assert all((m.isfinite() | (m.isnan() if by_label else False)).all() for m in output.metrics.values())
    return output


def part(tensors: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {key: value[rows] for key, value in tensors.items()}
    return found | {"group_N": found["group_N"] - found["group_N"][0]}


@CASES
def test_only_a_loss_that_says_so_sees_the_batch(name: str, options: Options) -> None:
    loss, tensors = LOSSES[name], drawn(4)
    whole, halves = run(name, tensors, options), torch.arange(6).view(2, 3)
    alone = torch.cat([run(name, part(tensors, rows), options).numerator_R for rows in halves])
    if not loss.whole_batch:
        torch.testing.assert_close(alone, whole.numerator_R, rtol=1e-14, atol=0)
    elif options != {"shift": False}:
        assert not torch.allclose(alone, whole.numerator_R, rtol=1e-6)


WHOLE = [(n, o) for n, o in every() if LOSSES[n].whole_batch]


def by_two_passes(name: str, options: Options, parts: list[torch.Tensor]) -> tuple[torch.Tensor, LossOutput]:
    """Gradient of a small model's weights, as the loop takes it: vectors of all parts first, then part by part."""
    loss, tensors = LOSSES[name], drawn(5, count=12)
    names = leaves(loss, tensors)
    features = torch.randn(len(names), 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)

    def forward(rows: torch.Tensor) -> list[torch.Tensor]:
        return [tensors[n][rows] + features[i][rows] @ weights for i, n in enumerate(names)]

    order = torch.cat(parts)
    with torch.no_grad():
        seen = [torch.cat(values) for values in zip(*(forward(rows) for rows in parts), strict=True)]
    leaf = [v.requires_grad_() for v in seen]
    output = run(name, {k: v[order] for k, v in tensors.items()} | dict(zip(names, leaf, strict=True)), options)
    slopes = torch.autograd.grad(mean(output), leaf)
    start = 0
    for rows in parts:
        end = start + len(rows)
        torch.autograd.backward(forward(rows), [slope[start:end] for slope in slopes])
        start = end
    assert weights.grad is not None
    return weights.grad, output


@for_each(WHOLE)
def test_whole_batch_losses_are_equal_under_any_split_and_order(name: str, options: Options) -> None:
    gradient, output = by_two_passes(name, options, [torch.arange(12)])
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for parts in ([*torch.arange(12).split(5)], [shuffled], [*shuffled.split(1)], [*shuffled.split(7)]):
        other, again = by_two_passes(name, options, parts)
        torch.testing.assert_close(other, gradient, rtol=1e-11, atol=1e-15)
        assert mean(again).item() == pytest.approx(mean(output).item(), rel=1e-13)
        for key, value in (again.state or {}).items():
            torch.testing.assert_close(value, (output.state or {})[key], rtol=1e-13, atol=0)


@CASES
def test_metrics_have_the_names_of_dashboards(name: str, options: Options) -> None:
    tensors = drawn(6)
    for n in leaves(LOSSES[name], tensors):
        tensors[n] = tensors[n].requires_grad_()
    output = run(name, tensors, options)
    assert set(output.metrics) >= DASHBOARD
    assert not any(m.requires_grad for m in output.metrics.values())
    assert all(m.shape == output.numerator_R.shape for m in output.metrics.values())
    assert not output.weight_R.requires_grad and (output.weight_R >= 0).all()


@for_each([case for case in every(kinds=("pairs",)) if case[0] != "discopop"])
def test_rewards_are_what_the_loss_raises(name: str, options: Options) -> None:
    """A step downhill moves the mean of what the metrics call the margin up (likelihood alone moves the chosen one).

    Not so with DiscoPOP: near zero its curve rises with the margin.
    """
    tensors = drawn(7, count=64)
    tensors |= {"label_P": torch.ones(64, dtype=torch.float64)}
    for side in ("chosen", "rejected"):  # near the start, where squares too are below their target
        tensors[f"{side}_logp_P"] = tensors[f"{side}_ref_logp_P"] + 0.01 * tensors[f"{side}_kl_P"]
    tensors |= {"chosen_score_P": torch.full((64,), 20.0), "rejected_score_P": torch.full((64,), -20.0)}
    names = [n for n in leaves(LOSSES[name], tensors) if "kl" not in n and "head" not in n]
    given = [tensors[n].clone().requires_grad_() for n in names]
    before = run(name, tensors | dict(zip(names, given, strict=True)), options)
    slopes = torch.autograd.grad(mean(before), given, materialize_grads=True)
    stepped = {n: v.detach() - 1e-4 * 64 * g for n, v, g in zip(names, given, slopes, strict=True)}
    after = run(name, tensors | stepped, options)
    key = "rewards/chosen" if name == "nll" else "rewards/margins"
    assert after.metrics[key].mean() > before.metrics[key].mean()


OTHER: dict[str, Value] = {  # another value of each option that is a number
    **{"beta": 0.37, "label_smoothing": 0.2, "divergence_alpha": 0.3, "alpha": 0.33, "tau": 0.3, "gamma": 0.2},
    **{"delta": 30.0, "nll_weight": 0.7, "penalty": 3.0, "eta": 0.4, "momentum": 0.2, "keep": 0.4, "decay": 0.3},
    **{"desirable_weight": 2.5, "undesirable_weight": 0.4},
}


@for_each([(n, o.name) for n, x in LOSSES.items() for o in x.options])
def test_an_option_does_something(name: str, option: str) -> None:
    loss, tensors = LOSSES[name], drawn(9)
    (o,) = (o for o in loss.options if o.name == option)
    others = o.choices or ((True, False) if isinstance(o.default, bool) else (OTHER[option],))
    for value in others:
        if value == o.default:
            continue
        company: Options = dict([o.only]) if o.only else {}
        if (name, option, value) == ("beta_dpo", "filter", "drawn"):
            company |= {"keep": 0.4, "momentum": 0.2}
        seen = []
        for given in (company, company | {option: value}):
            state = run(name, tensors, company).state  # of a batch before this one
            seen.append(mean(loss(drawn(10), state, **given)).item())
        assert seen[0] != pytest.approx(seen[1], rel=1e-6), value


@for_each([(name,) for name in LOSSES])
def test_a_declaration_is_whole(name: str) -> None:
    loss = LOSSES[name]
    said = " ".join((loss.function.__doc__ or "").split())
    assert loss.formula and loss.when and said
    for number in re.findall(r"arXiv (\d{4}\.\d{5})", loss.paper)[:1]:
        assert number in said, "the docstring names the paper too"
    assert {"beta"} >= {o.name for o in loss.options if not o.help}
    assert all(n in INPUTS[loss.kind] for n in (*loss.inputs, *loss.optional_inputs))
    assert loss.on_difference == ("divergence_alpha" in loss.defaults)
    assert (loss.state0 is None) == (loss.start() is None)


def test_the_loss_does_not_depend_on_what_it_does_not_name() -> None:
    for loss in LOSSES.values():
        tensors = drawn(8)
        only = {n: tensors[n] for n in (*loss.inputs, *loss.optional_inputs)}
        torch.testing.assert_close(loss(only).numerator_R, loss(tensors).numerator_R, rtol=0, atol=0)


@CASES
def test_everything_stays_on_the_device_of_its_inputs_and_none_is_waited_for(name: str, options: Options) -> None:
    """Meta tensors have no numbers: a transfer, a comparison in Python or a tensor made elsewhere would fail."""
    loss = LOSSES[name]
    here = {"tier_N", "group_N"}  # what the data say of rankings stays on the CPU
    tensors = {key: value if key in here else value.to("meta") for key, value in drawn(8).items()}
    output = loss(tensors, loss.start("meta"), **options)
    found = [output.numerator_R, output.weight_R, *output.metrics.values(), *(output.state or {}).values()]
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_wpo_multiplies_pair_by_pair() -> None:
    tensors = drawn(9)
    tensors["chosen_wpo_P"] = tensors["chosen_wpo_P"].clone().fill_(0.5)
    plain = run("dpo", tensors, {})
    weights = tensors["chosen_wpo_P"], tensors["rejected_wpo_P"]
    weighted, clipped = wpo(plain, *weights, clip=False), wpo(plain, *weights)
    factor = torch.exp(weights[0] + weights[1])
    assert (factor > 1).any() and (factor < 1).any()
    torch.testing.assert_close(weighted.numerator_R, plain.numerator_R * factor)
    torch.testing.assert_close(clipped.numerator_R, plain.numerator_R * factor.clamp(max=1))
    torch.testing.assert_close(weighted.weight_R, plain.weight_R)
    assert set(WEIGHTINGS["wpo"].inputs) <= set(INPUTS["pairs"]) and math.isfinite(factor.sum())


def test_beta_dpo_keeps_or_leaves_out_pairs_with_equal_margins_together() -> None:
    """In the first step policy and reference are equal: no pair is an outlier. A draw takes some all the same."""
    beta_dpo = LOSSES["beta_dpo"]
    tensors = {name: torch.zeros(5, dtype=torch.float64) for name in beta_dpo.inputs}
    kept = [beta_dpo(tensors, beta_dpo.start(), filter=name).weight_R.sum() for name in ("nearest", "drawn")]
    assert kept == [5, 4]
    tensors["chosen_logp_P"] = torch.tensor([0.0, 0.0, 3.0, 3.0, -80.0], dtype=torch.float64)
    assert beta_dpo(tensors, beta_dpo.start(), keep=0.6).weight_R.tolist() == [1, 1, 1, 1, 0]
