"""Distillation on several processes gives what one gives: the same samples, losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel.ranks import on_ranks
from parallel.test_runs import LORA, prepared, same, train
from train.small import write_model

# Ten rows in batches of four: in the last batch of an epoch a rank of three draws nothing.
ON_POLICY = {"on_policy": 0.8, "max_new_tokens": 6, "divergence": "jsd"}


def check(world: int, shard: str, folder: Path, **more: Any) -> None:
    model, file = prepared(folder, "pairs")
    options = {"teacher": write_model(folder / "teacher", seed=1, num_hidden_layers=3), **ON_POLICY, **more}
    on_ranks(1, train, "distil", file, options, model, str(folder / "one"))
    on_ranks(world, train, "distil", file, {**options, "shard": shard}, model, str(folder / "many"))
    same(folder / "one", folder / "many", 1e-9 if options.get("dtype") == "float64" else 1e-6)


def test_two_replicas(tmp_path: Path) -> None:
    check(2, "none", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_shards(world: int, more: dict[str, Any], tmp_path: Path) -> None:
    check(world, "full", tmp_path, dtype="float64", **more)
