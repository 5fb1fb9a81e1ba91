"""The demonstration: a tiny model is built, aligned with a few dozen pairs by the ordinary method, and looked at."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prefopt.config.dpo import DpoConfig
from prefopt.config.option import options
from prefopt.data.load import GroupSet, load_groups
from prefopt.data.packer import pack
from prefopt.data.read import read_json
from prefopt.data.tokenizer import load_tokenizer
from prefopt.demo.model import LAYERS, WIDTH, build_model
from prefopt.disk.write import output_errors, write_json
from prefopt.errors import RunError
from prefopt.methods.preference import run
from prefopt.model.load import load_model
from prefopt.model.scorer import Scorer, response_sums
from prefopt.progress import duration
from prefopt.train.terms import terms_of

MARK = "demo.json"
MADE = ("model", "pairs.jsonl", "aligned")
SHOWN = 3


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration reached on its held-out pairs; ``margin`` is the mean difference of their rewards."""

    output: Path
    held_out_pairs: int
    loss: float
    accuracy: float
    margin: float


def run_demo(output: str) -> DemoResult:
    """Build, align and tell. Results of an earlier demonstration in ``output`` are replaced.

    Raises :class:`RunError` where the folder holds anything else.
    """
    started = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    folder = Path(output)
    config = _config(folder)
    _make_room(folder)
    with output_errors(folder):
        weights = _build(folder)
    _title(console, "1. A model and its data")
    console.print(
        f"{config.data[0]}: questions, each with a plain answer (chosen) and an evasive one (rejected)\n"
        f"{config.model}: a Llama of {weights:,} random weights ({LAYERS} layers, width {WIDTH}), and a tokenizer"
        " trained on these texts\n",
        markup=False,
    )
    _title(console, "2. Direct preference optimization, by this command")
    console.print(f"{program()} {command(config)}\n", markup=False)
    finished = run(config)
    assert finished is not None and finished.best_step is not None
    result = _held_out(config, finished.best_step)
    _title(console, "\n3. What happened")
    _tell(console, config, result)
    _title(console, "\n4. Where things are")
    _places(console, folder)
    _title(console, "\n5. What to try next")
    _next(console, folder)
    console.print(f"\n(all of this took {duration(time.monotonic() - started)})", markup=False)
    return result


def command(config: DpoConfig) -> str:
    """``dpo`` and the options that differ from their defaults, as a person would type them."""
    plain = DpoConfig(model=config.model, data=config.data, output=config.output).to_dict()
    words = ["dpo"]
    for o in options(DpoConfig):
        value = getattr(config, o.name)
        if o.required or value != plain[o.name]:
            many = value if isinstance(value, list) else [f"{value:g}" if isinstance(value, float) else str(value)]
            words += [o.flag, *many]
    return shlex.join(words)


def program() -> str:
    """How this installation is started: ``prefopt`` where the shell finds it, else by its path."""
    beside = Path(sys.executable).with_name("prefopt")
    found = shutil.which("prefopt")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "prefopt"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m prefopt"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def _config(folder: Path) -> DpoConfig:
    # The rate is that of a model which has everything to learn; a trained one wants a thousandth of it. More than one
    # thread would only wait for the others: the matrices are that small.
    return DpoConfig(
        model=str(folder / "model"),
        data=[str(folder / "pairs.jsonl")],
        output=str(folder / "aligned"),
        eval_fraction=0.25,
        epochs=4,
        batch_size=4,
        learning_rate=1e-3,
        device="cpu",
        dtype="float32",
        threads=1,
    )


