"""Every family that can be built in miniature: scored as its own class scores it, and trained a step in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from model.families import FAMILIES, config_of
from model.oracle import groups_of_every_kind
from prefopt.generate.sampler import SamplingParams
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.check import check_scoring, clone_difference, tiny_clone
from prefopt.model.flops import FlopCount
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights, disable_dropout
from prefopt.model.scorer import Scorer

# What went wrong once, each for a reason of its own.
QUICK = {
    "gemma4": ("shared", "fused"),
    "ernie4_5_moe": ("shared", "fused"),
    "mamba": ("shared", "fused"),
    "minimax": ("shared", "fused"),
    "nemotron": ("separate", "fused"),
    "doge": ("separate", "fused"),
    "recurrent_gemma": ("shared", "fused"),
    "falcon_h1": ("shared", "fused"),
    "hyperclovax": ("shared", "fused"),
    "modernbert-decoder": ("shared", "class"),
    "granitemoehybrid attention": ("shared", "fused"),
    "mimo_v2_flash": ("shared", "fused"),
}


def built(family: str, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """A miniature with all weights random, norms too, the same in every dtype."""
    config = config_of(family, **changes)
    disable_dropout(config)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.to(dtype).eval()


def families() -> list[Any]:
    return [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAMILIES]


@pytest.mark.parametrize("family", families())
def test_a_family_is_scored_and_trained(family: str) -> None:
    groups = groups_of_every_kind()[:8]
    assert clone_difference(built(family, torch.float64)) < 1e-5, "of the miniature itself"
    report = check_scoring(Scorer(built(family, torch.float32)), groups)
    assert report.clone_error is not None, "the load check had no twin"
    assert report.clone_error < 1e-5

    model = built(family, torch.float32)
    masters = MasterWeights(model, torch.bfloat16)
    scorer = Scorer(model)
    if family in QUICK:
        assert (scorer.path, scorer.head.kind) == QUICK[family]
    assert (scorer.reason is None) == (scorer.path == "shared"), "a fall back is said"
    check_scoring(scorer, groups)
    found = scorer(pack(groups, scorer.layout))
    (-found.sum()).backward()
    moved = [n for n, p in masters.masters.items() if p.grad is not None]
    assert moved
    assert all(torch.isfinite(masters.masters[n].grad).all() for n in moved)
    assert FlopCount.of(model).per_token > 0


@pytest.mark.parametrize("family", families())
def test_a_family_is_sampled_from(family: str) -> None:
    scorer = Scorer(built(family, torch.float32))
    found = TransformersSampler(scorer).sample([[3, 4, 5], [6, 7, 8, 9]], 2, SamplingParams(max_new_tokens=4))
    assert [len(sample.ids) for many in found for sample in many] == [4] * 4


def test_families_that_must_have_a_pad_token_have_a_twin() -> None:
    assert tiny_clone(config_of("cwm")) is not None
    assert tiny_clone(config_of("modernbert-decoder")) is not None
