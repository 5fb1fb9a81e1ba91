"""Whole trainings on several processes give what one gives, whatever the method, the loss and the number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from model.vision import picture, write_folder
from parallel.ranks import on_ranks
from prefopt.losses.declare import LOSSES
from prefopt.runs.samples import SAMPLES, read_samples
from train.small import pairs, write_model, write_rows

# Ten rows in batches of four: the last batch of an epoch is of two, less than three or four ranks.
OPTIONS = {"batch_size": 4, "learning_rate": 1e-3, "max_length": 64, "token_budget": 40, "max_steps": 4, "epochs": 2}
MACHINE = {"device": "cpu", "dtype": "float32", "progress": "none"}
# Runs are compared in float64, where all is the same to 1e-9. In float32, Adam makes steps of any size of what rounding
# leaves of a gradient near zero: after four, a weight matrix differs by up to 1e-6 (relative), and the losses by 1e-7.
EXACT = {**MACHINE, "dtype": "float64"}
RANKED = [
    {
        "prompt": f"k{i}: ",
        "responses": ["aei" + "o" * i, "ou", "xyz"][: 2 + i % 2],
        "scores": [3.0, 2.0, 1.0][: 2 + i % 2],
    }
    for i in range(10)
]
LABELLED = [
    {"prompt": f"k{i}: ", "completion": "aei" * (i % 4 + 1) if i % 2 else "xyz", "label": bool(i % 2)}
    for i in range(10)
]
PPO = {"num": 2, "max_new_tokens": 6, "reward": "length", "max_kl": 1e6, "minibatches": 2, "token_budget": 60}
# Its loss, a sum of whitened terms that cancel, and its gradients lose digits in float32 that others keep.
RLOO = {**PPO, "algorithm": "rloo", "dtype": "float64"}
LORA = {"lora": True, "lora_rank": 2, "gradient_checkpointing": True}
FILES = {"pairs": lambda: pairs(10), "ranked": lambda: RANKED, "labels": lambda: LABELLED}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dpo": ("dpo", "pairs", {"eval_fraction": 0.3, "samples": 0}),  # which shards do not draw
    "lora": ("dpo", "pairs", LORA),
    "sft": ("sft", "pairs", {"eval_fraction": 0.3, "samples": 0}),
    "kto": ("dpo", "labels", {"loss": "kto"}),
    "bco": ("dpo", "pairs", {"loss": "bco"}),
    "ranking": ("dpo", "ranked", {"loss": "plackett_luce"}),
    "aot": ("dpo", "pairs", {"loss": "aot"}),
    "tr-dpo": ("dpo", "pairs", {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}),
    "distributions": ("dpo", "pairs", {"loss": "tdpo"}),
    "heads": ("dpo", "pairs", {"loss": "ld_dpo"}),
    "reward": ("reward", "pairs", {"eval_fraction": 0.3}),
    "ppo": ("ppo", "pairs", PPO),
    "rloo": ("ppo", "pairs", RLOO),
    "ppo-lora": ("ppo", "pairs", {**PPO, **LORA}),
    "rloo-lora": ("ppo", "pairs", {**RLOO, **LORA}),
}
QUICK = ["dpo", "lora", "aot", "ppo"]


def train(method: str, data: str, options: dict[str, Any], model: str, output: str) -> dict[str, float] | None:
    """One run, in the process of this rank."""
    import prefopt

    given = {**EXACT, **OPTIONS, **options}
    if method == "ppo":
        given = {n: v for n, v in given.items() if n != "max_length"} | {"prompts": [data]}
    else:
        given["data"] = [data]
    result = getattr(prefopt, method)(model=model, output=output, **given)
    return None if result is None else dict(result.metrics)


def train_twice(method: str, data: str, options: dict[str, Any], model: str, output: str) -> dict[str, float] | None:
    """The same run in float64 and, unless it says in which dtype it is, in float32."""
    if "dtype" not in options:
        train(method, data, {**options, "dtype": "float32"}, model, f"{output}-float32")
    return train(method, data, options, model, output)


def prepared(folder: Path, data: str) -> tuple[str, str]:
    """A model and a data file."""
    if not (folder / "base").exists():
        write_model(folder / "base")
    write_rows(folder / f"{data}.jsonl", FILES[data]())
    return str(folder / "base"), str(folder / f"{data}.jsonl")


def weights(folder: Path) -> dict[str, Any]:
    file = next(f for f in (folder / "adapter_model.safetensors", folder / "model.safetensors") if f.exists())
    return load_file(file)


def same(one: Path, other: Path, tolerance: float = 1e-9) -> None:
    """The same losses, weights, files and shapes, of runs in float64; of their twins in float32 the same losses."""
    same_losses(one, other, tolerance)
    a, b = weights(one), weights(other)
    assert {n: x.shape for n, x in a.items()} == {n: x.shape for n, x in b.items()}
    for name, wanted in a.items():
        gap = np.linalg.norm(b[name] - wanted) / max(np.linalg.norm(wanted), 1e-30)
        assert gap <= tolerance, (name, gap)
    twins = [folder.with_name(f"{folder.name}-float32") for folder in (one, other)]
    if twins[1].exists():
        same_losses(*twins, 1e-6)


def same_losses(one: Path, other: Path, tolerance: float) -> None:
    """The same files and losses, and metrics to a few digits less."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (one, other)]
    assert names[0] == names[1]
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        for name in a:
            if "second" in name or "memory" in name or "utilisation" in name or name == "eps":
                continue
            assert b[name] == pytest.approx(a[name], rel=20 * tolerance, abs=tolerance), (a["step"], name)
        loss = "eval_loss" if "eval_loss" in a else "loss"
        assert b[loss] == pytest.approx(a[loss], rel=tolerance, abs=tolerance)