def _make_room(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output {folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise RunError(f"--output {folder} is not empty and holds no demonstration; name another folder")
    for path in (folder / name for name in MADE):
        with output_errors(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    write_json(folder / MARK, {"made_by": "prefopt demo", "replaced_by_the_next_one": list(MADE)})


def _build(folder: Path) -> int:
    """Write pairs and model; returns how many weights it has."""
    pairs = folder / "pairs.jsonl"
    pairs.write_bytes(resources.files("prefopt.demo").joinpath("pairs.jsonl").read_bytes())
    rows: list[dict[str, list[dict[str, str]]]] = list(read_json(pairs))  # type: ignore[arg-type]
    return build_model(folder / "model", [turn["content"] for row in rows for turns in row.values() for turn in turns])


def _held_out(config: DpoConfig, step: int) -> DemoResult:
    """The evaluation of the weights that were saved."""
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if line["step"] == step and "eval_loss" in line)
    _, held_out = _pairs(config)
    names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    return DemoResult(Path(config.output), len(held_out), *(found[name] for name in names))


def _pairs(config: DpoConfig) -> tuple[GroupSet, Sequence[int]]:
    data = load_groups(config.data, load_tokenizer(config.model))
    return data, data.split(config.eval_fraction, config.seed)[1]


def _rewards(config: DpoConfig, data: GroupSet, held_out: Sequence[int]) -> list[tuple[float, float]]:
    """Rewards (chosen, rejected) of held-out pairs under the aligned model, from the two models as they were saved."""
    sums = []
    for folder in (config.output, config.model):
        scorer = Scorer(load_model(folder, dtype=torch.float32, device=torch.device("cpu")))
        batch = pack([data.groups[i] for i in held_out], scorer.layout)
        with torch.no_grad():
            sums.append(response_sums(scorer(batch), batch))
    beta = terms_of(config)[0].beta
    rewards: list[list[float]] = (beta * (sums[0] - sums[1])).view(-1, 2).tolist()
    return [(chosen, rejected) for chosen, rejected in rewards]


def _tell(console: Console, config: DpoConfig, result: DemoResult) -> None:
    data, held_out = _pairs(config)
    rows: list[Any] = list(read_json(config.data[0]))
    right = round(result.accuracy * result.held_out_pairs)
    console.print(
        f"loss on {result.held_out_pairs} held-out pairs: {result.loss:.4f}, down from ln 2 = {math.log(2):.4f}, the"
        " loss of the model before training\n"
        f"chosen above rejected in {right} of {result.held_out_pairs}, by {result.margin:.2f} in the mean\n"
        "\nThree of them, with their rewards (beta times the log-ratio to the model before training):",
        markup=False,
    )
    shown = held_out[:SHOWN]
    for i, rewards in zip(shown, _rewards(config, data, shown), strict=True):
        row = rows[data.groups[i].row - 1]
        console.print(f"  {row['prompt'][-1]['content']}", markup=False)
        for reward, side in zip(rewards, ("chosen", "rejected"), strict=True):
            console.print(f"    {reward:+6.2f}  {row[side][-1]['content']}", markup=False)
    console.print(
        "\nThe model knows no language: it has learnt to tell two kinds of answers apart, on questions it never saw.",
        markup=False,
    )


def _places(console: Console, folder: Path) -> None:
    done = folder / "aligned"
    places = {
        f"{done}": "the aligned model, a folder that transformers loads",
        f"{done / 'README.md'}": "its card: data, results, settings",
        f"{done / 'metrics.jsonl'}": "every step and evaluation, one JSON object per line",
        f"{done / 'config.yaml'}": "every option, to be used again with --config",
    }
    _columns(console, places)


def _next(console: Console, folder: Path) -> None:
    model, pairs, other = (
        str(folder / "model"),
        str(folder / "pairs.jsonl"),
        str(folder.with_name(folder.name + "-2")),
    )
    start = f"{program()} {shlex.join(['dpo', '--model', model, '--data', pairs, '--output', other])}"
    steps = {
        "what a run would do, with two rows as the model sees them": f"{start} --dry-run",
        "another beta, the reference's values from the cache": f"{start} --beta 0.3 --learning-rate 1e-3",
        "your model and your pairs": f"{program()} dpo --model MODEL --data PAIRS.jsonl --output OUTPUT",
    }
    for what, line in steps.items():
        console.print(f"{what}\n    {line}", markup=False)


def _title(console: Console, text: str) -> None:
    console.print(text, style="bold", markup=False)


def _columns(console: Console, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, what in rows.items():
        console.print(f"{name:{width}}  {what}", markup=False)
