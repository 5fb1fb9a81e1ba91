"""What a run does not train is in the folder that it saves, and a person is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Qwen3_5ForConditionalGeneration

from data.small import small_tokenizer
from model.test_checkpoint import add, build
from prefopt.cli import main
from prefopt.model import merge
from train.small import pairs, write_rows

LEFT = "vision tower (33 tensors, 288.7 kB), layers for multi-token prediction (1 tensor, 8.2 kB)"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    tokenizer = small_tokenizer()
    model = build("qwen3_5")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    add(folder, {"mtp.fc.weight": torch.randn(32, 64)})
    return folder


def run(verb: str, model: Path, out: Path, tmp_path: Path, *more: str) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(4))
    options = ["--model", str(model), "--data", data, "--output", str(out), "--max-steps", "1", "--dtype", "float32"]
    assert main([verb, *options, "--max-length", "64", "--device", "cpu", *more]) == 0


def test_a_run_keeps_tower_and_further_layers(vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("dpo", vlm, tmp_path / "out", tmp_path, "--learning-rate", "1e-3")
    captured = capsys.readouterr()
    assert f"not trained, and saved as they are: {LEFT}" in captured.out
    assert "UNEXPECTED" not in captured.out + captured.err
    before, after = (load_file(f / "model.safetensors") for f in (vlm, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all("language_model" in n or n == "lm_head.weight" for n in moved)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    _, info = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_merging_keeps_them_too_and_checks_their_names(
    vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dpo", vlm, tmp_path / "lora", tmp_path, "--lora")
    assert LEFT not in capsys.readouterr().out
    line = ["merge", "--model", str(vlm), "--adapter", str(tmp_path / "lora"), "--device", "cpu", "--output"]
    assert main([*line, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    before, after = (load_file(f / "model.safetensors") for f in (vlm, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before if "visual" in n)
    assert f"kept as they are: {LEFT}" in said and f"its {len(before)} tensors have the same names" in said
    monkeypatch.setattr(merge, "save_weights", lambda folder, model, state, dtype: model.save_pretrained(folder))
    assert main([*line, str(tmp_path / "less")]) != 0
    assert "34 tensors are not as in" in capsys.readouterr().err


def test_a_reward_model_says_what_it_has_not_and_its_configuration_agrees(
    vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("reward", vlm, tmp_path / "out", tmp_path)
    assert f"not in a reward model: {LEFT}" in capsys.readouterr().out
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3_5_text"
    capsys.readouterr()
    options = ["--model", str(tmp_path / "out"), "--data", str(tmp_path / "pairs.jsonl"), "--device", "cpu"]
    assert main(["dpo", *options, "--output", str(tmp_path / "wrong")]) != 0
    assert "holds the head of a reward model (score.weight" in capsys.readouterr().err
