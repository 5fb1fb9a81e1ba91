"""kill -9 at any moment: what was done is kept, and the end is the same to the bit."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from dying import Death
from train.small import pairs, same_bits, start, steps, words, write_rows

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "lora": True,
    "lora_dropout": 0.1,
    "learning_rate": 1e-2,
    "batch_size": 3,
    "token_budget": 32,
    "eval_fraction": 0.2,
    "eval_every": 4,
    "save_every": 1,
    "progress": "plain",
}


def test_killed_at_ten_file_operations_a_run_ends_with_the_same_bits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs(150))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "whole-cache"))
    process = start(words(model, data, whole, **OPTIONS), tmp_path / "whole.log")
    process.join(240)
    assert process.exitcode == 0, (tmp_path / "whole.log").read_text()

    cache = tmp_path / "parts-cache"
    monkeypatch.setenv("PREFOPT_CACHE", str(cache))
    log = tmp_path / "parts.log"

    def blocks() -> int:
        return len(list(cache.glob("reference/*/block-*.safetensors")))

    def trained() -> int:
        told = parts / "metrics.jsonl"
        return told.read_text().count('{"step"') if told.exists() else 0

    chance = random.Random(0)
    caching = training = 0
    for n in range(10):
        before = (blocks(), trained())
        mark = "block-" if n < 5 else "checkpoints/step-"
        death = Death(mark, chance.randint(1, 4), chance.randint(1, 6))
        process = start(words(model, data, parts, **OPTIONS, resume=True), log, commit_seconds=0.0, death=death)
        process.join(240)
        assert process.exitcode == -9, log.read_text()
        assert n < 5 or trained() > before[1]
        caching += not trained() and blocks() > before[0]
        training += trained() > 0
    assert caching >= 4 and training >= 4, log.read_text()
    assert 0 < len(steps(parts)) < len(steps(whole))

    process = start(words(model, data, parts, **OPTIONS, resume=True), log)
    process.join(240)
    assert process.exitcode == 0, log.read_text()
    assert "resumed: " in log.read_text()
    assert same_bits(parts, whole)


def test_killed_before_anything_was_written_a_run_starts_again(model: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs(12))
    arguments = words(model, data, tmp_path / "out", resume=True)
    for seconds in (0.05, 0.3, 0.6):
        process = start(arguments, tmp_path / "log")
        time.sleep(seconds)
        process.kill()
        process.join()
    process = start(arguments, tmp_path / "log")
    process.join(120)
    done = "is finished" in (tmp_path / "log").read_text()
    assert process.exitcode == (2 if done else 0) and (tmp_path / "out/model.safetensors").exists()
