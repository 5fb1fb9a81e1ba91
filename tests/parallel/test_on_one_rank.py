"""What one rank asks for, lacks or fails in: the others do the same, and none waits for a message that never comes."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import prefopt
from data.small import small_tokenizer
from parallel.ranks import Failure, on_ranks
from parallel.test_runs import MACHINE, OPTIONS, PPO, prepared, same, train, train_twice, weights
from prefopt.core.ranks import ranks_in
from prefopt.rl.rollouts import Collector
from prefopt.runs.experts import read_experts
from prefopt.train import batch, held_out
from prefopt.train.reference import ReferenceRun
from prefopt.train.step import Differentiator
from prefopt.train.trainer import Trainer
from train.small import pairs, tiny_llama, write_model


class Asks(prefopt.Callback):
    """Stops, saves or fails after step 2."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_step(self, run: Any, step: int, metrics: Any) -> None:
        if step == 2:
            if self.what == "fail":
                raise ValueError("mine")
            getattr(run, self.what)()


def _asks(data: str, model: str, output: str, rank: int, what: str) -> int:
    calls = [Asks(what)] if ranks_in().rank == rank else []
    options = {**MACHINE, **OPTIONS, "save_every": 4, "keep_last": 5}
    return prefopt.dpo(model=model, output=output, data=[data], callbacks=calls, **options).steps


@pytest.mark.parametrize(("what", "rank"), [("stop", 1), ("save", 1), ("fail", 0), ("fail", 1)])
def test_what_a_callback_of_one_rank_asks_for_all_do(what: str, rank: int, tmp_path: Path) -> None:
    model, data = prepared(tmp_path, "pairs")
    found = on_ranks(3, _asks, data, model, str(tmp_path / "out"), rank, what, failing=True)
    kept = sorted(p.name for p in (tmp_path / "out" / "checkpoints").glob("step-*"))
    if what == "fail":
        assert [(f.kind, "mine" in f.message) for f in found] == [("CallbackFailed", True)] * 3
        assert kept == ["step-00000002"]
    else:
        assert found == [2 if what == "stop" else 4] * 3
        assert kept == (["step-00000002"] if what == "stop" else ["step-00000002", "step-00000004"])


def _out_of_memory(data: str, model: str, output: str, loss: str, call: int) -> Any:
    """With an error in one of the calls that score a micro-batch, on rank 1."""
    own, calls = Differentiator._scored, []

    def scored(self: Differentiator, part: Any) -> Any:
        calls.append(part)
        if ranks_in().rank == 1 and len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(self, part)

    Differentiator._scored = scored  # type: ignore[method-assign]
    return train("dpo", data, {"loss": loss, "token_budget": 200}, model, output)


@pytest.mark.parametrize("loss", ["dpo", "aot"])
def test_out_of_memory_on_one_rank_is_repeated_by_all(loss: str, tmp_path: Path) -> None:
    model, data = prepared(tmp_path, "pairs")
    on_ranks(1, train, "dpo", data, {"loss": loss, "token_budget": 200}, model, str(tmp_path / "one"))
    on_ranks(3, _out_of_memory, data, model, str(tmp_path / "three"), loss, 3)
    same(tmp_path / "one", tmp_path / "three")


def _out_of_memory_in_packing(data: str, model: str, output: str) -> Any:
    """On rank 1, in its second step."""
    own, calls = batch.pack, []

    def pack(*arguments: Any) -> Any:
        if inspect.stack()[1].function == "micro_batches":
            calls.append(1)
            if ranks_in().rank == 1 and len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(*arguments)

    batch.pack = pack
    return train("dpo", data, {"loss": "aot", "token_budget": 200}, model, output)


def test_out_of_memory_while_a_whole_batch_is_packed_is_repeated_by_all(tmp_path: Path) -> None:
    model, data = prepared(tmp_path, "pairs")
    on_ranks(1, train, "dpo", data, {"loss": "aot", "token_budget": 200}, model, str(tmp_path / "one"))
    on_ranks(3, _out_of_memory_in_packing, data, model, str(tmp_path / "three"))
    same(tmp_path / "one", tmp_path / "three")
    assert len((tmp_path / "three" / "metrics.jsonl").read_text().splitlines()) == 4


def _given(output: str, method: str, apart: bool) -> int:
    """A model and an iterator of rows made on each rank."""
    model, options = tiny_llama(ranks_in().rank if apart else 0), {**MACHINE, **OPTIONS, "lora": True}
    run = getattr(prefopt, method)
    return int(run(model, iter(pairs(10)), tokenizer=small_tokenizer(), output=output, **options).steps)


