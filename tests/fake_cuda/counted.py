"""The memory that is counted for CUDA without contents, against a whole pass on a fake CUDA device; test_fake_cuda.py
runs this.

Fake tensors have no contents either, but this is the scorer's own way on CUDA, at its full depth: a batch that was
moved to the device, the device's kernels, nothing extrapolated.
"""

from __future__ import annotations

from fake_cuda.device import CUDA, fake_cuda, moved  # isort: skip - before torch

from typing import Any

import pytest
import torch

from fake_cuda.policy import scorer_of
from model.architectures import SHARED
from model.oracle import groups_of_every_kind
from model.test_memory import WIDE, groups_of
from prefopt.data.group import Group
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.kernels.head_class import head_of
from prefopt.model.memory import Blueprint, LiveBytes
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer
from train.small import tiny_llama

SOFT_CAPPED = {"gemma2"}
"""FlexAttention does not run on the fake device."""
WAYS = ("full", "checkpointed", "lora", "lora, checkpointed")


def held(scorer: Scorer, weights: MasterWeights, groups: list[Group]) -> int:
    """The most bytes on the device in a pass; gradients of weights are there already."""
    for master in weights.masters.values():
        master.grad = torch.zeros_like(master)
    batch = pack(groups, scorer.layout).to(CUDA)
    with LiveBytes("cuda") as live:
        scorer(batch).sum().backward()
        live.mark("end")
    return live.marks["end"][1]


@pytest.mark.parametrize("way", [way if way == WAYS[-1] else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_layers_are_added_up_for_the_whole_depth(way: str) -> None:
    """With GELU: the backward pass of SiLU is one kernel on CUDA, but made of many in a torch without CUDA."""
    model: Any = tiny_llama(**WIDE, hidden_act="gelu")
    head = head_of(model)
    if way.startswith("lora"):
        model = new_lora(model.requires_grad_(False), rank=4, alpha=8, dropout=0.0, targets=None)
    groups = groups_of(6, 40, 40)
    with fake_cuda():
        weights = MasterWeights(moved(model), torch.bfloat16)
        scorer = Scorer(model, head=head)
        if "checkpointed" in way:
            checkpoint_activations(model)
        found = held(scorer.train(), weights, groups)
        blueprint = Blueprint.of(scorer)
    assert blueprint.kind == "cuda" and len(blueprint.depth) == 6 and max(blueprint.depth) == 1
    assert blueprint.count(groups).peak == pytest.approx(found, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", [name for name in SHARED if name not in SOFT_CAPPED])
def test_every_architecture_is_counted(name: str, kind: str) -> None:
    groups = groups_of_every_kind()
    with fake_cuda():
        scorer, weights = scorer_of(name, kind)
        found = held(scorer, weights, groups)
        blueprint = Blueprint.of(scorer)
    assert blueprint.count(groups).peak == pytest.approx(found, rel=0.1)
