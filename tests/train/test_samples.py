"""Samples before and after training: what a run draws, against ``prefopt.sample`` of the model and of its result."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefopt
from prefopt.errors import RunError
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.reports.page import page
from prefopt.runs.history import read_history
from prefopt.runs.samples import AFTER, BEFORE, SAMPLES, read_samples
from prefopt.train.samples import HeldOutSamples
from train.small import dpo, pairs, same_bits, write_model
from train.test_resume import stopped_at

ROWS = pairs(24)
OPTIONS: dict[str, Any] = {"eval_fraction": 0.4, "samples": 3, "learning_rate": 1e-2}


TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.train.samples.MAX_NEW_TOKENS", TOKENS)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def whole(model: str, _short: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that shows three prompts."""
    output = tmp_path_factory.mktemp("run") / "out"
    dpo(model, ROWS, output, **OPTIONS)
    return output


def test_both_are_what_prefopt_sample_draws(model: str, whole: Path) -> None:
    rows = read_samples(whole)
    assert len(rows) == 3 and all(row["models"] == [BEFORE, AFTER] for row in rows)
    held_out = {row["prompt"] for row in rows}
    assert held_out == {ROWS[row["source_row"] - 1]["prompt"] for row in rows} and len(held_out) == 3
    prompts = [{"prompt": row["prompt"]} for row in rows]
    given: dict[str, Any] = {"max_new_tokens": TOKENS, "device": "cpu", "dtype": "float32", "progress": "none"}
    for k, name in enumerate((model, whole)):
        found = prefopt.sample(name, prompts, **given).rows
        assert [row["responses"][0] for row in found] == [row["responses"][k] for row in rows]
        assert [row["finish"][0] for row in found] == [row["finish"][k] for row in rows]
    assert any(before != after for before, after in (row["responses"] for row in rows))


def test_the_time_of_a_run_counts_its_samples(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples that take 40 minutes each time, before and after training."""
    ahead, draw, clock = 0.0, HeldOutSamples._draw, time.monotonic

    def slow(self: HeldOutSamples) -> Any:
        nonlocal ahead
        ahead += 2400
        return draw(self)

    monkeypatch.setattr(HeldOutSamples, "_draw", slow)
    monkeypatch.setattr("prefopt.core.phases.time.monotonic", lambda: clock() + ahead)
    dpo(model, ROWS, tmp_path / "out", **OPTIONS, max_steps=1, progress="plain")
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"done in 1 h 2\d min \(samples 1 h 2\d min\b.*\): {tmp_path / 'out'}", line), line


def test_a_model_that_does_not_change_writes_the_same(model: str, tmp_path: Path) -> None:
    dpo(model, ROWS, tmp_path / "out", **{**OPTIONS, "learning_rate": 1e-30})
    assert [len(set(row["responses"])) for row in read_samples(tmp_path / "out")] == [1, 1, 1]


def test_they_change_no_bit_of_a_run_and_are_the_same_after_a_stop(model: str, whole: Path, tmp_path: Path) -> None:
    dpo(model, ROWS, tmp_path / "none", **{**OPTIONS, "samples": 0})
    assert same_bits(tmp_path / "none", whole) and not (tmp_path / "none" / SAMPLES).exists()
    stopped_at(2, model, ROWS, tmp_path / "parts", **OPTIONS)
    (before,) = {tuple(row["models"]) for row in read_samples(tmp_path / "parts")}
    assert before == (BEFORE,)
    dpo(model, ROWS, tmp_path / "parts", resume=True, **OPTIONS)
    assert (tmp_path / "parts" / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()
    stopped_at(2, model, ROWS, tmp_path / "lost", **OPTIONS)
    (tmp_path / "lost" / SAMPLES).write_text("{", "utf-8")
    dpo(model, ROWS, tmp_path / "lost", resume=True, **OPTIONS)
    assert (tmp_path / "lost" / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()


def test_the_screen_shows_one_and_the_report_all(
    model: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(model, ROWS, tmp_path / "out", **OPTIONS, progress="plain")
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("samples: of 3 held-out prompts"))
    assert str(tmp_path / "out" / SAMPLES) in lines[at]
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["prompt", "before", "after"]
    assert all(len(line) <= 110 for line in lines[at + 1 : at + 4])
    counted = json.loads((tmp_path / "out/run.json").read_text())["samples"]
    assert counted["prompts"] == 3 and counted["seconds"] > 0
    html = page([read_history(whole)])
    assert html.count('<p class="soft">before training</p>') == 3 and "Samples on 3 held-out prompts" in html


def test_a_run_without_samples_says_why_and_ends(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefopt.train.samples.MAX_NEW_TOKENS", 128)
    short = write_model(tmp_path / "short", max_position_embeddings=64)
    long = [{"prompt": f"{'klm' * 17}{i:02}: ", "chosen": "a", "rejected": "x"} for i in range(9)]
    dpo(short, long, tmp_path / "long", **OPTIONS, progress="plain")
    assert "samples: none: no held-out row has a prompt that leaves room for an answer" in capsys.readouterr().out

    def full(*_: Any, **__: Any) -> None:
        raise RunError("one sample does not fit")

    monkeypatch.setattr(TransformersSampler, "sample", full)
    dpo(model, ROWS, tmp_path / "full", **OPTIONS, progress="plain")
    assert "samples: none: one sample does not fit" in capsys.readouterr().out
    assert (tmp_path / "full/model.safetensors").exists() and not read_samples(tmp_path / "full")
