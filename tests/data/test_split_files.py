"""A split by prompt is the one that a run makes of the same rows, and changes none of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from data.tokenising import chat_rows, write
from prefopt.cli import main
from prefopt.data.comparisons import read_comparisons
from prefopt.data.load import load_groups


def split(
    *sources: Path, fraction: str = "0.3", seed: str = "0", ending: str = "jsonl", more: tuple[str, ...] = ()
) -> Any:
    folder = sources[0].parent
    train, held = folder / f"train.{ending}", folder / f"held.{ending}"
    words = ["data", "split", *map(str, sources), "--fraction", fraction, "--seed", seed, "--overwrite"]
    assert main([*words, "--output-train", str(train), "--output-eval", str(held), *more]) == 0
    return train, held


@pytest.mark.parametrize("seed", ["0", "7"])
def test_the_sides_are_those_of_a_run(tmp_path: Path, seed: str) -> None:
    source = write(tmp_path / "rows.jsonl", chat_rows(60))
    train, held = split(source, seed=seed)
    loaded = load_groups([source], small_tokenizer())
    sides = loaded.split(0.3, int(seed))
    lines = source.read_bytes().splitlines(keepends=True)
    for path, side in zip((train, held), sides, strict=True):
        assert path.read_bytes() == b"".join(lines[i] for i in side)
    assert len(held.read_bytes().splitlines()) % 2 == 0  # the rows come in twos of one prompt


def test_lines_stay_as_they_are_whatever_is_around_them(tmp_path: Path) -> None:
    lines = [json.dumps(row, indent=None, separators=(", ", " :  ")).encode() + b"  \r\n" for row in chat_rows(20)]
    text = b"\xef\xbb\xbf" + b"\n".join(lines) + b'{"prompt": "torn"\n' + lines[0].strip()
    source = tmp_path / "rows.jsonl.gz"
    source.write_bytes(gzip.compress(text))
    train, held = split(source, more=("--on-bad-row", "skip"))
    written = train.read_bytes().splitlines(keepends=True) + held.read_bytes().splitlines(keepends=True)
    assert sorted(written) == sorted([*lines, lines[0].strip() + b"\n"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_files_and_mixtures_become_canonical(tmp_path: Path, ending: str) -> None:
    one = tmp_path / "rows.json"
    one.write_text(json.dumps(chat_rows(20)))
    other = write(tmp_path / "other.jsonl", [{"prompt": f"p {i}", "completion": "x"} for i in range(10)])
    train, held = split(one, other, ending=ending)
    readings = [read_comparisons(path) for path in (train, held)]
    assert [r.layout for r in readings] == ["canonical", "canonical"]
    got = [(c.prompt, c.responses, c.tiers) for r in readings for c in r.comparisons]
    wanted = [(c.prompt, c.responses, c.tiers) for path in (one, other) for c in read_comparisons(path).comparisons]
    assert sorted(map(repr, got)) == sorted(map(repr, wanted))


def test_bad_rows_and_single_prompts_are_refused(tmp_path: Path, capsys: Any) -> None:
    strange = {**chat_rows(1)[0], "prompt": [{"role": "narrator", "content": "x"}]}
    bad = write(tmp_path / "bad.jsonl", [*chat_rows(4), strange, "{"])
    same = write(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": f"b{i}"} for i in range(3)])
    outputs = ["--output-train", str(tmp_path / "a.jsonl"), "--output-eval", str(tmp_path / "b.jsonl")]
    for source, words in ((bad, "2 of 6 rows cannot be used"), (same, "same prompt")):
        assert main(["data", "split", str(source), "--fraction", "0.5", *outputs]) == 2
        complaint = capsys.readouterr().err
        assert words in complaint and complaint.count("\n") == 1
    assert main(["data", "split", str(bad), "--fraction", "0.5", outputs[0], "x.jsonl", outputs[2], "x.jsonl"]) == 2
    assert "name one file" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "same.jsonl"]
