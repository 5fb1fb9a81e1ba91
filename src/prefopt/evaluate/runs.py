"""Runs beside one another: which there are, what differs between them, and what they reached."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.config.option import options
from prefopt.config.rlhf import STAGES
from prefopt.errors import RunError
from prefopt.train.diagnose import diagnose
from prefopt.train.folder import FREE
from prefopt.train.history import History, averages_of, read_history
from prefopt.train.record import RECORD

CLOCK = ("step", "step_seconds", "tokens", "epoch", "learning_rate")
"""Metrics that say where a run stands, not what it reached."""
CHAIN = "stages.json"
"""What ``prefopt rlhf`` keeps beside the folders of its stages."""


def find_runs(folder: str | Path) -> tuple[list[History], list[str]]:
    """The run that ``folder`` is, or else all below it, those that started first coming first; and what is damaged
    there, in a line each.

    Raises :class:`RunError` where there is no such folder, or the one run that it is has a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; name an output folder, or one that holds some")
    if (folder / RECORD).exists():
        return [read_history(folder)], []
    found, damaged = [], []
    for path in sorted(folder.rglob(RECORD)):
        try:
            found.append(read_history(path.parent))
        except RunError as error:
            damaged.append(str(error))
    stages = list(STAGES)  # of a chain, which may begin within a second

    def order(run: History) -> tuple[str, int]:
        name = run.folder.name
        return str(run.record.get("started", "")), stages.index(name) if name in STAGES else -1

    return sorted(found, key=order), damaged


def runs_of(folder: str | Path) -> list[History]:
    """The run in an output folder, or those of the stages of a chain (``prefopt rlhf``), in their order.

    Raises :class:`RunError` where it is neither, with what is there instead, and where a file is damaged.
    """
    folder = Path(folder)
    if (folder / RECORD).exists():
        return [read_history(folder)]
    if (folder / CHAIN).exists() and (stages := [s for s in STAGES if (folder / s / RECORD).exists()]):
        return [read_history(folder / stage) for stage in stages]
    below = sorted(path.parent for path in folder.rglob(RECORD))
    if not below:
        return [read_history(folder)]  # says what is missing
    many = f"{len(below)} runs" if len(below) > 1 else "a run"
    raise RunError(f"{folder} holds no run of its own, but {many} below it: name output folders, such as {below[0]}")


def of_one_method(runs: Sequence[History]) -> bool:
    """Whether the losses of these runs can stand beside one another: those of a chain's stages cannot."""
    return len({run.method for run in runs}) < 2


def differing(runs: Sequence[History]) -> list[str]:
    """The options in which runs differ, but for those that change nothing of their results; of runs of several methods
    those that all of them have."""
    names = dict.fromkeys(name for run in runs for name in run.options if name not in FREE)
    if not of_one_method(runs):
        names = dict.fromkeys(name for name in names if all(name in run.options for run in runs))
    return [name for name in names if any(run.options.get(name) != runs[0].options.get(name) for run in runs)]


def reached(run: History) -> dict[str, dict[str, float]]:
    """``training``: each metric's average over the rows of the last tenth of the steps (see :meth:`History.ending`).
    ``held_out``: the metrics of the evaluation whose loss is lowest, and its ``step``."""
    training = {n: value for n, value in averages_of(run.ending()).items() if n not in CLOCK}
    found: dict[str, dict[str, float]] = {"training": training, "held_out": {}}
    scored = [line for line in run.held_out if line.get("loss") is not None]
    if scored:
        best = min(scored, key=lambda line: float(line["loss"]))
        found["held_out"] = {name: float(value) for name, value in best.items() if value is not None}
    return found


def as_json(run: History) -> dict[str, Any]:
    """A run as plain values."""
    return {
        "folder": str(run.folder),
        "method": run.record.get("method"),
        "algorithm": run.algorithm,
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "started": run.record.get("started"),
        "finished": run.record.get("finished"),
        "options": dict(run.options),
        **reached(run),
        "findings": [{"name": f.name, "text": f.text, "look": f.look} for f in diagnose(run)],
    }


