"""Rollout servers and a teacher behind a URL with several processes: one hands the weights over, all ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from generate.fake_rollout_server import serving
from parallel.ranks import on_ranks
from parallel.test_runs import EXACT, PPO, prepared, same, train
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


def learn(options: dict[str, Any], model: str, data: str, output: str) -> int:
    """One run of online learning, in the process of this rank; its steps."""
    import prefopt

    return int(prefopt.online(model=model, prompts=[data], output=output, **{**EXACT, **options}).steps)


def test_online_in_shards(tmp_path: Path) -> None:
    """With two components of a reward, which all processes know of all responses."""
    base, data = prepared(tmp_path, "pairs")
    options: dict[str, Any] = {"reward": ["brief=length*-0.5", "vader*2"], "num": 3, "max_new_tokens": 6, "max_kl": 1e6}
    options |= {"batch_size": 4, "minibatches": 2, "dtype": "float64", "max_steps": 2, "learning_rate": 1e-3}
    for ranks, name in ((1, "one"), (2, "many")):
        with serving(base) as fake:
            more = {"rollout_server": [fake.url], **({"shard": "full"} if ranks > 1 else {})}
            on_ranks(ranks, learn, options | more, base, data, str(tmp_path / name))
            assert len(fake.loads) == 2, "the first process alone hands weights over"
    for file in ("rounds/round-0001.jsonl", "rounds/round-0002.jsonl"):
        rows = [[json.loads(x) for x in (tmp_path / n / file).read_text().splitlines()] for n in ("one", "many")]
        kept = [[(r["token_ids"], r["components"], r["judge_scores"]) for r in some] for some in rows]
        assert kept[0] == kept[1] and kept[0]
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
