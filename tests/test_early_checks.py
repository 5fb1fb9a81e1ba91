"""Mistakes that need no model are reported before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from prefopt.config.dpo import loss_names
from prefopt.losses.declare import LOSSES
from train.small import pairs, write_rows

# What is wrong, and what the message names. Options replace those of a sound command.
MISTAKES: list[tuple[str, dict[str, str], list[str]]] = [
    ("dpo", {"data": "missing.json"}, ["missing.json"]),
    ("dpo", {"data": "empty.jsonl"}, ["empty.jsonl", "empty"]),
    ("dpo", {"eval-data": "missing.json"}, ["missing.json"]),
    ("dpo", {"loss": "dop"}, ["--loss", "dop", "dpo"]),
    ("dpo", {"loss": "dpo:1,nil:2"}, ["--loss", "nil"]),
    ("dpo", {"model": "./none"}, ["./none"]),
    ("dpo", {"reference": "./none"}, ["./none"]),
    ("dpo", {"model": "none"}, ["none", "Hub"]),
    ("dpo", {"device": "mps"}, ["--device", "mps"]),
    ("sft", {"output": "done"}, ["--output", "done", "finished"]),
    ("sft", {"output": "begun"}, ["--output", "begun", "--resume"]),
    ("reward", {"output": "taken"}, ["--output", "taken"]),
    ("ppo", {"reward": "vadder"}, ["vadder", "vader"]),
    ("ppo", {"reward": "./none"}, ["./none"]),
    ("sample", {"prompts": "missing.txt", "output": "s.jsonl"}, ["missing.txt"]),
    ("rlhf", {"data": "missing.json"}, ["missing.json"]),
    ("compare", {"a": "missing.jsonl", "b": "model", "judge": "length"}, ["missing.jsonl"]),
    ("report", {"run": "missing"}, ["missing"]),
    ("score", {"files": "data.jsonl", "reward": "vadder", "output": "s.jsonl"}, ["vadder", "vader"]),
    ("score", {"files": "missing.json", "reward": "length", "output": "s.jsonl"}, ["missing.json"]),
    ("dpo", {"model": "taken"}, ["taken", "config.json"]),
    ("sample", {"prompts": "data.jsonl", "output": "data.jsonl"}, ["--output", "data.jsonl", "--resume"]),
    ("score", {"files": "data.jsonl", "reward": "length", "output": "data.jsonl"}, ["data.jsonl", "--overwrite"]),
    ("score", {"files": "data.jsonl", "reward": "absent:f", "output": "s.jsonl"}, ["absent"]),
    ("ppo", {"reward": "absent:f"}, ["absent"]),
    ("report", {"run": "taken"}, ["taken", "run.json"]),
    ("merge", {"adapter": "model", "output": "m"}, ["model", "adapter_config.json", "--model"]),
    ("push", {"folder": "broken", "repo": "me/it", "yes": "true"}, ["broken", "adapter_config.json", "UTF-8"]),
]


def test_torch_is_not_imported(tmp_path: Path) -> None:
    write_rows(tmp_path / "data.jsonl", pairs(2))
    (tmp_path / "empty.jsonl").touch()
    for name, status in (("done", "finished"), ("begun", "interrupted")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"status": status}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").touch()
    for name, file, text in (("model", "config.json", b"{}"), ("broken", "adapter_config.json", b"\xff")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(text)
    (tmp_path / "broken/adapter_model.safetensors").touch()
    words = []
    for verb, wrong, _ in MISTAKES:
        sound = {"prompts": "data.jsonl", "reward": "length"} if verb == "ppo" else {"data": "data.jsonl"}
        sound = {"prompts": "data.jsonl"} if verb == "compare" else sound
        sound = {} if verb in ("sample", "score", "report", "merge", "push") else {**sound, "output": "new"}
        sound |= {} if verb in ("compare", "report", "score", "merge", "push") else {"model": "model"}
        words.append([verb, *(f"--{name}={value}" for name, value in (sound | wrong).items())])
    script = (
        "import sys\nfrom prefopt.cli import main\n"
        f"for words in {words!r}:\n"
        "    assert main(words) == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert result.returncode == 0, result.stderr
    said = result.stderr.splitlines()
    assert len(said) == len(MISTAKES), result.stderr
    for line, (verb, wrong, names) in zip(said, MISTAKES, strict=True):
        assert all(name in line for name in names), (verb, wrong, line)
    assert not (tmp_path / "new").exists()


def test_the_names_of_losses_are_read_without_importing_them() -> None:
    assert sorted(loss_names()) == sorted(LOSSES)
