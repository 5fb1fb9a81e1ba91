"""Rollout servers and a teacher behind a URL with several processes: one hands the weights over, all ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from generate.fake_rollout_server import serving
from parallel.ranks import on_ranks
from parallel.test_runs import PPO, prepared, same, train
from train.small import write_model

pytestmark = pytest.mark.slow


def test_ppo_in_shards(tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    for ranks, name in ((1, "one"), (2, "many")):
        with serving(base) as fake:
            options: dict[str, Any] = {**PPO, "rollout_server": [fake.url], "dtype": "float64", "max_steps": 2}
            options |= {"shard": "full"} if ranks > 1 else {}
            on_ranks(ranks, train, "ppo", data, options, base, str(tmp_path / name))
            assert len(fake.loads) == 2, "the first process alone hands weights over"
    same(tmp_path / "one", tmp_path / "many", 1e-8)


def test_distillation_on_two_processes(tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    other = write_model(tmp_path / "teacher", seed=1)
    for ranks, name in ((1, "one"), (2, "many")):
        with serving(base) as fake, serving(other, tokenizer=small_tokenizer()) as teacher:
            options = {"teacher": teacher.url, "on_policy": 0.6, "max_new_tokens": 6, "rollout_server": [fake.url]}
            on_ranks(ranks, train, "distil", data, options | {"dtype": "float64"}, base, str(tmp_path / name))
            assert fake.loads
    same(tmp_path / "one", tmp_path / "many", 1e-8)
