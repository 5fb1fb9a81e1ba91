"""Every option that is SFT's or the reward model's own does something: runs with and without it end elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import prefopt
from prefopt.config.reward import RewardConfig
from prefopt.config.sft import SftConfig
from prefopt.config.training import MethodOptions, ModelOptions
from prefopt.core.options import options
from train.small import QUICK, weights, write_model

RANKED = [
    {"prompt": f"{i}: ", "responses": ["aaa" * (i + 1), "b", "cc"], "scores": [3.0 + i, 1.0, 0.0]} for i in range(6)
]
OWN = {
    "sft": {"average": "rows", "train_on": "all", "from_scratch": True},
    "reward": {"pairs": "best-worst", "margin": 0.5, "centre": 0.5, "zero": "all"},
}
KINDS: dict[str, Any] = {"sft": SftConfig, "reward": RewardConfig}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    write_model(folder / "m")
    for method in OWN:
        run(folder, method)
    return folder


def run(place: Path, method: str, **given: Any) -> Path:
    output = place / "-".join([method, *given])
    quick = {**QUICK, "dtype": "float64", "warmup": 0.3}
    getattr(prefopt, method)(place / "m", RANKED, output=output, **quick, **given)
    return output


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, own in OWN.items() for name in own])
def test_the_option_moves_the_weights(method: str, name: str, place: Path) -> None:
    plain, other = place / method, run(place, method, **{name: OWN[method][name]})
    if name == "zero":  # which shifts what comes out, and trains nothing else
        shifts = [AutoConfig.from_pretrained(folder).prefopt_reward_shift for folder in (plain, other)]
        assert shifts[0] != shifts[1]
        return
    one, two = weights(plain), weights(other)
    assert any(not torch.equal(one[n], two[n]) for n in one)


def test_no_option_of_their_own_is_forgotten() -> None:
    shared = {o.name for kind in (MethodOptions, ModelOptions) for o in options(kind)}
    elsewhere = {"train_tokenizer", "samples"}  # tests/methods/test_sft.py; tests/train/test_samples.py
    for method, own in OWN.items():
        assert {o.name for o in options(KINDS[method])} - shared - elsewhere == set(own)
