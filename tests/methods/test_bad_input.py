"""Whatever is wrong with what a person gives: one line that says what, where and what to do, and exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data.small import small_tokenizer
from prefopt.cli import main
from train.small import dpo, pairs, start, tiny_llama, words, write_model, write_rows

ROWS: list[Any] = list(pairs(6))


def told(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command with a user error prints."""
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert err.count("\n") == 1, err
    assert err.startswith("prefopt: error: ") and "Traceback" not in out
    return err.removeprefix("prefopt: error: ").removesuffix("\n")


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content, "utf-8") and None


def rows(*content: Any) -> Callable[[Path], None]:
    return lambda path: write_rows(path, content) and None


# A file of data, what is said of it and where.
DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "data.jsonl: no such file"),
    "empty": (text(""), "data.jsonl: is empty"),
    "an empty list": (text("[]"), "data.jsonl: is an empty list"),
    "an empty folder": (lambda path: path.mkdir(), "data.jsonl: is an empty folder"),
    "not JSON": (
        text(f"{json.dumps(ROWS[0])}\n{{'prompt'}}\n"),
        "data.jsonl, row 2: 1 of 2 rows cannot be used: unreadable",
    ),
    "cut off": (text(json.dumps(ROWS)[:-20]), "data.jsonl, row 6: not JSON at line 1, column"),
    "unknown layout": (rows({"colour": "red", "size": 3}), "data.jsonl: unknown layout: no row has all fields"),
    "missing field": (rows(*ROWS[:3], {"prompt": "p", "chosen": "c"}), "row 4: 1 of 4 rows cannot be used: missing"),
    "the same responses": (rows(*ROWS, ROWS[0] | {"rejected": ROWS[0]["chosen"]}), "row 7: 1 of 7 rows cannot be used"),
    "one prompt to hold out": (rows(*(r | {"prompt": "p"} for r in ROWS)), "all rows have the same prompt"),
}


@pytest.mark.parametrize(("make", "said"), DATA.values(), ids=DATA.keys())
def test_bad_data(
    make: Callable[[Path], None], said: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    make(data)
    more = {"eval_fraction": 0.2} if "prompt" in said else {}
    assert said in told(capfd, words(model, str(data), tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def no_tensor(folder: Path) -> None:
    state = dict(tiny_llama().state_dict())
    del state["model.layers.0.self_attn.q_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def encoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "distilbert", "vocab_size": 100}))


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "model: no such folder"),
    "an empty folder": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "model holds no config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "model holds no config.json"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "model: "),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "weights as pickle": (pickled, "are pickles"),
    "half the weights": (cut_weights, "the weight file is damaged"),
    "a weight missing": (no_tensor, "1 weights are missing, the first is model.layers.0.self_attn.q_proj.weight"),
    "other shapes": (other_shape, "config.json wants"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "the folder has no tokenizer"),
    "a broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
    "no causal language model": (encoder, "model: "),
}


@pytest.mark.parametrize(("spoil", "said"), MODELS.values(), ids=MODELS.keys())
def test_a_bad_model_folder(
    spoil: Callable[[Path], Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    spoil(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    capfd.readouterr()
    assert said in told(capfd, words(model, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", vocab_size=100)
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    capfd.readouterr()
    line = told(capfd, words(model, data, tmp_path / "out"))
    assert "the tokenizer gives token" in line and "the model's vocabulary has 100" in line


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "longer than the context": ({"max_length": 129}, "--max-length 129 is over the model's context of 128 tokens"),
    "a misspelt option": ({"lerning_rate": 1}, "unknown option '--lerning-rate'; did you mean --learning-rate?"),
    "an unknown option": ({"wings": 2}, "unknown option '--wings'"),
    "evaluation data missing": ({"eval_data": "no.jsonl"}, "no.jsonl: no such file"),
    "the same file twice": ({"data": ["@", "@"]}, "twice"),
    "no such device": ({"device": "cuda:99"}, "--device cuda:99: this machine has no such device"),
    "no such reference": ({"reference": "./no"}, "no: no such"),
    "no such adapter": ({"adapter": "./no"}, "no: "),
    "a model as adapter": ({"adapter": "@model"}, "adapter_config.json"),
    "no such layers": ({"lora": True, "lora_targets": "q_prj"}, "--lora-targets q_prj"),
    "an impossible beta": ({"beta": -1}, "--beta is -1.0"),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(
    options: dict[str, Any], said: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    arguments = words(model, data, tmp_path / "out")
    for name, value in options.items():
        known = {"@": data, "@model": model}
        for item in value if isinstance(value, list) else [value]:
            arguments = [a for a in arguments if not a.startswith(f"--{name}=".replace("_", "-")) or name == "data"]
            arguments.append(f"--{name.replace('_', '-')}={str(known.get(item, item)).replace('True', 'true')}")
    assert said in told(capfd, arguments)


def test_a_folder_that_is_not_this_runs(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    file.write_text("more of it")
    for output, said in ((foreign, "is not empty and holds no run of prefopt"), (file, "is a file; name a folder")):
        for more in ({}, {"resume": True}):
            assert said in told(capfd, words(model, data, output, **more))
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"] and file.read_text() == "more of it"

    dpo(model, data, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert "holds a finished run; name another folder" in told(capfd, words(model, data, tmp_path / "out"))
    assert "the run in" in told(capfd, words(model, data, tmp_path / "out", resume=True, beta=0.5))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize("lora", [False, True])
def test_a_loss_that_is_no_number_stops_the_run(
    lora: bool, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs(16))
    line = told(capfd, words(model, data, tmp_path / "out", learning_rate=1e30, schedule="constant", lora=lora))
    assert "step 2: " in line and "lower --learning-rate" in line
    assert not list((tmp_path / "out").glob("*.safetensors"))
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["loss"] > 0


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        (1_000, "/tokens/"),
        (1_001, "run.json: cannot be written"),
        (12_500, "/reference/"),
        (60_000, "checkpoints/step-00000002"),
        pytest.param(
            200_000, "checkpoints/step-00000002", marks=pytest.mark.slow
        ),  # the optimiser is larger than the weights
        (None, "checkpoints/step-00000004"),  # the one that stands in for a model that cannot be saved
    ],
)
def test_a_full_disk(largest: int | None, said: str, model: str, tmp_path: Path) -> None:
    many, steps = (300, 75) if said == "/reference/" else (40, 4)  # few steps have few values of the reference to keep
    data = write_rows(tmp_path / "data.jsonl", pairs(many))
    arguments = words(model, data, tmp_path / "out", max_steps=steps, save_every=2 if largest else None)
    if not largest:
        arguments = [a for a in arguments if not a.startswith("--save-every")]
    if said != "/tokens/":
        assert main([*arguments, "--dry-run"]) == 0  # the tokens are there already
    process = start(arguments, tmp_path / "log", largest_file=largest or 60_000)
    process.join(120)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 2, log
    assert "Traceback" not in log
    (line,) = (part for part in log.splitlines() if part.startswith("prefopt: "))
    assert said in line and ("too large" in line or "space" in line), line

    # What was there is whole: with room again, the run goes on.
    process = start([*arguments, "--resume"], tmp_path / "log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_tokenizer_without_an_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    tokenizer = small_tokenizer(bos_token="<s>")
    tokenizer.save_pretrained(model)
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    capfd.readouterr()
    assert "no EOS token" in told(capfd, words(model, data, tmp_path / "out"))
