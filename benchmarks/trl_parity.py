"""Whole runs of DPO, SFT and a reward model, prefopt against TRL: do they end at the same held-out numbers?

    python benchmarks/dpo_throughput.py --setup-trl trl-env          # once: TRL's own environment
    python benchmarks/trl_parity.py --trl-python trl-env/bin/python --output parity

The model is the one that ships with prefopt; the data are pairs of its own samples that VADER orders, made once per
output folder. A seed deals the rows to training and held-out rows and gives their order; both sides train on them in
that order, with the same options, in float32, and evaluate by their own code. Token ids for TRL are made here, by the
tokenizer alone. Prints every number of both sides, and the average difference over seeds with its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import prefopt
from prefopt.config.tools import ScoreConfig
from prefopt.core.files import expanded
from prefopt.evaluate import score
from prefopt.runs.history import read_history

MODEL = str(expanded("prefopt:demo/tiny_imdb"))
HELD_OUT, BATCH = 128, 8
RATE = {"dpo": 1e-4, "sft": 1e-4, "reward": 1e-4}
OPTIONS: dict[str, dict[str, Any]] = {"dpo": {"beta": 0.1}, "sft": {}, "reward": {"centre": 0.0, "zero": "none"}}
TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "precompute_ref_log_probs": True},
    "sft": {"dataset_kwargs": {"skip_prepare_dataset": True}},
    "reward": {},
}
NAMES = {  # of prefopt's held-out metrics, and TRL's
    "dpo": {"loss": "loss", "rewards/margins": "rewards/margins", "rewards/accuracies": "rewards/accuracies"},
    "sft": {"loss": "loss"},
    "reward": {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"},
}
Row = dict[str, str]


def make_pairs(folder: Path) -> list[Row]:
    """Pairs of samples to openings of reviews: the more positive against the more negative, where VADER sees 0.8
    points between them. Written once to ``folder``."""
    path = folder / "pairs.jsonl"
    if not path.exists():
        samples, scored = folder / "samples.jsonl", folder / "scored.jsonl"
        prompts = str(expanded("prefopt:demo/openings.txt"))
        drawn = {"num": 16, "max_new_tokens": 32, "seed": 2, "dtype": "float32"}
        prefopt.sample(model=MODEL, prompts=[prompts], lines="text", output=str(samples), **drawn)
        score.run(ScoreConfig(files=[str(samples)], reward="vader", output=str(scored)))
        rows = [row for line in scored.open(encoding="utf-8") for row in _pairs_of(json.loads(line))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def _pairs_of(row: dict[str, Any]) -> list[Row]:
    order = sorted(range(len(row["scores"])), key=row["scores"].__getitem__)
    pairs = zip(reversed(order), order, strict=True)
    told = [(a, b) for a, b in pairs if row["scores"][a] - row["scores"][b] >= 0.8]
    return [{"prompt": row["prompt"], "chosen": row["responses"][a], "rejected": row["responses"][b]} for a, b in told]


def ids_of(method: str, rows: list[Row], tokenizer: Any) -> list[dict[str, Any]]:
    """Columns that TRL's collators read."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = []
    for row in rows:
        prompt = ids(row["prompt"])
        chosen, rejected = ([*ids(row[side]), tokenizer.eos_token_id] for side in ("chosen", "rejected"))
        if method == "dpo":
            found.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        elif method == "reward":
            found.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected})
        else:
            found.append({"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen})
    return found


def start_of(method: str, folder: Path) -> str:
    """The model that both sides start from; a reward model has a head drawn once."""
    if method != "reward":
        return MODEL
    path = folder / "reward-start"
    if not path.exists():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=torch.float32)
        torch.nn.init.normal_(model.score.weight, std=0.02)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return str(path)


def run_prefopt(method: str, folder: Path, rows: list[Row], held_out: list[Row], start: str) -> dict[str, Any]:
    """Losses of all steps, and held-out metrics at the end."""
    files = {}
    for name, some in (("data", rows), ("eval_data", held_out)):
        path = folder / f"{name}.jsonl"
        keep = ("prompt", "chosen") if method == "sft" else ("prompt", "chosen", "rejected")
        renamed = [{"response" if k == "chosen" and method == "sft" else k: row[k] for k in keep} for row in some]
        path.write_text("".join(json.dumps(row) + "\n" for row in renamed), "utf-8")
        files[name] = [str(path)]
    output = folder / "prefopt"
    train = getattr(prefopt, method)
    train(
        model=start,
        output=str(output),
        batch_size=BATCH,
        learning_rate=RATE[method],
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle=False,
        device="cpu",
        dtype="float32",
        threads=1,
        progress="none",
        overwrite=True,
        **files,
        **OPTIONS[method],
    )
    history = read_history(output)
    last = history.held_out[-1]
    return {"losses": [record["loss"] for record in history.training], "after": last}


def run_trl(python: str, method: str, folder: Path, train: Any, held_out: Any, start: str) -> dict[str, Any]:
    """What `trl_side.py` answers."""
    options = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": HELD_OUT,  # one batch: TRL averages the means of batches
        "num_train_epochs": 1,
        "learning_rate": RATE[method],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        **TRL_OPTIONS[method],
    }
    spec, result = folder / "trl.json", folder / "trl-result.json"
    contents = {"method": method, "model": start, "train": train, "held_out": held_out, "options": options}
    spec.write_text(json.dumps(contents | {"output": str(folder / "trl"), "result": str(result)}), "utf-8")
    with (folder / "trl.log").open("w", encoding="utf-8") as log:
        side = str(Path(__file__).with_name("trl_side.py"))
        if subprocess.run([python, side, str(spec)], stdout=log, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"TRL's run failed; see {log.name}")
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found