def list_of(runs: Sequence[History], base: Path) -> list[str]:
    """A line per run: name, status, steps, what it reached, and the options in which runs differ."""
    different = differing(runs)
    rows = [["run", "status", "steps", "loss", "held-out loss", "held-out accuracy", "options that differ"]]
    for run in runs:
        values = reached(run)
        steps = f"{run.step}" if run.steps in (None, run.step) else f"{run.step} of {run.steps}"
        rows.append(
            [
                _name(run, base),
                run.status,
                steps,
                as_number(values["training"].get("loss")),
                as_number(values["held_out"].get("loss")),
                as_number(values["held_out"].get("rewards/accuracies")),
                " ".join(f"{name}={shown(run.options.get(name))}" for name in different) or "none",
            ]
        )
    return columns(rows)


def comparison(runs: Sequence[History]) -> list[str]:
    """Options that differ and metrics, a column per run."""
    names = labels(runs)
    different = differing(runs)
    lines = ["options that differ:"]
    rows = [[name, *(shown(run.options.get(name)) for run in runs)] for name in different]
    lines += columns([["", *names], *rows], indent=2) if rows else ["  none"]
    found = [reached(run) for run in runs]
    titles = {
        "held_out": "held-out rows, at the step whose loss is lowest:",
        "training": "training batches, average over the rows of the last tenth of the steps:",
    }
    for side, title in titles.items():
        metrics = dict.fromkeys(name for values in found for name in values[side])
        rows = [[name, *(as_number(values[side].get(name)) for values in found)] for name in metrics]
        if rows:
            lines += ["", title, *columns([["", *names], *rows], indent=2)]
    return lines + [f"note: {line}" for line in caveats(runs)]


def caveats(runs: Sequence[History]) -> list[str]:
    """Why numbers of these runs may not be comparable."""
    found = []
    of_the_loss = {o.name for o in options(DpoConfig) if o.group == "loss"}
    if parts := [name for name in differing(runs) if name in of_the_loss]:
        found.append(f"{', '.join(parts)} decides what the loss is: compare accuracies or samples, and not losses")
    if not of_one_method(runs):
        found.append("runs of different methods: no number of one can be compared with the same of another")
    elif len({run.record.get("data") for run in runs}) > 1:
        found.append("the runs do not have the same data, or not the same held-out rows")
    if len({run.record.get("reference") for run in runs}) > 1:
        found.append("the runs do not have the same reference: rewards and log-ratios are from different places")
    if rough := [label for label, run in zip(labels(runs), runs, strict=True) if run.status != "finished"]:
        found.append(f"not finished: {', '.join(rough)}")
    return found


def labels(runs: Sequence[History]) -> list[str]:
    """Short names that tell the runs apart: the ends of their paths."""
    parts = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({i})" for i, p in enumerate(parts, 1)]


def what_differs(runs: Sequence[History]) -> list[str]:
    """A name per run for a legend: the options that differ and their values; else the ends of their paths."""
    different = differing(runs)
    names = [
        ", ".join(f"{name.replace('_', ' ')} {shown(run.options.get(name))}" for name in different) for run in runs
    ]
    short = of_one_method(runs) and len(different) <= 3 and len(set(names)) == len(names) and all(names)
    return names if short else labels(runs)


def shown(value: Any) -> str:
    """The value of an option, as a person would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", f"{value:g}").replace("e+", "e")
    if isinstance(value, list):
        return ",".join(map(shown, value))
    return "none" if value is None else str(value)


def columns(rows: Sequence[Sequence[str]], *, indent: int = 0) -> list[str]:
    """Rows of cells as aligned lines; the last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [" " * indent + line.rstrip() for line in padded]


def _name(run: History, base: Path) -> str:
    try:
        return str(run.folder.relative_to(base))
    except ValueError:
        return str(run.folder)


def as_number(value: float | None) -> str:
    """A measured value as a person reads it; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def summary(run: History) -> Mapping[str, str]:
    """What a person asks first about one run."""
    steps = f"{run.step}" if run.steps in (None, run.step) else f"{run.step} of {run.steps}"
    told = {
        "method": run.algorithm,
        "status": run.status,
        "steps": steps,
        "started": run.record.get("started"),
        "finished": run.record.get("finished"),
        "model": run.options.get("model"),
        "data": shown(run.options.get("data", run.options.get("prompts"))),
    }
    return {name: str(value) for name, value in told.items() if value is not None}