def test_models_given_in_python_must_be_the_same_on_all_ranks(tmp_path: Path) -> None:
    assert on_ranks(2, _given, str(tmp_path / "same"), "sft", False) == [4, 4]
    for found in on_ranks(2, _given, str(tmp_path / "apart"), "sft", True, failing=True):
        assert isinstance(found, Failure) and "weights" in found.message and "rank 1" in found.message


def _two_runs(data: str, model: str, output: str) -> Any:
    train("sft", data, {"eval_fraction": 0.3}, model, f"{output}-before")
    return train("dpo", data, {"loss": "dpo:0.5,ipo:0.5"}, model, output), train("dpo", data, {}, model, f"{output}2")


def test_a_second_run_of_the_same_processes_has_its_own_metrics(tmp_path: Path) -> None:
    model, data = prepared(tmp_path, "pairs")
    for size in (1, 2):
        on_ranks(size, _two_runs, data, model, str(tmp_path / f"on{size}"))
    same(tmp_path / "on1", tmp_path / "on2")
    same(tmp_path / "on12", tmp_path / "on22")


@pytest.mark.parametrize("shard", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_that_diverges_leaves_one_good_model(shard: str, tmp_path: Path) -> None:
    model, data = prepared(tmp_path, "pairs")
    away = {**PPO, "max_kl": 2.0, "beta": 0.0, "learning_rate": 2e-3, "max_steps": 12, "epochs": 12, "save_every": 1}
    for size in (1, 3):
        options = away if size == 1 else {**away, "shard": shard}
        found = on_ranks(size, train, "ppo", data, options, model, str(tmp_path / f"on{size}"), failing=True)
        assert [(f.kind, "are a model" in f.message) for f in found] == [("Diverged", True)] * size
    one, other = (weights(tmp_path / f"on{size}" / "last-good") for size in (1, 3))
    assert one.keys() == other.keys()
    assert all(abs(one[name] - other[name]).max() < 1e-9 for name in one)


LOTS = {"epochs": 8, "max_steps": 8}
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "adapter of a reward model": ("reward", ["none", "full"], {"eval_fraction": 0.3, "lora": True, "lora_rank": 2}),
    "one held-out row": (
        "dpo",
        ["none", "full"],
        {"eval_fraction": 0.1, "samples": 0, "eval_every": 1, "early_stopping": 1, "learning_rate": 0.05, **LOTS},
    ),
    "from scratch": ("sft", ["none", "full"], {"from_scratch": True, "train_tokenizer": 300, "token_budget": 100}),
    "pre-training term": ("ppo", ["none", "full"], {**PPO, "kl_target": 3.0, "critic": "head", "ptx_coefficient": 0.5}),
    "another reference": ("dpo", ["none", "full"], {"loss": "tdpo"}),
    "experts": ("dpo", ["none", "full"], {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}),
    "experts of ppo": (
        "ppo",
        ["none", "full"],
        {**PPO, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "dtype": "float64"},
    ),
    "experts, one pass": (
        "sft",
        ["none", "full"],
        {"router_z_loss_coef": 0.1, "eval_fraction": 0.3, "samples": 0, "dtype": "float64"},
    ),
}


def _check(name: str, shards: list[str], folder: Path) -> None:
    method, _, options = CASES[name]
    if mixture := name.startswith("experts"):
        from model.architectures import build

        build("mixtral", vocab_size=len(small_tokenizer())).save_pretrained(folder / "base")
        small_tokenizer().save_pretrained(folder / "base")
    model, data = prepared(folder, "pairs")
    if name == "another reference":
        options = {**options, "reference": write_model(folder / "reference", seed=3)}
    if name == "pre-training term":
        options = {**options, "ptx_data": [data], "ptx_batch_size": 2}
    on_ranks(1, train_twice, method, data, options, model, str(folder / "one"))
    for shard in shards:
        on_ranks(3, train_twice, method, data, {**options, "shard": shard}, model, str(folder / shard))
        same(folder / "one", folder / shard)
        if mixture:
            tables = [read_experts(folder / kind) for kind in ("one", shard)]
            assert tables[0] == tables[1] and len(tables[0]) == 2


