"""The demonstration learns, tells the truth about it, and can be repeated."""

from __future__ import annotations

import json
import math
import shlex
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.cli import main, parse
from prefopt.config.dpo import DpoConfig
from prefopt.demo.run import program, run_demo
from prefopt.train.terms import terms_of


def test_the_demonstration_learns_what_its_pairs_prefer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_demo("runs/demo")
    first = capsys.readouterr().out
    assert result.loss < math.log(2) / 2 and result.accuracy > 0.9 and result.margin > 1
    assert f"{result.loss:.4f}, down from ln 2 = 0.6931" in first
    assert all(
        Path(line.split("  ")[0]).exists() for line in first.splitlines() if line.startswith("runs/demo/aligned")
    )

    folder = Path("runs/demo/aligned")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "<|user|>How do I make tea?<|end|><|assistant|>"
    turns = [{"role": "user", "content": "How do I make tea?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt")).logits).all()
    commands_hold(first, result.output)

    # Again: what was there is replaced, the model is the same to the byte, and so its reference is in the cache.
    again = run_demo("runs/demo")
    out = capsys.readouterr().out
    assert "reference: all 96 responses from the cache" in out and "0 from the cache" in first
    assert again == result


def commands_hold(out: str, aligned: Path) -> None:
    """Every command printed is one: the first gives the run that was made, the others what they say."""
    found = [line.strip().removeprefix(program()).split(maxsplit=1) for line in out.splitlines() if program() in line]
    given = [DpoConfig.from_dict(parse("dpo", shlex.split(words))) for verb, words in found if verb == "dpo"]
    assert len(given) == len(found) == 4
    made = json.loads((aligned / "run.json").read_text())["options"]
    assert terms_of(given[0])[0].to_dict() == made
    assert given[1].dry_run and given[2].beta == 0.3
    assert {(c.model, *c.data) for c in given[:3]} == {(made["model"], *made["data"])}
    assert all(not Path(c.output).exists() for c in given[1:])


def test_every_pair_is_what_the_demonstration_says() -> None:
    lines = resources.files("prefopt.demo").joinpath("pairs.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    questions = [row["prompt"][0]["content"] for row in rows]
    assert len(set(questions)) == len(rows) >= 24 and all(q.endswith("?") for q in questions)
    lengths = [[len(row[side][0]["content"]) for row in rows] for side in ("chosen", "rejected")]
    # Length alone must not tell the sides apart, or the demonstration would show nothing else.
    longer = sum(a > b for a, b in zip(*lengths, strict=True))
    assert len(rows) / 4 < longer < 3 * len(rows) / 4


@pytest.mark.parametrize("kind", ["folder of something else", "file"])
def test_a_folder_of_something_else_is_left_alone(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    if kind == "file":
        output.write_text("precious")
    else:
        (output / "model").mkdir(parents=True)
        (output / "model" / "weights").write_text("precious")
    assert main(["demo", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(output) in error and "name a" in error
    left = output if kind == "file" else output / "model" / "weights"
    assert left.read_text() == "precious"
