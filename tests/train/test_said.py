"""What a run says: a dry run on one screen, one line for the first step, units, and the limit of a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest

import prefopt
from prefopt.runs.history import read_history
from train.small import dpo, pairs, write_model, write_rows

LABELLED = [{"prompt": f"k{i}: ", "completion": "aei" if i % 2 else "xyz", "label": bool(i % 2)} for i in range(6)]


def test_a_dry_run_fits_a_screen_whatever_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "\n".join("xyz" for _ in range(30))
    rows = [{"prompt": f"{i}\n{long}", "chosen": f"{long}\na", "rejected": f"{long}\no"} for i in range(4)]
    model = write_model(tmp_path / "m", max_position_embeddings=512)
    options = {"eval_fraction": 0.25, "progress": "plain", "dry_run": True, "lora": True, "device": "cpu"}
    assert prefopt.dpo(model, write_rows(tmp_path / "r.jsonl", rows), output=tmp_path / "o", **options) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25, "\n".join(lines)
    assert sum("xyz↵xyz↵" in line for line in lines) == 3, "prompt, chosen and rejected, a line each"
    said = "\n".join(lines)
    for fact in (
        "4 rows read, 4 kept",
        "2 pairs to train on, 2 held out",
        "memory: ",
        "chosen (",
        "rejected (",
        " about ",
    ):
        assert fact in said, fact
    options_set = next(line for line in lines if line.startswith("options set: "))
    assert "lora=true" in options_set and "lora_rank" not in options_set and "--print-config" in options_set


def test_an_example_of_many_responses_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"k{i}: ", "responses": list("abcdefgh"), "scores": list(range(8))} for i in range(4)]
    options = {"progress": "plain", "dry_run": True, "device": "cpu", "loss": "plackett_luce"}
    assert prefopt.dpo(write_model(tmp_path / "m"), rows, output=tmp_path / "o", **options) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25 and "[... 9 more lines ...]" in lines


def test_the_first_step_has_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "m")
    for loss, data, said in (
        ("dpo", pairs(6), "step 1: loss 0.693147, ln 2 = 0.693147, as it must be before any weight moves"),
        ("kto", LABELLED, "step 1: loss 0.500000, as it must be before any weight moves"),
        ("simpo", pairs(6), "train: 1/2 steps, "),  # which has nothing to be checked against
    ):
        prefopt.dpo(
            model, data, output=tmp_path / loss, loss=loss, max_steps=2, batch_size=2, progress="plain", device="cpu"
        )
        out = capsys.readouterr().out
        first = [line for line in out.splitlines() if line.startswith(("step 1:", "train: 1/2"))]
        assert len(first) == 1 and first[0].startswith(said)


def test_speed_is_of_rows_where_there_are_no_pairs(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    dpo(model, write_rows(tmp_path / "l.jsonl", LABELLED), tmp_path / "kto", loss="kto", max_steps=1)
    dpo(model, write_rows(tmp_path / "p.jsonl", pairs(6)), tmp_path / "dpo", max_steps=1)
    kto, pair = (read_history(tmp_path / name).training[0] for name in ("kto", "dpo"))
    assert "rows_per_second" in kto and "pairs_per_second" not in kto
    assert "pairs_per_second" in pair and "rows_per_second" not in pair


@pytest.mark.parametrize(
    ("given", "context", "said"),
    [
        (None, 4096, "max length: 1,024 tokens (the default; the model's context is 4,096); the longest row has "),
        (None, 96, "max length: 96 tokens (the default; the model's context is 96); the longest row has "),
        (80, 96, "max length: 80 tokens (by --max-length; the model's context is 96); the longest row has "),
    ],
)
def test_the_limit_of_a_sequence_is_told(
    given: int | None, context: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m", max_position_embeddings=context)
    options = {"max_length": given} if given else {}
    prefopt.dpo(model, pairs(4), output=tmp_path / "o", dry_run=True, progress="plain", device="cpu", **options)
    assert said in capsys.readouterr().out
