"""TRL's value and gradient of every loss that it has too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from losses.inputs import of_tokens, total
from losses.variants import for_each
from prefopt.losses.parse import parse_losses

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/losses.json").read_text("utf-8"))
# TRL 1.16 computes the alpha divergence and ORPO's odds in float32 whatever it is given.
RTOL = {"float64": 1e-11, "float32": 3e-5}
SIDES = ("chosen", "rejected")


class Case(dict[str, Any]):
    """A golden case; as text it is its loss and options."""

    def __repr__(self) -> str:
        return " ".join([self["loss"], *self["options"], *filter(None, [self["weighting"]])])


CASES = [Case(case) for case in GOLDEN["cases"]]


@for_each([(case,) for case in CASES if case["trl"]["trainer"] != "KTOTrainer"])
def test_losses_on_pairs_are_those_of_trl(case: dict[str, Any]) -> None:
    count, rtol = case["pairs"], RTOL[case["dtype"]]

    def rows(kind: str) -> dict[str, list[torch.Tensor]]:
        return {
            s: [torch.tensor(r, dtype=torch.float64) for r in GOLDEN["pairs"][f"{kind}_{s}"][:count]] for s in SIDES
        }

    policy, reference = rows("policy"), rows("reference")
    flat = [row.requires_grad_() for side in SIDES for row in policy[side]]
    tensors = of_tokens(policy, reference, rows("sum_sq"))
    loss = total(parse_losses(case["loss"], case["options"], weighting=case["weighting"]), tensors)
    gradients = torch.autograd.grad(loss, flat, materialize_grads=True)
    assert loss.item() == pytest.approx(case["value"], rel=rtol)
    golden = [torch.tensor(row, dtype=torch.float64) for side in SIDES for row in case["grad"][side]]
    largest = max(row.abs().max().item() for row in golden)
    torch.testing.assert_close(torch.cat(gradients), torch.cat(golden), rtol=rtol, atol=rtol * 1e-3 * largest)


@for_each([(case,) for case in CASES if case["trl"]["trainer"] == "KTOTrainer"])
def test_losses_on_labels_are_those_of_trl(case: dict[str, Any]) -> None:
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in GOLDEN["labels"].items() if k != "label"}
    leaf = given["logp"].requires_grad_()
    tensors = {
        "logp_N": leaf,
        "ref_logp_N": given["reference"],
        "label_N": torch.tensor(GOLDEN["labels"]["label"]),
        "mismatched_logp_N": given["mismatched"],
        "mismatched_ref_logp_N": given["mismatched_reference"],
    }
    loss = total(parse_losses(case["loss"], case["options"]), tensors)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(case["value"], rel=RTOL[case["dtype"]])
    torch.testing.assert_close(gradient, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-11, atol=1e-15)


def test_every_type_and_divergence_of_trl_is_compared() -> None:
    compared = [c["trl"] for c in GOLDEN["cases"] if c["trl"]["trainer"] == "DPOTrainer"]
    types = {kind for c in compared for kind in c.get("loss_types", ["sigmoid"])}
    assert types == set(
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
        " sigmoid_norm".split()
    )
    divergences = {c.get("f_divergence_type", "reverse_kl") for c in compared}
    assert divergences == {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"}
