"""A finished run of every method, as small as it can be: what verbs that read runs are tried on."""

from __future__ import annotations

import json
from pathlib import Path

from prefopt.cli import main
from train.small import pairs, write_model, write_rows

QUICK = ["--device", "cpu", "--dtype", "float32", "--progress", "none"]
DATA = ["--max-length", "64", "--batch-size", "4", "--learning-rate", "1e-3"]
RANKED = [{"prompt": f"k{i}: ", "responses": ["aei", "ou", "xyz"], "scores": [3.0, 2.0, 1.0]} for i in range(6)]
LABELLED = [{"prompt": f"k{i}: ", "completion": "aei" if i % 2 else "xyz", "label": bool(i % 2)} for i in range(6)]

REWARD = "methods.small_world:reward"
PPO = ["--num", "2", "--max-new-tokens", "3", "--batch-size", "4", "--learning-rate", "1e-3", "--max-kl", "1e6"]
METHODS = {
    "sft": ["sft", "--data", "pairs.jsonl", "--eval-fraction", "0.3", *DATA],
    "distil": [
        "distil",
        "--teacher",
        "teacher",
        "--data",
        "pairs.jsonl",
        "--on-policy",
        "0.5",
        "--eval-fraction",
        "0.3",
        *DATA,
    ],
    "dpo": ["dpo", "--data", "pairs.jsonl", "--eval-fraction", "0.3", "--epochs", "6", *DATA],
    "lora": ["dpo", "--data", "pairs.jsonl", "--lora", "--lora-rank", "2", *DATA],
    "kto": ["dpo", "--data", "labels.jsonl", "--loss", "kto", *DATA],
    "ranking": ["dpo", "--data", "ranked.jsonl", "--loss", "plackett_luce", *DATA],
    "reward": ["reward", "--data", "pairs.jsonl", "--eval-fraction", "0.3", *DATA],
    "ppo": ["ppo", "--prompts", "pairs.jsonl", "--reward", REWARD, *PPO],
    "rloo": ["ppo", "--algorithm", "rloo", "--prompts", "pairs.jsonl", "--reward", REWARD, *PPO],
    "online": ["online", "--prompts", "pairs.jsonl", "--reward", REWARD, *PPO],
    "chain": [
        *("rlhf", "--data", "pairs.jsonl", "--max-new-tokens", "3", "--max-length", "64", "--seed", "0"),
        *("--sft", "batch_size=4", "--reward", "batch_size=4", "--ppo", "batch_size=4", "max_kl=1e6"),
    ],
}
"""The command of each, less its model and output."""
RUNS = [name for name in METHODS if name != "chain"]


def command(name: str) -> list[str]:
    """As it is typed in the folder of :func:`write_runs`."""
    return [*METHODS[name], "--model", "base", "--output", name, *QUICK]


def write_runs(folder: Path, names: list[str]) -> Path:
    """The runs of these names in ``folder``, each in one of its own, beside the model ``base`` and their data."""
    write_model(folder / "base")
    write_model(folder / "teacher", seed=1)
    write_rows(folder / "pairs.jsonl", pairs(10))
    write_rows(folder / "ranked.jsonl", RANKED)
    write_rows(folder / "labels.jsonl", LABELLED)
    write_rows(folder / "prompts.jsonl", [{"prompt": "k1: "}, {"prompt": "m2: "}])
    write_rows(folder / "answers.jsonl", [{"prompt": "k1: ", "response": "aei"}])
    for name in names:
        assert main(command(name)) == 0, name
        for path in (folder / name).rglob("run.json"):
            assert json.loads(path.read_text())["status"] == "finished"
    return folder