def check(case: str, worlds: list[int], shards: list[str], folder: Path) -> None:
    method, data, options = CASES[case]
    model, file = prepared(folder, data)
    on_ranks(1, train_twice, method, file, options, model, str(folder / "one"))
    for world in worlds:
        for shard in shards:
            output = folder / f"{world}-{shard}"
            on_ranks(
                world,
                train_twice if world == 3 else train,
                method,
                file,
                {**options, "shard": shard},
                model,
                str(output),
            )
            same(folder / "one", output)


@pytest.mark.parametrize("case", QUICK)
def test_replicas_train_as_one_process_does(case: str, tmp_path: Path) -> None:
    check(case, [3], ["none"], tmp_path)


@pytest.mark.parametrize("case", ["tr-dpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_shards_train_as_one_process_does(case: str, tmp_path: Path) -> None:
    check(case, [3], ["full"], tmp_path)


@pytest.mark.parametrize("case", ["aot", pytest.param("dpo", marks=pytest.mark.slow)])
def test_replicas_of_shards_on_two_nodes_train_as_one_process_does(case: str, tmp_path: Path) -> None:
    """With two micro-batches a rank, whose gradients the replicas sum once."""
    method, data, options = CASES[case]
    model, file = prepared(tmp_path, data)
    options = {**options, "batch_size": 8}
    on_ranks(1, train_twice, method, file, options, model, str(tmp_path / "one"))
    hybrid = {**options, "shard": "hybrid", "save_every": 2}
    on_ranks(4, train_twice, method, file, hybrid, model, str(tmp_path / "hybrid"), node=2)
    kept = max((tmp_path / "hybrid" / "checkpoints").glob("step-*"))
    assert sorted(p.name for p in kept.glob("weights*")) == [f"weights-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in ("hybrid", "hybrid-float32"):
        shutil.rmtree(tmp_path / name / "checkpoints")
    same(tmp_path / "one", tmp_path / "hybrid")


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["full", "lora"])
def test_towers_in_shards_train_as_whole_ones_do(vision: str, tmp_path: Path) -> None:
    """Two rows in three have a picture, so that ranks meet with and without; some have the same one. The class computes
    norms and angles in float32: only the same micro-batches give the same digits. Gradients are compared with those of
    one process in test_shard.py."""
    model = str(write_folder("qwen3_vl", tmp_path / "base"))
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "images" / f"{n}.png").write_bytes(picture(20 + 7 * n, 16, n).data)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what is in picture {n}?"}],
            "chosen": [{"role": "assistant", "content": f"a red square {n}"}],
            "rejected": [{"role": "assistant", "content": "two cats"}],
            **({"images": [f"images/{n % 3}.png"]} if n % 3 else {}),
        }
        for n in range(10)
    ]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    options = {"vision": vision, "token_budget": 120, "max_length": 128}
    options |= {"lora": True, "lora_rank": 2} if vision == "lora" else {}
    for shard in ("none", "full"):
        on_ranks(2, train, "dpo", file, {**options, "shard": shard}, model, str(tmp_path / shard))
    same(tmp_path / "none", tmp_path / "full")
    moved = [n for n in weights(tmp_path / "full") if "visual" in n]
    assert moved and (
        vision == "lora"
        or not np.array_equal(weights(tmp_path / "full")[moved[0]], weights(tmp_path / "base")[moved[0]])
    )


