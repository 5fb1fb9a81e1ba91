"""The learning rate that is suggested, and the one that short branches find."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import prefopt
from prefopt.config.dpo import DpoConfig
from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.rates import LARGE, suggested_rate
from prefopt.errors import ConfigError, Interrupted, RunError
from prefopt.model.scorer import PackedModel
from prefopt.train.find_rate import Branches
from prefopt.train.trainer import Trainer
from train.small import QUICK, pairs, weights, write_model

ROWS = pairs(24)
AUTO = {name: value for name, value in QUICK.items() if name != "learning_rate"} | {"dtype": "float64"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("m") / "m")


def dpo(model: str, output: Path, **options: Any) -> Any:
    return prefopt.dpo(model, ROWS, output=output, **{**AUTO, **options})


def record(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "run.json").read_text())
    return found


def test_large_models_get_the_published_rate_and_small_ones_more() -> None:
    def rate(count: float, updates: int = 200, batch: int = 16) -> float:
        return suggested_rate(1e-6, int(count), updates=updates, batch=batch, usual_batch=16, most=1e-4)

    assert {rate(n, u, b) for n in (LARGE, 8e9) for u in (10, 10_000) for b in (1, 512)} == {1e-6}
    sizes = [rate(10**k) for k in (4.0, 5.0, 6.0, 7.0, 8.0, 8.5, 8.69)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == sizes[1] == pytest.approx(1e-4)
    assert rate(0.999 * LARGE, 10, 512) == pytest.approx(1e-6, rel=0.01), "no jump"
    assert rate(1e6, 50) == pytest.approx(2 * rate(1e6, 200)) and rate(1e6, batch=64) == pytest.approx(2 * rate(1e6))
    assert rate(1e6, 1) == pytest.approx(3 * rate(1e6)) and rate(1e6, 10**9, 1) >= 1e-6


def test_the_rate_is_settled_said_and_kept_for_a_resume(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo(small, tmp_path / "whole", epochs=2, progress="plain")
    said = re.search(r"learning rate: (\S+), suggested for \S+ million weights in 12 updates", capsys.readouterr().out)
    assert said
    rate, kept = float(said[1]), record(tmp_path / "whole")
    assert kept["options"]["learning_rate"] == kept["resolved"]["learning_rate"]["to"] == rate > 1e-5
    assert f"learning_rate: {rate}" in (tmp_path / "whole/config.yaml").read_text()
    dpo(small, tmp_path / "given", epochs=2, learning_rate=rate, progress="plain")
    assert re.search(rf"learning rate: {said[1]}; suggested for .*: {said[1]}", capsys.readouterr().out)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "given")
    assert all(torch.equal(one[name], two[name]) for name in one)

    step = Trainer.make_step

    def interrupted(self: Trainer) -> Any:
        if self.state.step == 5:
            self.keep()
            raise Interrupted("stopped", 2)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "make_step", interrupted)
        with pytest.raises(Interrupted):
            dpo(small, tmp_path / "parts", epochs=2)
    # Another version may suggest another rate: the run goes on with the one that it began with.
    monkeypatch.setattr("prefopt.train.rate.suggested_rate", lambda *given, **named: 1.0)
    with pytest.raises(RunError, match=r"--learning-rate was .* and is 0.5"):
        dpo(small, tmp_path / "parts", epochs=2, resume=True, learning_rate=0.5)
    dpo(small, tmp_path / "parts", epochs=2, resume=True)
    parts = weights(tmp_path / "parts")
    assert all(torch.equal(one[name], parts[name]) for name in one)


def test_published_rates_are_those_of_papers() -> None:
    found = [DpoConfig(model="m", data=["d"], output="o", lora=lora) for lora in (False, True)]
    assert [c.learning_rate for c in found] == ["auto", "auto"] and [c.published_rate for c in found] == [1e-6, 2e-5]
    given: dict[str, Any] = {"model": "m", "prompts": ["p"], "reward": "length", "output": "o"}
    for loss, rates in (("dpo", (1e-6, 2e-5)), ("grpo", (1e-6, 1e-5)), ("best_of_k", (1e-5, 2e-4))):
        online = [OnlineConfig(**given, loss=loss, lora=lora) for lora in (False, True)]
        assert all(c.learning_rate == "auto" for c in online) and tuple(c.published_rate for c in online) == rates
    ppo = PpoConfig(model="m", prompts=["p"], reward="length", output="o")
    assert ppo.learning_rate == "auto" and ppo.critic_learning_rate is None and ppo.published_rate == 3e-6
    assert replace(ppo, learning_rate=1e-4).critic_learning_rate == 1e-4, "the critic learns at the same rate"


FIND: dict[str, Any] = {"eval_fraction": 0.25, "epochs": 4, "find_learning_rate": True}


def test_branches_start_from_the_same_weights_and_the_run_from_these(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    forward = PackedModel.hidden
    monkeypatch.setattr(PackedModel, "hidden", lambda self, batch: scored.append(1) or forward(self, batch))
    dpo(small, tmp_path / "found", progress="plain", **FIND)
    said = capsys.readouterr().out
    kept = record(tmp_path / "found")
    tried = {float(rate): math.inf if loss is None else loss for rate, loss in kept["learning_rates_tried"].items()}
    found = min(tried, key=tried.__getitem__)
    assert len(tried) >= 5 and kept["learning_rate_found"] == kept["options"]["learning_rate"] == found
    assert said.count("responses scored in") == 1 and "responses from the cache" not in said, "one reference cache"
    assert re.search(rf"^  {found:g} +{tried[found]:.4f}  best$", said, re.M)
    rates = sorted(tried)
    assert len(tried) == 9 or found not in (rates[0], rates[-1]), "the best is not the last that was tried"
    # The run is the one that this rate gives without branches; a branch is a run of as many steps.
    plain = {name: value for name, value in FIND.items() if name != "find_learning_rate"}
    dpo(small, tmp_path / "plain", learning_rate=found, **plain)
    one, two = weights(tmp_path / "found"), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], two[name]) for name in one)
    dpo(small, tmp_path / "branch", learning_rate=rates[1], max_steps=20, eval_every=20, **plain)
    lines = [json.loads(line) for line in (tmp_path / "branch/metrics.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [pytest.approx(tried[rates[1]], abs=1e-12)]


def test_a_search_in_which_every_rate_diverges_trains_nothing(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Branches, "run_at", lambda self, rate: math.inf)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"diverged at every rate from \S+ to \S+; start a new run"):
            dpo(small, tmp_path / "out", resume=resume, **FIND)
        kept = record(tmp_path / "out")
        assert "learning_rate_found" not in kept and not any(kept["learning_rates_tried"].values())


@pytest.mark.slow
def test_a_search_that_stops_is_gone_on_with(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[int] = []
    step = Trainer.make_step

    def stopping(self: Trainer) -> Any:
        made.append(1)
        if len(made) == 30:
            self.stop.signal = 2
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "make_step", stopping)
        with pytest.raises(Interrupted, match="stopped while learning rates were tried"):
            dpo(small, tmp_path / "out", **FIND)
        assert len(record(tmp_path / "out")["learning_rates_tried"]) == 1
        assert (
            dpo(small, tmp_path / "out", resume=True, progress="plain", **{**FIND, "find_learning_rate": "stop"})
            is None
        )
        assert not list((tmp_path / "out").glob("*model.safetensors"))
        said = capsys.readouterr().out
        assert re.search(r"stopped, as --find-learning-rate stop asks: --resume without it trains at", said)
        dpo(small, tmp_path / "out", resume=True, **{**FIND, "find_learning_rate": False})
    dpo(small, tmp_path / "whole", **FIND)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_options_that_contradict_are_one_line() -> None:
    for options, told in (
        ({"eval_fraction": 0}, "--find-learning-rate compares held-out losses: give --eval-data"),
        ({"ref_model_sync_steps": 5, "eval_fraction": 0.1}, "changes the reference between them"),
    ):
        with pytest.raises(ConfigError, match=told):
            DpoConfig(model="m", data=["d"], output="o", find_learning_rate=True, **options)
