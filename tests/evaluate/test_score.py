"""Scores are put to the right responses, and what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.cli import main

ROWS = [
    {"prompt": "p", "chosen": "a b c", "rejected": "a", "note": 1},
    {"prompt": "q", "chosen": "a", "rejected": "a b"},
    {"prompt": "r", "chosen": "b a", "rejected": "a b"},
]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_scores_stand_beside_their_responses_and_agreement_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "scored.jsonl"
    assert main(["score", write(tmp_path / "pairs.jsonl", ROWS), "--reward", "length", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["responses"], row["scores"]) for row in rows] == [
        (["a b c", "a"], [3.0, 1.0]),
        (["a", "a b"], [1.0, 2.0]),
        (["b a", "a b"], [2.0, 2.0]),
    ]
    assert rows[0]["note"] == 1
    assert "6 responses of 3 rows: mean 1.833" in said and "50.0% of the pairs" in said

    # What was written can be scored again, and trained on: its preference is that of the scores now.
    again = tmp_path / "again.jsonl"
    assert main(["score", str(out), "--reward", "length", "--output", str(again)]) == 0
    assert "order 100.0% of the pairs" in capsys.readouterr().out
    assert again.read_text() == out.read_text()
    assert main(["score", str(out), "--reward", "length", "--output", str(again)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["score", str(out), "--reward", "length", "--output", str(again), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("rows", "reward", "said"),
    [
        (ROWS, "lenght", "did you mean length"),
        ([{"prompt": "only a prompt"}], "length", "row 1: has no response to score"),
        ([*ROWS, {"prompt": "q"}], "length", "row 4"),
        (ROWS, "tests_have_no_such_module:f", "is the module installed"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    rows: list[dict[str, object]], reward: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scored.jsonl"
    assert main(["score", write(tmp_path / "d.jsonl", rows), "--reward", reward, "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]
