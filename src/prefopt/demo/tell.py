"""What the demonstration says on the screen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from prefopt.config.command import command, program
from prefopt.config.dpo import DpoConfig
from prefopt.demo.measure import Measured
from prefopt.evaluate.chart import chart
from prefopt.progress import duration
from prefopt.screen import Screen
from prefopt.train.history import read_history


def tell(console: Screen, title: str, *lines: str) -> None:
    """A stage and what it is about."""
    console.print(f"\n{title}", style="bold")
    for line in lines:
        console.print(line)


def tell_result(console: Screen, result: Measured, run: Path) -> None:
    """The measurement, three openings side by side, the curve of the loss."""
    change = "a change that chance does not explain" if result.change.excludes(0) else "which chance could explain"
    tell(
        console,
        "6. What changed",
        f"sentiment of {result.before.count} openings' continuations, -1 to 1, with 95 % intervals over openings:",
        f"  before {result.before}",
        f"  after  {result.after}",
        f"  change {result.change}: {change}",
        f"KL to the model before, on samples: {result.kl.mean:.1f} nats [{result.kl.low:.1f}, {result.kl.high:.1f}]",
        f"length: {result.tokens[0]:.1f} tokens before, {result.tokens[1]:.1f} after",
        f"variety: {result.variety[0]:.1%} of all sequences of three words are distinct before,"
        f" {result.variety[1]:.1%} after",
    )
    table = Table(show_header=True, show_lines=True, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("before", "after"):
        table.add_column(name, ratio=1)
    for e in result.examples:
        table.add_row(
            *(_sample(e.opening, text, score) for text, score in ((e.before, e.before_score), (e.after, e.after_score)))
        )
    console.print()
    console.print(table, soft_wrap=False)
    history = read_history(run)
    tell(console, "The loss, step by step (ln 2 = 0.693 is where it starts)", *chart(history.curve("loss")))


def _sample(opening: str, text: str, score: float) -> str:
    return f"[{score:+.2f}] {opening}{' '.join(text.split(' '))}".replace("\n", " ") + "\n"


def tell_times(console: Screen, stages: Mapping[str, float]) -> None:
    """The time of each stage."""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items())
    console.print(f"\ntime: {parts}; {duration(sum(stages.values()))} in all")


def tell_next(console: Screen, model: Path, again: DpoConfig, aligned: Path, picture: Path) -> None:
    """Three commands to go on with, and where things are. ``again``: the demonstration's training with another loss."""
    start = program()
    tell(
        console,
        "7. What to try next",
        f"talk to it: {start} chat --model {shlex.quote(str(aligned))} --against {shlex.quote(str(model))}",
        f"another loss, the same reference from the cache: {command('dpo', again)}",
        f"your model and your pairs: {start} dpo --model MODEL --data PAIRS.jsonl --output OUTPUT --eval-fraction 0.05",
        f"{aligned} is an ordinary Hugging Face folder, with its card in README.md; {picture} shows the curves",
    )
