"""Files of options that were made to end in a traceback, and the line that they end in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.core.yaml_file import DEPTH, read_document
from prefopt.errors import ConfigError

BAD = {
    "deep lists": ("a: " + "[" * 3000 + "]" * 3000, "nested more than"),
    "deep objects": ("a: " + "{a: " * 3000 + "}" * 3000, "nested more than"),
    "deep blocks": ("".join(" " * n + f"a{n}:\n" for n in range(1000)), "nested more than"),
    "half of a character": ('output: "\\ud800"', "line 1: not YAML (half of a character)"),
    "half of a character in a name": ('"\\ud800": 1', "half of a character"),
    "half of a character in a list": ('data: [a, "\\udfff"]', "half of a character"),
    "bytes of half a character": ("a: \ud800", "is not text in UTF-8"),
    "aliases": ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", "line 2: not YAML (an alias; write the value out)"),
    "an alias of itself": ("a: &a [*a]", "an alias"),
    "no date": ("beta: 2020-13-45", "not YAML (month must be in 1..12)"),
    "no number": ("beta: !!float x", "not YAML"),
    "a number of 5000 digits": ("beta: " + "9" * 5000, "not YAML"),
    "a file without end": ("#" * (2 << 20), "larger than 1 MiB"),
    "no base64": ("beta: !!binary abc", "not YAML"),
    "a control character": ("beta: \x07", "not YAML"),
    "a class": ("beta: !!python/object:os.system x", "not YAML"),
}


def test_every_bad_document_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    for mistake, (text, fact) in BAD.items():
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        start = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            read_document(str(file))
        message = str(caught.value)
        assert fact in message and str(file) in message and time.monotonic() - start < 5, (mistake, message)
        assert main(["dpo", "--config", str(file)]) == 2
        assert capsys.readouterr().err.count("\n") == 1, mistake


@pytest.mark.parametrize("option", ["seed", "beta", "data"])
def test_a_number_of_20000_bits_is_one_line(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, number = tmp_path / "options.yaml", "0x" + "f" * 5000
    needed = {"model": "m", "data": "d", "output": "o"} | {option: number}
    file.write_text("".join(f"{name}: {value}\n" for name, value in needed.items()))
    assert main(["dpo", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"{option} is a number of over 4300 digits; it must be" in said and said.count("\n") == 1
    if option == "seed":
        assert main(["dpo", "--model", "m", "--data", "d", "--output", "o", "--seed", number]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_too_deep_is_read(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    deep = DEPTH - 2
    file.write_text("data: " + "[" * deep + "x" + "]" * deep)
    value = read_document(str(file))["data"]
    for _ in range(deep):
        (value,) = value  # type: ignore[misc]
    assert value == "x"


def test_a_mistake_in_an_option_of_a_stage_is_placed_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text('model: m\ndata: [d.jsonl]\noutput: o\nppo: ["beta=0.05"]\n')
    assert main(["rlhf", "--config", str(file), "--ppo", "batch_size=0"]) == 2
    assert "--ppo: batch_size is 0" in capsys.readouterr().err


def test_a_wrong_value_of_a_file_is_refused_also_where_it_is_overridden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("model: m\ndata: [d.jsonl]\noutput: o\nbeta: -1\n")
    assert main(["dpo", "--config", str(file), "--beta", "0.2"]) == 2
    assert "w.yaml: beta is -1" in capsys.readouterr().err
