"""Held-out pairs: kept apart, measured right, and what they decide."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.small import small_tokenizer
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.load import load_groups
from prefopt.train.trainer import Trainer
from train.flat import response_logprobs
from train.small import Row, doubtful_pairs, dpo, evaluations, pairs, steps, write_rows


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that ran."""
    found: list[Any] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: found.append(self) or fit(self))
    return found


def loss_of(model: str | Path, reference: str, rows: list[Row], beta: float = 0.1) -> float:
    """The DPO loss on rows by transformers alone."""
    groups = load_groups([parse_comparisons(rows, "data")], small_tokenizer(), max_length=64).groups
    policy, start = (AutoModelForCausalLM.from_pretrained(m) for m in (model, reference))
    with torch.no_grad():
        ratios = torch.stack([response_logprobs(policy, g) - response_logprobs(start, g) for g in groups])
    return float(-torch.nn.functional.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean())


def test_no_prompt_is_on_both_sides(model: str, tmp_path: Path, trainers: list[Any]) -> None:
    rows = [row | {"prompt": f"question {i % 8}: "} for i, row in enumerate(pairs(40))]
    for seed in (0, 1):
        dpo(model, rows, tmp_path / f"out{seed}", eval_fraction=0.4, seed=seed, max_steps=1)
    sides = []
    for data in (trainer.source.data for trainer in trainers):
        train, held_out = ({rows[i]["prompt"] for i in side} for side in (data.train, data.held_out))
        assert train and held_out and not train & held_out and len(data.train) + len(data.held_out) == 40
        sides.append(held_out)
    assert sides[0] != sides[1]


def test_the_evaluation_is_of_the_weights_that_are_saved(model: str, tmp_path: Path) -> None:
    rows, held_out = pairs(16), pairs(6, seed=4)
    write_rows(tmp_path / "eval.jsonl", held_out)
    result = dpo(
        model, rows, tmp_path / "out", eval_data=[tmp_path / "eval.jsonl"], eval_every=3, epochs=2, token_budget=60
    )
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [3, 6, 8]
    assert result.best_step == 8 == result.steps
    assert result.held_out_loss == pytest.approx(loss_of(tmp_path / "out", model, held_out), rel=1e-4)
    last = evaluations(tmp_path / "out")[-1]
    assert last["eval_loss"] == result.held_out_loss and 0 < last["eval_rewards/accuracies"] <= 1
    assert {name.removeprefix("eval_") for name in last} <= set(steps(tmp_path / "out")[0])


def test_the_best_weights_are_saved_and_patience_ends(model: str, tmp_path: Path) -> None:
    rows, held_out = pairs(13), doubtful_pairs(10, seed=3)
    write_rows(tmp_path / "eval.jsonl", held_out)
    options: dict[str, Any] = {
        "eval_data": [tmp_path / "eval.jsonl"],
        "eval_every": 1,
        "learning_rate": 3e-3,
        "epochs": 3,
        "schedule": "constant",
    }
    results = [dpo(model, rows, tmp_path / f"out{n}", **options, early_stopping=n) for n in (1, 3)]
    results.append(dpo(model, rows, tmp_path / "out", **options))
    losses = [line["eval_loss"] for line in evaluations(tmp_path / "out")]
    assert len(losses) == 12 and min(losses) < losses[-1] - 0.1
    best = 1 + losses.index(min(losses))
    assert [(r.best_step, r.steps) for r in results] == [(best, best + 1), (best, best + 3), (best, 12)]
    for n, result in enumerate(results):
        assert result.held_out_loss == min(losses)
        assert loss_of(result.output, model, held_out) == pytest.approx(min(losses), rel=1e-4), n
        card = (result.output / "README.md").read_text()
        assert f"| best step | {best} |" in card and f"| held-out loss | {min(losses):.6g} |" in card


def test_evaluation_changes_nothing_in_training(model: str, tmp_path: Path) -> None:
    """Dropout and order draw from the same places whether or not anything is evaluated in between."""
    rows = pairs(12)
    write_rows(tmp_path / "eval.jsonl", pairs(6, seed=4))
    options: dict[str, Any] = {"lora": True, "lora_dropout": 0.2, "epochs": 2, "save_every": 6}
    dpo(model, rows, tmp_path / "plain", **options)
    dpo(model, rows, tmp_path / "watched", **options, eval_data=[tmp_path / "eval.jsonl"], eval_every=1)
    assert steps(tmp_path / "plain") == steps(tmp_path / "watched")
    files = [load_file(tmp_path / n / "checkpoints/step-00000006/weights.safetensors") for n in ("plain", "watched")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("options", [{"learning_rate": 2e-3}, {"lora": True, "learning_rate": 1e-2}])
def test_a_planted_preference_is_learnt(options: dict[str, Any], model: str, tmp_path: Path) -> None:
    """People like responses with a q and not those with a z, whatever else they say."""
    chance = random.Random(0)
    rows = []
    for i in range(120):
        text = ["".join(chance.choice("abcdefgh") for _ in range(chance.randint(3, 9))) for _ in range(5)]
        rows.append({"prompt": f"{i}{text[0]}: ", "chosen": f"{text[1]}q{text[2]}", "rejected": f"{text[3]}z{text[4]}"})
    result = dpo(model, rows, tmp_path / "out", eval_fraction=0.2, epochs=2, batch_size=8, **options)
    assert result.held_out_loss is not None and result.held_out_loss < 0.6 * math.log(2)
    assert evaluations(tmp_path / "out")[-1]["eval_rewards/accuracies"] > 0.9
