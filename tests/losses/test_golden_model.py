"""TRL's loss of a whole model, in float64: weights, prompts and responses in, loss, metrics and gradients out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from prefopt.data.group import Group
from prefopt.data.table import GroupTable
from prefopt.losses.parse import parse_losses
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer, response_sums
from prefopt.train.objective import PreferenceObjective
from prefopt.train.reference import without_values
from prefopt.train.step import Differentiator
from train.ranked import batches_of, columns_for

MODELS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden/dpo.json").read_text("utf-8"))["models"]
# Llama's norms and eager attention round to float32 in any dtype (see make_dpo_golden.py); GPT-2 under SDPA does not.
RTOL = {"llama": 2e-6, "gpt2": 1e-9}


def rebuilt(case: dict[str, Any], shift: float) -> torch.nn.Module:
    """The model by the formula in make_dpo_golden.py."""
    name = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "gpt2": ("GPT2Config", "GPT2LMHeadModel")}
    config_class, model_class = (getattr(transformers, n) for n in name[case["architecture"]])
    model: torch.nn.Module = model_class(config_class(**case["config"])).double()
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(case["parameters"])
    with torch.no_grad():
        for i, name in enumerate(case["parameters"]):
            j = torch.arange(parameters[name].numel())
            a = ((j * j + 17 * i) % 10007).double() / 100
            base = float(name.endswith("weight") and ("norm" in name or ".ln_" in name))
            values = base + 0.3 * torch.sin(a) + shift * torch.cos(3 * a)
            parameters[name].copy_(values.view_as(parameters[name]))
    return model


def groups_of(case: dict[str, Any]) -> list[Group]:
    groups = []
    for row, pair in enumerate(case["pairs"], 1):
        prompt = pair["prompt"]
        sides = [np.array(prompt + pair[side]) for side in ("chosen", "rejected")]
        groups.append(Group.from_sequences([(ids, np.arange(len(ids)) >= len(prompt)) for ids in sides], row))
    return groups


@pytest.mark.parametrize("token_budget", [1, 30, 1000])
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case["name"])
def test_a_model_has_trls_loss_metrics_and_gradients(case: dict[str, Any], token_budget: int) -> None:
    rtol, groups = RTOL[case["architecture"]], groups_of(case)
    with torch.no_grad():
        reference = Scorer(rebuilt(case, 0.03))
        batch = pack(groups, reference.layout)
        sums = response_sums(reference(batch), batch)
    terms = parse_losses("dpo", beta=case["beta"])
    values = replace(without_values(GroupTable.of(groups), 0.0), sums_N=sums.numpy())
    objective = PreferenceObjective(terms, device=torch.device("cpu"))
    whole = batches_of(groups, columns_for(terms), values).of(range(len(groups)))

    model = rebuilt(case, 0.0)
    scorer = Scorer(model)
    assert scorer.path == "shared"
    found = Differentiator(scorer, objective).gradients(whole, token_budget).sums.means()

    assert found["loss"] == pytest.approx(case["loss"], rel=rtol)
    for name, value in case["metrics"].items():
        assert found[name] == pytest.approx(value, rel=10 * rtol, abs=1e-7 if "accuracies" in name else 0), name
    parameters = dict(model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(case["grad_norm"], rel=rtol)
    for name, golden in case["gradients"].items():
        grad = parameters[name].grad
        assert grad is not None, name
        flat = grad.flatten()
        close = rtol * max(golden["norm"], 1e-3 * norm)  # what only rounding keeps from zero is measured by the whole
        assert flat.norm().item() == pytest.approx(golden["norm"], abs=close), name
        entries = [flat[k].item() for k in (0, len(flat) // 3, 2 * len(flat) // 3, -1)]
        assert entries == pytest.approx(golden["entries"], abs=close), name
