"""The flat example gives the trainer's numbers, step by step."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from prefopt.cli import main
from small_chat import build_model

FLAT = Path(__file__).resolve().parents[1] / "examples" / "flat_dpo.py"
Rows = list[dict[str, Any]]


def conversations() -> Rows:
    lines = Path(__file__).with_name("pairs.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:14]]


def texts() -> Rows:
    """Prompt and response as they stand, a space at either side of the boundary."""
    rows = []
    for i, row in enumerate(conversations()):
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        space = [("", " "), (" ", ""), ("", "")][i % 3]
        rows.append({"prompt": prompt + space[0], "chosen": space[1] + chosen, "rejected": space[1] + rejected})
    return rows


def llama(folder: Path) -> None:
    build_model(folder, [turn["content"] for row in conversations() for turns in row.values() for turn in turns])


def gpt2(folder: Path) -> None:
    """Learned positions, dropout that must be switched off, and a tokenizer that puts BOS before plain text."""
    llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=128, vocab_size=len(tokenizer), resid_pdrop=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("build", "rows", "words"),
    [
        (llama, conversations, ["--beta", "0.3", "--max-grad-norm", "0.5", "--max-length", "256"]),
        (gpt2, texts, ["--label-smoothing", "0.2", "--max-length", "128", "--seed", "3"]),
    ],
    ids=["conversations", "text"],
)
def test_flat_dpo_gives_the_losses_of_the_trainer(
    build: Callable[[Path], None], rows: Callable[[], Rows], words: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    build(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), "utf-8")
    words = ["--model", str(model), "--data", str(data), "--dtype", "float64", *words]
    # Three epochs of 14 pairs in batches of 4: the last batch of each is smaller.
    words += ["--epochs", "3", "--batch-size", "4", "--learning-rate", "1e-3", "--warmup", "0.2"]
    assert main(["dpo", *words, "--output", str(tmp_path / "trainer"), "--device", "cpu", "--token-budget", "200"]) == 0
    monkeypatch.setattr(sys, "argv", [str(FLAT), *words, "--output", str(tmp_path / "flat")])
    runpy.run_path(str(FLAT), run_name="__main__")

    trainer, flat = (metrics(tmp_path / name) for name in ("trainer", "flat"))
    assert len(trainer) == len(flat) == 12
    assert trainer[0]["loss"] - trainer[-1]["loss"] > 0.02  # it has learnt: the steps are not all alike
    for theirs, ours in zip(trainer, flat, strict=True):
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=1e-6), (ours["step"], name)

    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("trainer", "flat")]
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).state_dict()
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=1e-5)
        assert (weight - start[name]).abs().max() > 1e-4, name


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_closed_form_is_told_and_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """The script asserts each of its identities; the page tells the numbers that it prints."""
    runpy.run_path(str(FLAT.with_name("closed_form.py")), run_name="__main__")
    printed = capsys.readouterr().out
    page = (FLAT.parents[1] / "docs" / "derivation.md").read_text("utf-8")
    for number in ("0.7967", "0.0298", "0.1466", "0.0270", "0.6555", "1.3109"):
        assert number in page
    for number in ("0.796740", "0.029751", "0.146552", "0.026957", "0.655468", "1.310936"):
        assert number in printed


def test_the_figures_of_the_derivation_are_drawn_by_its_code(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runpy.run_path(str(FLAT.parents[1] / "docs" / "plot_derivation.py"))["draw"](tmp_path)
    for path in (FLAT.parents[1] / "docs" / "figures").glob("derivation-*.svg"):
        assert len((tmp_path / path.name).read_bytes()) == pytest.approx(path.stat().st_size, rel=0.01)