def compare(method: str, seed: int, root: Path, python: str, pairs: list[Row]) -> dict[str, Any]:
    """Both sides with one seed; what is finished is read, not run again."""
    folder = root / f"{method}-{seed}"
    kept = folder / "both.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    rows = pairs[:]
    random.Random(seed).shuffle(rows)
    train, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
    start, tokenizer = start_of(method, root), AutoTokenizer.from_pretrained(MODEL)
    theirs = run_trl(
        python, method, folder, ids_of(method, train, tokenizer), ids_of(method, held_out, tokenizer), start
    )
    ours = run_prefopt(method, folder, train, held_out, start)
    both = {"prefopt": ours, "trl": theirs}
    kept.write_text(json.dumps(both), "utf-8")
    return both


def report(method: str, found: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: the numbers of every seed, and their average difference."""
    first = max(abs(b["prefopt"]["losses"][0] - b["trl"]["losses"][0]) for b in found)
    worst = max(
        abs(a - b) for both in found for a, b in zip(both["prefopt"]["losses"], both["trl"]["losses"], strict=True)
    )
    lines = [f"{method}: {len(found[0]['prefopt']['losses'])} steps; losses of steps differ by {worst:.2g} at most,"]
    lines[0] += f" in the first step by {first:.2g}"
    for name, other in NAMES[method].items():
        ours = [both["prefopt"]["after"][name] for both in found]
        theirs = [both["trl"]["after"][f"eval_{other}"] for both in found]
        gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        shown = ", ".join(f"{a:.4f} and {b:.4f}" for a, b in zip(ours, theirs, strict=True))
        lines.append(f"  held-out {name}: {shown}; difference {statistics.fmean(gaps):+.1e} +- {error:.1e}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--output", type=Path, default=Path("parity"))
    parser.add_argument("--methods", nargs="+", default=["dpo", "sft", "reward"], choices=list(NAMES))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pairs = make_pairs(given.output)
    print(f"{len(pairs)} pairs, {HELD_OUT} of them held out")
    for method in given.methods:
        found = [compare(method, seed, given.output, given.trl_python, pairs) for seed in range(given.seeds)]
        print("\n".join(report(method, found)), flush=True)


if __name__ == "__main__":
    main()
