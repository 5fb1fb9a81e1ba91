"""The DPO loss by itself: TRL's numbers, closed forms, gradients, extremes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.losses.common import LossOutput
from prefopt.losses.pairs import dpo

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/dpo.json").read_text("utf-8"))


def sums(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mean(output: LossOutput) -> torch.Tensor:
    """The loss of a batch."""
    return output.numerator_R.sum() / output.weight_R.sum()


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: case["name"])
def test_values_and_gradients_are_those_of_trl(case: dict[str, Any]) -> None:
    policy = [sums(*case[f"policy_{side}"]).requires_grad_() for side in ("chosen", "rejected")]
    reference = [sums(*case[f"reference_{side}"]) for side in ("chosen", "rejected")]
    output = dpo(*policy, *reference, beta=case["beta"], label_smoothing=case["label_smoothing"])
    loss = mean(output)
    gradients = torch.autograd.grad(loss, policy)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-13)
    for side, gradient in zip(("chosen", "rejected"), gradients, strict=True):
        torch.testing.assert_close(gradient, sums(*case[f"grad_{side}"]), rtol=1e-12, atol=0)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert output.metrics[name].mean().item() == pytest.approx(case["metrics"][name], rel=1e-13), name
    # The golden pairs hold one tie, which TRL counts as wrong and we as half right.
    ties = int((output.metrics["rewards/margins"] == 0).sum())
    assert ties == 1
    expected = case["metrics"]["rewards/accuracies"] + 0.5 / len(ties_of(output))
    assert output.metrics["rewards/accuracies"].mean().item() == pytest.approx(expected, abs=1e-7)
    assert not any(metric.requires_grad for metric in output.metrics.values())


def ties_of(output: LossOutput) -> torch.Tensor:
    return output.metrics["rewards/accuracies"]


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_an_untrained_policy_has_ln_2(beta: float, smoothing: float) -> None:
    policy = sums(-1.0, -200.0), sums(-50.0, -3.0)
    output = dpo(*policy, *policy, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(output.numerator_R, sums(math.log(2), math.log(2)), rtol=1e-15, atol=0)
    assert output.metrics["rewards/accuracies"].tolist() == [0.5, 0.5]
    assert output.weight_R.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("smoothing", [0.02, 0.1, 0.3])
def test_smoothing_is_least_where_the_model_is_as_sure_as_the_labels(smoothing: float) -> None:
    beta, best = 0.2, math.log((1 - smoothing) / smoothing)
    margin = (best / beta + sums(-0.1, 0.0, 0.1)).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    loss = dpo(margin, zero, zero, zero, beta=beta, label_smoothing=smoothing).numerator_R
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    assert slope[0] < 0 < slope[2] and abs(slope[1]) < 1e-15
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing)
    assert loss[1].item() == pytest.approx(entropy, rel=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_are_those_of_the_values(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = [torch.randn(5, dtype=torch.float64, generator=generator).mul(8).requires_grad_() for _ in range(2)]
    reference = [torch.randn(5, dtype=torch.float64, generator=generator).mul(8) for _ in range(2)]

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return dpo(chosen, rejected, *reference, beta=0.3, label_smoothing=smoothing).numerator_R

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_extreme_log_ratios_stay_finite(dtype: torch.dtype, smoothing: float) -> None:
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zero = torch.zeros(2, dtype=dtype)
    output = dpo(chosen, zero, zero, zero, beta=1.0, label_smoothing=smoothing)
    output.numerator_R.sum().backward()
    right, wrong = 1e4 * smoothing, 1e4 * (1 - smoothing)
    torch.testing.assert_close(output.numerator_R.detach(), torch.tensor([right, wrong], dtype=dtype))
    assert chosen.grad is not None
    torch.testing.assert_close(chosen.grad, torch.tensor([smoothing, smoothing - 1], dtype=dtype))
    assert output.metrics["rewards/accuracies"].tolist() == [1.0, 0.0]
