"""What a run says it reached is an average over rows, each metric with its own weights, whatever its last batch was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prefopt
from data.small import small_tokenizer
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.load import load_groups
from prefopt.runs.history import read_history
from prefopt.runs.table import reached
from train.flat import response_logprobs
from train.small import QUICK, dpo, evaluations, pairs, steps, write_model, write_rows
from train.test_resume import stop_after

ROWS = pairs(19)  # batches of 8, 8 and 3


def weighted(lines: list[dict[str, Any]], name: str, rows: tuple[int, ...]) -> float:
    return sum(n * line[name] for n, line in zip(rows, lines, strict=True)) / sum(rows)


def test_of_the_last_epoch_every_row_counts_once(model: str, tmp_path: Path) -> None:
    result = dpo(model, ROWS, tmp_path / "out", batch_size=8, epochs=2, learning_rate=3e-3)
    lines = steps(tmp_path / "out")
    assert len(lines) == 6
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/rejected"):
        assert result.metrics[name] == pytest.approx(weighted(lines[3:], name, (8, 8, 3))), name
    assert result.metrics["loss"] != lines[-1]["loss"]
    assert result.metrics["grad_norm"] == pytest.approx(sum(line["grad_norm"] for line in lines[3:]) / 3)
    assert (result.metrics["step"], result.metrics["epoch"]) == (6, 2.0)
    card = (tmp_path / "out/README.md").read_text()
    assert "| training metrics | averages over the 19 rows of steps 4 to 6 |" in card
    assert f"| training: loss | {result.metrics['loss']:.6g} |" in card and "last step" not in card
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["results"]["training: loss"] == result.metrics["loss"]


def test_what_came_after_the_last_whole_epoch_counts_too(model: str, tmp_path: Path) -> None:
    result = dpo(model, ROWS, tmp_path / "out", batch_size=8, max_steps=4, epochs=2)
    assert result.metrics["loss"] == pytest.approx(weighted(steps(tmp_path / "out"), "loss", (8, 8, 3, 8)))
    few = dpo(model, ROWS, tmp_path / "few", batch_size=8, max_steps=2)
    assert few.metrics["loss"] == pytest.approx(weighted(steps(tmp_path / "few"), "loss", (8, 8)))


def test_each_metric_has_its_own_weights(model: str, tmp_path: Path) -> None:
    """With no step to speak of, the averages are those of the untrained model over all rows at once."""
    still: dict[str, Any] = {**QUICK, "batch_size": 8, "learning_rate": 1e-12}
    rows = [{"prompt": f"k{i}: ", "completion": "a" * (1 + 3 * (i % 5)), "label": i < 6} for i in range(19)]
    other = write_model(tmp_path / "other", 3)
    cut, whole = (
        dpo(model, rows, tmp_path / f"kto{size}", loss="kto", reference=other, **{**still, "batch_size": size})
        for size in (8, 19)
    )
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "lengths/chosen", "lengths/rejected"):
        assert cut.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5), name

    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    fine = prefopt.sft(model, rows, output=tmp_path / "sft", average="tokens", **still)
    parsed = [parse_comparisons(rows, "data")]
    groups = load_groups(parsed, small_tokenizer(), max_length=64, kind="demonstrations").groups
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        nll = -sum(float(response_logprobs(plain, g).sum()) for g in groups)
    tokens = sum(int(c.trained.sum()) for g in groups for c in g.continuations)
    assert fine is not None and fine.metrics["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert fine.metrics["nll"] == pytest.approx(nll / tokens, rel=1e-5)
    assert fine.metrics["perplexity"] == pytest.approx(torch.tensor(fine.metrics["nll"]).exp().item())


def test_a_resumed_run_tells_what_a_whole_one_tells(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_size": 8, "epochs": 2, "save_every": 1}
    whole = dpo(model, ROWS, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(prefopt.errors.Interrupted):
            dpo(model, ROWS, tmp_path / "parts", **options)
    parts = dpo(model, ROWS, tmp_path / "parts", resume=True, **options)
    same = [name for name in whole.metrics if "second" not in name and not name.startswith(("utilisation", "peak"))]
    assert {n: parts.metrics[n] for n in same} == {n: whole.metrics[n] for n in same}


def test_held_out_rows_weigh_alike_however_they_are_cut(model: str, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", pairs(7, seed=2))
    for budget in (40, 10_000):
        dpo(model, ROWS, tmp_path / str(budget), eval_data=[held], token_budget=budget, dtype="float64", max_steps=1)
    one, other = (evaluations(tmp_path / str(budget))[-1] for budget in (40, 10_000))
    assert {n: pytest.approx(v, rel=1e-9) for n, v in one.items()} == other


def test_prefopt_runs_weighs_batches_by_their_rows(model: str, tmp_path: Path) -> None:
    """The last tenth of three steps is one, of three rows: as many more are taken as make a whole batch."""
    dpo(model, ROWS, tmp_path / "out", batch_size=8)
    lines = steps(tmp_path / "out")
    told = reached(read_history(tmp_path / "out"))["training"]
    assert told["loss"] == pytest.approx(weighted(lines[1:], "loss", (8, 3)))


def test_ppo_averages_over_episodes(model: str, tmp_path: Path) -> None:
    prompts = [{"prompt": f"k{i}: "} for i in range(5)]
    options: dict[str, Any] = {"num": 2, "max_new_tokens": 3, "max_kl": 1e6, **QUICK}
    options.pop("max_length")
    result = prefopt.ppo(model, prompts, output=tmp_path / "ppo", reward=lambda p, r: [len(x) for x in r], **options)
    assert result is not None and result.steps == 2  # of four prompts, and of one
    lines = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert result.metrics["objective/scores"] == pytest.approx(weighted(lines, "objective/scores", (8, 2)))
    assert (
        "| training metrics | averages over the 10 episodes of steps 1 to 2 |"
        in (tmp_path / "ppo/README.md").read_text()
    )
