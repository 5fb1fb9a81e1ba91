"""What is said of columns on the command line, in YAML, in dataset_info.json and in Python; and hints that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from prefopt.cli import main
from prefopt.config.dpo import DpoConfig
from prefopt.core.yaml_file import read_document
from prefopt.data.comparisons import open_comparisons, read_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.load import load_groups
from prefopt.errors import DataError

TWO = [{"instruction": f"q{k}", "output_1": "a", "output_2": "b", "label": k % 2} for k in range(6)]
NAMES = ["first=output_1", "second=output_2"]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def chosen(file: Path, columns: list[str] | None) -> list[str]:
    (source,) = find_sources([file])
    return [c.responses[c.tiers[0][0]].text for c in open_comparisons(source, columns=columns).comparisons]


def test_labels_mean_the_same_on_the_command_line_in_yaml_and_in_python(tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "rows.jsonl", TWO)
    document = tmp_path / "run.yaml"
    means = "label-means: [0=first, 1=second]"
    document.write_text(f"data: [{file}]\nmodel: m\noutput: o\ncolumns: [{', '.join(NAMES)}]\n{means}\n", "utf-8")
    config = DpoConfig.from_dict(read_document(str(document)), "run.yaml")
    assert chosen(file, config.column_words) == ["a", "b"] * 3
    python = DpoConfig(data=[str(file)], model="m", output="o", columns=NAMES, label_means=["0=second,1=first"])
    assert chosen(file, python.column_words) == ["b", "a"] * 3
    words = ["--columns", *NAMES, "--label-means", "0=first,1=second"]
    assert main(["data", "check", str(file), "--want", "pairs", *words]) == 0
    out = tmp_path / "canonical.jsonl"
    assert main(["data", "convert", str(file), str(out), *words]) == 0
    assert chosen(out, None) == ["a", "b"] * 3
    assert main(["data", "check", str(file), "--columns", *NAMES]) == 1
    assert "label of unknown meaning" in capsys.readouterr().out


def test_a_dataset_info_says_what_labels_mean(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", TWO)
    columns = {"prompt": "instruction", "first": "output_1", "second": "output_2", "label": "label"}
    entry = {"file_name": file.name, "columns": columns, "label_means": {"0": "first", "1": "second"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}), "utf-8")
    assert read_comparisons(file).layout == "two-responses-chat" and chosen(file, None) == ["a", "b"] * 3


def test_outputs_of_split_are_positional_or_options(tmp_path: Path) -> None:
    file, train, held = write(tmp_path / "rows.jsonl", TWO), tmp_path / "t.jsonl", tmp_path / "e.jsonl"
    words = ["--fraction", "0.5", "--columns", *NAMES, "--label-means", "0=first", "1=second"]
    assert main(["data", "split", str(file), str(train), str(held), *words]) == 0
    found = train.read_text() + held.read_text()
    assert sorted(found.splitlines()) == sorted(map(json.dumps, TWO)) and held.read_text()
    options = ["--output-train", str(train), "--output-eval", str(held), "--overwrite"]
    assert main(["data", "split", str(file), *options, *words]) == 0
    assert train.read_text() + held.read_text() == found
    assert main(["data", "split", str(file), str(train), *words]) == 2


@pytest.mark.parametrize(("name", "sign"), [("rows.tsv", "\t"), ("rows.csv", ",")])
def test_separated_values_without_a_header(tmp_path: Path, name: str, sign: str) -> None:
    file = tmp_path / name
    file.write_text("".join(sign.join(cells) + "\n" for cells in (("q", "q", "b"), ("r", "c", "d"))), "utf-8")
    (source,) = find_sources([file])
    reading = open_comparisons(source, columns=["prompt=1", "chosen=2", "rejected=3", "--header=none"])
    assert [[r.text for r in c.responses] for c in reading.comparisons] == [["q", "b"], ["c", "d"]]
    assert [c.prompt[0].content for c in reading.comparisons] == ["q", "r"]


def test_the_first_line_is_a_row_for_the_token_cache_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("q\ta\tb\nr\tc\td\n", "utf-8")
    columns = ["prompt=1", "chosen=2", "rejected=3", "--header=none"]
    for _ in range(2):
        assert load_groups([file], small_tokenizer(), columns=columns).kept == 2


def test_a_json_object_over_several_lines_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": 1, "data": [{"prompt": "q", "chosen": "a", "rejected": "b"}]}, indent=1))
    with pytest.raises(DataError, match=r"is one JSON object .*save its list of rows alone"):
        read_comparisons(file)


def test_responses_that_are_not_read_are_a_warning_and_an_error_of_a_preference(tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "third_response": "c"}])
    assert main(["data", "check", str(file)]) == 0
    assert "responses that are not read: third_response" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "check", str(file), "--want", "pairs"]) == 1
    with pytest.raises(
        DataError, match=r"third_response seems to hold responses and is not read.*--ignore-columns third_response"
    ):
        load_groups([file], small_tokenizer())
    assert load_groups([file], small_tokenizer(), columns=["--ignore-columns=third_response"]).kept == 1


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "q", "completion": "a", "label": 1}, "unpaired labels are for prefopt dpo --loss kto"),
        ({"prompt": "q", "completion": "a"}, "demonstrations are for prefopt sft"),
        ({"prompt": "q"}, "prefopt sample draws some"),
    ],
)
def test_rows_of_another_method_are_sent_there_and_none_is_skipped(tmp_path: Path, row: Any, hint: str) -> None:
    file = write(tmp_path / "rows.jsonl", [row] * 2)
    with pytest.raises(DataError, match=hint) as error:
        load_groups([file], small_tokenizer())
    assert "--on-bad-row skip" not in str(error.value)
