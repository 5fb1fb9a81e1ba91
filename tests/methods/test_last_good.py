"""A run whose policy runs away from its reference: what it keeps, and what can be done with that."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import small_world as world
from methods.test_ppo import ROWS, metrics, ppo
from prefopt.cli import main
from prefopt.errors import Diverged, Interrupted
from prefopt.model.scorer import Scorer
from prefopt.parallel.world import ALONE
from prefopt.rl import last_good
from prefopt.rl.last_good import write_last_good
from prefopt.rl.rollouts import Collector
from prefopt.train import checkpoint
from prefopt.train.trainer import Trainer
from train.small import weights

MAX_KL = 0.5
AWAY: dict[str, Any] = {"beta": 0.0, "max_kl": MAX_KL, "epochs": 20, "learning_rate": 1e-3, "num": 8}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


def ran_away(start: str, output: Path, **options: Any) -> str:
    """What a run says that goes too far."""
    with pytest.raises(Diverged, match=rf"more than --max-kl {MAX_KL}: the policy has diverged") as caught:
        ppo(start, output, **{**AWAY, **options})
    return str(caught.value)


RATES = {"": 1e-3, "lora": 4e-3, "an adapter as --model": 1.5e-3, "an adapter as --adapter": 1.5e-3}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("", "an adapter as --adapter") else pytest.mark.slow) for k in RATES]
)
def test_a_run_that_ran_away_leaves_a_model_to_go_on_from(kind: str, start: str, tmp_path: Path) -> None:
    output, first, options = tmp_path / "out", start, {"lora": kind == "lora", "learning_rate": RATES[kind]}
    if "adapter" in kind:
        ppo(start, tmp_path / "adapter", lora=True, max_steps=1)
        first, options["lora"] = str(tmp_path / "adapter"), True
    if "--adapter" in kind:
        options["adapter"] = first
    said = ran_away(start if "--adapter" in kind else first, output, **options)
    step = int(re.search(r"after step (\d+), are a model", said)[1])  # type: ignore[index]
    assert 0 < step <= len(metrics(output)) and all(line["objective/kl"] <= MAX_KL for line in metrics(output))
    kept, good = checkpoint.at(output / "checkpoints", step).weights, weights(output / "last-good")
    assert len(good) == sum(name.startswith("actor.") for name in kept)
    assert all(any(torch.equal(x, kept[name]) for name in kept) for x in good.values())

    # The options that are told are a command's, and that run is held by the reference of the first one.
    told = dict(zip(*[iter(re.search(r"with (--.*) and a lower", said)[1].split())] * 2, strict=True))  # type: ignore[index]
    named = {name.removeprefix("--"): value for name, value in told.items()}
    assert named.pop("reference") == first
    on = {"adapter": named.get("adapter"), "reference": first, "learning_rate": 1e-6, "num": 64}
    ppo(named["model"], tmp_path / "on", max_steps=1, **on)
    (before,) = metrics(tmp_path / "on")
    assert 0.05 < before["objective/kl"] < 3 * MAX_KL  # on all prompts; by itself it would be measured as 0

    # Every other verb opens it too.
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    where = [f"--{name}={value}" for name, value in named.items()]
    end = ["--prompts", str(prompts), "--max-new-tokens", "3", "--output", str(tmp_path / "s.jsonl"), "--device", "cpu"]
    assert main(["sample", *where, *end]) == 0 and (tmp_path / "s.jsonl").exists()


def test_weights_that_were_never_measured_are_not_taken_for_good(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped while it samples keeps weights of which nothing is known yet."""
    said = ran_away(start, tmp_path / "whole")
    bad = int(re.search(r"step (\d+): the divergence", said)[1]) - 1  # type: ignore[index]
    collect = Collector.collect

    def stopped(self: Collector, step: int, *given: Any) -> Any:
        if step == bad:
            raise Interrupted("stopped", 2)
        return collect(self, step, *given)

    def keeping(self: Trainer) -> Any:
        try:
            return run(self)
        except Interrupted:
            self.keep()
            raise

    run = Trainer.fit
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", stopped)
        patch.setattr(Trainer, "fit", keeping)
        with pytest.raises(Interrupted):
            ppo(start, tmp_path / "out", **AWAY)
    assert (tmp_path / f"out/checkpoints/step-{bad:08d}").exists()
    again = ran_away(start, tmp_path / "out", resume=True)
    assert again == said.replace(str(tmp_path / "whole"), str(tmp_path / "out"))


def test_a_run_that_runs_away_at_once_says_that_there_is_nothing_to_go_on_from(start: str, tmp_path: Path) -> None:
    said = ran_away(start, tmp_path / "out", learning_rate=1.0)
    assert re.search(r"no good weights .* kept: start a new run elsewhere with a lower .* --beta$", said)
    assert not (tmp_path / "out/last-good").exists()


def test_while_they_are_replaced_the_weights_before_are_there(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment: one of the folders is whole."""

    class Killed(BaseException):
        pass

    class Saved:
        scorer = Scorer(world.model())

        def save(self, path: Path, tokenizer: Any, *, writes: bool) -> None:
            world.write_world(path)

    def write() -> None:
        write_last_good(Saved(), path, world.tokenizer(), [world.STOP], ALONE)  # type: ignore[arg-type]

    path = tmp_path / "last-good"
    calls: list[str] = []
    remove, rename = last_good.remove_folder, Path.rename
    killed_at = 0

    def counted(name: str, work: Any) -> Any:
        calls.append(name)
        if len(calls) == killed_at:
            raise Killed
        return work()

    write()
    monkeypatch.setattr(last_good, "remove_folder", lambda p: counted("remove", lambda: remove(p)))
    monkeypatch.setattr(Path, "rename", lambda self, to: counted("rename", lambda: rename(self, to)))
    write()
    moments = len(calls)
    assert moments >= 4
    for killed_at in range(1, moments + 1):
        calls.clear()
        with suppress(Killed):  # what the last one left may take fewer moments
            write()
        whole = [f for f in tmp_path.iterdir() if f.name != ".last-good" and (f / "model.safetensors").exists()]
        assert whole, killed_at
    calls.clear()
    killed_at = 0
    write()
    assert [f.name for f in tmp_path.iterdir()] == ["last-good"]
