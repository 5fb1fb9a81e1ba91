"""--max-kl of DPO: measured on samples of the policy, and the last good weights are a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import prefopt
from methods import small_world as world
from methods.test_ppo import metrics
from prefopt import theory
from prefopt.errors import ConfigError, Diverged, Interrupted
from prefopt.model.load import load_model
from prefopt.model.scorer import Scorer
from prefopt.train.trainer import Trainer
from train.small import CLOCKS, weights

GOOD, BAD = ["aaa", "aba", "aea"], ["fff", "fdf", "dfd"]
ROWS = [
    {"prompt": p, "responses": [a, b], "finish": ["length", "length"], "order": [0, 1]}
    for p in ("abc", "bca", "cab", "dab")
    for a, b in zip(GOOD, BAD, strict=True)
]
OPTIONS: dict[str, Any] = {"batch_size": 4, "device": "cpu", "dtype": "float64", "progress": "none", "warmup": 0.0}
OPTIONS |= {"learning_rate": 1e-3, "epochs": 4, "beta": 0.05, "max_kl": 3.0, "kl_every": 2, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


def dpo(model: str, output: Path, rows: Any = ROWS, **options: Any) -> Any:
    return prefopt.dpo(model, rows, output=output, **{**OPTIONS, **options})


def divergence(one: str, two: str) -> float:
    """KL of the responses to one prompt, all of them listed."""
    logps = []
    for folder in (one, two):
        scorer = Scorer(load_model(folder, dtype=torch.float64, device=torch.device("cpu")))
        with torch.no_grad():
            logps.append(world.distribution(scorer).numpy())
    return float(theory.kl(logps[0], logps[1]))


def test_the_kl_is_that_of_the_policys_own_samples(start: str, tmp_path: Path) -> None:
    """Of one prompt, where every response can be listed, within the noise of 2,000 samples."""
    rows = [row for row in ROWS if row["prompt"] == world.PROMPT]
    options = {"kl_samples": 2000, "epochs": 8, "max_kl": 100.0, "kl_every": 4}
    dpo(start, tmp_path / "out", rows, **options)
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines if "objective/kl" in line] == [5], "of the weights after step 4"
    results = json.loads((tmp_path / "out/run.json").read_text())["results"]
    told = re.fullmatch(r"(\S+) nats per response \(error (\S+)\)", results["KL from the reference, on samples"])
    assert told
    exact = divergence(str(tmp_path / "out"), start)
    assert exact > 0.2 and abs(float(told[1]) - exact) < 4 * float(told[2])
    assert not (tmp_path / "out/last-good").exists(), "a run that ended well leaves its model alone"
    plain = {name: value for name, value in OPTIONS.items() if name not in ("max_kl", "kl_every", "max_new_tokens")}
    prefopt.dpo(start, rows, output=tmp_path / "plain", **{**plain, "epochs": 8})
    one, two = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], two[name]) for name in one), "to measure changes nothing"


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_a_run_that_goes_too_far_stops_and_leaves_its_last_good_weights(lora: bool, start: str, tmp_path: Path) -> None:
    options = {"learning_rate": 1.5e-3 if lora else 1e-3, "lora": lora, "epochs": 20, "max_kl": 2.0}
    with pytest.raises(Diverged, match=r"on 64 samples of the policy, more than --max-kl 2") as caught:
        dpo(start, tmp_path / "out", **options)
    told = re.search(
        r"the last good weights, after step (\d+), are a model: go on from them, .* with (--.*) and", str(caught.value)
    )
    assert told
    kept = tmp_path / "out/last-good"
    assert str(kept) in told[2] and f"--reference {start}" in told[2] and ("--adapter" in told[2]) == lora
    assert all(line["objective/kl"] <= 2.0 for line in metrics(tmp_path / "out") if "objective/kl" in line)
    # They are the weights of that step: those of a run that is cut there.
    step = int(told[1])
    made: list[dict[str, torch.Tensor]] = []
    make = Trainer.make_step

    def noted(self: Trainer) -> Any:
        if self.state.step == step:
            made.append({name: value.clone() for name, value in self.policy.weights.saved()})
            raise Interrupted("enough", 2)
        return make(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "make_step", noted)
        with pytest.raises(Interrupted):
            dpo(start, tmp_path / "cut", **options)
    good = weights(kept)
    values = [value.to(torch.float64) for value in made[0].values()]
    assert all(any(x.shape == v.shape and torch.equal(x.to(torch.float64), v) for v in values) for x in good.values())


def test_a_guarded_run_is_resumed_to_the_same_bits(start: str, tmp_path: Path) -> None:
    dpo(start, tmp_path / "whole", max_kl=100.0)
    make, made = Trainer.make_step, [0]

    def stopping(self: Trainer) -> Any:
        made[0] += 1
        if made[0] == 6:
            self.stop.signal = 2
        return make(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "make_step", stopping)
        with pytest.raises(Interrupted):
            dpo(start, tmp_path / "parts", max_kl=100.0)
    dpo(start, tmp_path / "parts", max_kl=100.0, resume=True)
    one, two = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [
        [{name: x for name, x in line.items() if name not in CLOCKS} for line in metrics(tmp_path / name)]
        for name in ("parts", "whole")
    ]
    assert lines[0] == lines[1] and sum("objective/kl" in line for line in lines[0]) == 5


def test_what_cannot_be_measured_is_one_line(start: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--kl-every does nothing without --max-kl"):
        dpo(start, tmp_path / "out", max_kl=None, max_new_tokens=None)
    with pytest.raises(ConfigError, match="no prompt leaves room for --max-new-tokens 16; lower that"):
        dpo(start, tmp_path / "out", max_new_tokens=16)