@pytest.mark.slow
def test_samples_are_those_of_one_process_and_none_of_shards(tmp_path: Path) -> None:
    model, file = prepared(tmp_path, "pairs")
    options = {"eval_fraction": 0.3, "samples": 2, "max_steps": 2}
    on_ranks(1, train, "dpo", file, options, model, str(tmp_path / "one"))
    for shard in ("none", "full"):
        on_ranks(2, train, "dpo", file, {**options, "shard": shard}, model, str(tmp_path / shard))
    one, other, shards = (tmp_path / name / SAMPLES for name in ("one", "none", "full"))
    assert one.read_bytes() == other.read_bytes() and len(read_samples(tmp_path / "one")) == 2
    assert not shards.exists() and weights(tmp_path / "full").keys() == weights(tmp_path / "one").keys()


def _killed(model: str, file: str, output: str) -> None:
    from prefopt.core.ranks import ranks_in
    from prefopt.train.step import Differentiator

    own = Differentiator.gradients

    def dies(self: Differentiator, *given: Any, **more: Any) -> Any:
        if ranks_in().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, *given, **more)

    Differentiator.gradients = dies  # type: ignore[method-assign]
    train("dpo", file, {"shard": "full"}, model, output)


def test_a_peer_that_dies_within_a_pass_through_shards_is_told_in_words(tmp_path: Path) -> None:
    model, file = prepared(tmp_path, "pairs")
    first, killed = on_ranks(2, _killed, model, file, str(tmp_path / "out"), failing=True)
    assert killed is None
    assert first.kind == "PeerFailed"
    assert "--resume" in first.message


def recorded(*arguments: Any) -> list[str]:
    """The collectives that a run issues, by name and size of what is sent."""
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as of_dtensors

    calls: list[str] = []

    def note(name: str, module: Any = dist) -> None:
        inner = getattr(module, name)

        def call(*args: Any, **named: Any) -> Any:
            sizes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            calls.append(f"{name} {sizes}")
            return inner(*args, **named)

        setattr(module, name, call)

    for name in (
        "all_gather",
        "all_reduce",
        "broadcast",
        "all_gather_object",
        "broadcast_object_list",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    ):
        note(name)
    for name in ("all_gather_tensor", "all_reduce", "reduce_scatter_tensor"):
        note(name, of_dtensors)
    train(*arguments)
    return calls


@pytest.mark.parametrize("shard", ["none", "full"])
def test_every_rank_issues_the_same_collectives(shard: str, tmp_path: Path) -> None:
    method, data, options = CASES["dpo"]
    model, file = prepared(tmp_path, data)
    given = {**options, "shard": shard, "loss": "aot", "max_steps": 3}
    first, *others = on_ranks(3, recorded, method, file, given, model, str(tmp_path / "out"))
    assert len(first) > 20
    assert all(calls == first for calls in others)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_every_method_on_2_3_and_4_ranks(case: str, tmp_path: Path) -> None:
    check(case, [2, 3, 4], ["none", "full"], tmp_path)


def _every_loss(folder: str, output: str, cases: list[tuple[str, str]], options: dict[str, Any]) -> int:
    """A short run of every loss, one after the other in the same processes."""
    for loss, data in cases:
        train("dpo", f"{folder}/{data}.jsonl", {**options, "loss": loss}, f"{folder}/base", f"{output}/{loss}")
    return len(cases)


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "dtype"), [("none", "float64"), ("full", "float64"), ("full", "float32")])
def test_every_loss_on_3_ranks(shard: str, dtype: str, tmp_path: Path) -> None:
    for data in FILES:
        prepared(tmp_path, data)
    cases = []
    for name, loss in LOSSES.items():
        by_kind = {"labels": "labels", "ranking": "ranked", "pairs": "ranked" if loss.needs_scores else "pairs"}
        cases.append((name, by_kind[loss.kind]))
    # A rate at which losses of large slopes do not amplify what rounding leaves.
    options = {"max_steps": 3, "learning_rate": 1e-4, "dtype": dtype}
    on_ranks(1, _every_loss, str(tmp_path), str(tmp_path / "one"), cases, options)
    on_ranks(3, _every_loss, str(tmp_path), str(tmp_path / "three"), cases, {**options, "shard": shard})
    for name, _ in cases:
        folders = (tmp_path / "one" / name, tmp_path / "three" / name)
        same(*folders) if dtype == "float64" else same_losses(*folders, 1e-6)