def test_an_adapter_of_a_reward_model_in_shards_is_merged(tmp_path: Path) -> None:
    _check("adapter of a reward model", ["full"], tmp_path)
    one, other = (json.loads((tmp_path / n / "reliability.json").read_text()) for n in ("one", "full"))
    assert one["accuracy"] == other["accuracy"] and one["pairs"] == other["pairs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_other_runs_on_three_ranks(name: str, tmp_path: Path) -> None:
    _check(name, CASES[name][1], tmp_path)


def _stops(*arguments: Any, rank: int = 1, updates: int = 5) -> Any:
    """A run, of which one rank gets a signal after some updates."""
    own, calls = Trainer._update, []

    def update(self: Trainer, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == updates and ranks_in().rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *given)

    Trainer._update = update  # type: ignore[method-assign]
    return train(*arguments)


RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "within a step": ("ppo", {**PPO, "lora": True}),
    "within a step, in shards": ("ppo", {**PPO, "shard": "full"}),
    "moving reference": ("dpo", {"shard": "full", "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, **LOTS}),
    "best weights": (
        "dpo",
        {"shard": "full", "eval_fraction": 0.3, "eval_every": 1, "lora": True, "lora_dropout": 0.2, **LOTS},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RESUMED))
def test_a_run_that_one_rank_stops_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    method, options = RESUMED[name]
    model, data = prepared(tmp_path, "pairs")
    on_ranks(2, train, method, data, options, model, str(tmp_path / "whole"))
    stopped = on_ranks(2, _stops, method, data, options, model, str(tmp_path / "parts"), failing=True)
    assert [found.kind for found in stopped] == ["Interrupted"] * 2, stopped
    within = [p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*-*")]
    assert bool(within) == name.startswith("within a step")
    on_ranks(2, train, method, data, {**options, "resume": True}, model, str(tmp_path / "parts"))
    shutil.rmtree(tmp_path / "parts" / "checkpoints", ignore_errors=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all((one[n] == other[n]).all() for n in one)


def _fails_once(kind: Any, name: str, *arguments: Any) -> int:
    """A run in which a method has no memory once, on rank 1. Returns how often it was called."""
    own, calls = getattr(kind, name), []

    def method(self: Any, *given: Any, **more: Any) -> Any:
        calls.append(given)
        if ranks_in().rank == 1 and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(self, *given, **more)

    setattr(kind, name, method)
    train(*arguments)
    return len(calls)


def _no_room_in_float32(data: str, model: str, output: str, where: str, loss: str) -> str:
    """A run on which rank 1 has no memory for float32: for copies of weights, or in passes of the first evaluation."""
    if ranks_in().rank == 1 and where == "copies":
        held_out.free_memory = lambda device: 1  # type: ignore[assignment]
    own = Differentiator._scored

    def scored(self: Differentiator, part: Any) -> Any:
        wide = next(self.scorer.model.parameters()).dtype == torch.float32
        if ranks_in().rank == 1 and where == "passes" and wide and not self.world.alone:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(self, part)

    Differentiator._scored = scored  # type: ignore[method-assign]
    # At this rate rounding is all that is seen, so that the first evaluation chooses float32.
    own_options: dict[str, Any] = {"dtype": "bfloat16", "eval_fraction": 0.3, "learning_rate": 1e-6, "lora": True}
    options = {**MACHINE, **OPTIONS, **own_options, "loss": loss, "max_steps": 2}
    prefopt.dpo(model=model, output=output, data=[data], **options)
    record: dict[str, Any] = json.loads((Path(output) / "run.json").read_text())
    return str(record["eval_dtype"])


@pytest.mark.parametrize(
    ("where", "loss"),
    [
        ("copies", "dpo"),
        ("passes", "dpo"),
        pytest.param("passes", "kto", marks=pytest.mark.slow),
        pytest.param("", "dpo", marks=pytest.mark.slow),
    ],
)
def test_where_one_rank_has_no_memory_for_float32_none_evaluates_in_it(where: str, loss: str, tmp_path: Path) -> None:
    model, data = prepared(tmp_path, "pairs")
    chosen = on_ranks(2, _no_room_in_float32, data, model, str(tmp_path / "out"), where, loss)
    assert chosen == ["run" if where else "float32"] * 2


def _reference_fails(*arguments: Any) -> int:
    own, calls = ReferenceRun._make_score, []

    def make(self: ReferenceRun) -> Any:
        score = own(self)

        def once(groups: Any) -> Any:
            calls.append(groups)
            if ranks_in().rank == 1 and len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return score(groups)

        return once

    ReferenceRun._make_score = make  # type: ignore[method-assign]
    train(*arguments)
    return len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_out_of_memory_before_a_step_on_one_rank_is_repeated_by_all(method: str, tmp_path: Path) -> None:
    """While the reference is scored, or rollouts are."""
    model, data = prepared(tmp_path, "pairs")
    options = {**PPO, "token_budget": 200} if method == "ppo" else {"token_budget": 40}
    on_ranks(1, train, method, data, options, model, str(tmp_path / "one"))
    shutil.rmtree(os.environ["PREFOPT_CACHE"])
    arguments = (method, data, options, model, str(tmp_path / "three"))
    if method == "ppo":
        calls = on_ranks(3, _fails_once, Collector, "_look", *arguments)
    else:
        calls = on_ranks(3, _reference_fails, *arguments)
    assert calls[1] > 1
    same(tmp_path / "one", tmp_path / "three")
