"""A run as its output folder tells it: ``run.json`` and ``metrics.jsonl``, read without torch.

>>> from prefopt.train.history import read_history
>>> read_history("OUTPUT").curve("loss")  # doctest: +SKIP
Curve(steps=[1, 2, 3], values=[0.693, 0.688, 0.671])
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefopt.train.record import Line, read_metrics, read_record

SPEEDS = ("pairs_per_second", "rows_per_second")
"""Metrics that say how many rows a batch had, with its time."""
PLACES = ("step", "epoch", "episode", "learning_rate", "peak_memory_bytes")
"""Metrics that say where a run stands, not what it reached."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps that have it."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, slots=True)
class History:
    """``record`` is ``run.json``; ``training`` and ``held_out`` are the lines of ``metrics.jsonl``, in which a metric
    has the same name on both sides. Values are of the kinds that :mod:`prefopt.train.record` lets through."""

    folder: Path
    record: Mapping[str, Any]
    training: Sequence[Line]
    held_out: Sequence[Line]

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that the run was started with."""
        found: Mapping[str, Any] = self.record.get("options", {})
        return found

    @property
    def step(self) -> int:
        """Steps done."""
        return max((line["step"] for line in self.training), default=0)

    @property
    def steps(self) -> int | None:
        """Steps to be done in all, where the run came far enough to know."""
        found: int | None = self.record.get("steps")
        return found

    @property
    def method(self) -> str:
        """The command that trained it."""
        return str(self.record.get("method", "dpo"))

    @property
    def algorithm(self) -> str:
        """What it trained by, as people call it: that of a command which has several, else the command."""
        return str(self.record.get("algorithm", self.method))

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of the data ``read``, ``kept`` and ``truncated``; of prompts nothing is counted."""
        found: Any = self.record.get("rows")
        return found if isinstance(found, dict) else {}

    @property
    def status(self) -> str:
        """``finished``; ``running``, where a process holds the folder; else ``interrupted``, ``failed`` or
        ``stopped`` (killed, or before its first step)."""
        status = str(self.record.get("status"))
        if status == "finished":
            return status
        if in_use(self.folder):
            return "running"
        return {"trained": "stopped"}.get(status, status if status in ("interrupted", "failed") else "stopped")

    def curve(self, name: str, *, held_out: bool = False) -> Curve:
        """A metric over the steps; lines that lack it, or hold no finite number, are left out."""
        lines = self.held_out if held_out else self.training
        found = [(int(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]
        return Curve([step for step, _ in found], [value for _, value in found])

    def ending(self) -> list[tuple[Line, float]]:
        """The lines of the last tenth of the steps, each with the rows of its batch: what a mean over rows is of.

        They hold as many rows as the largest batch at least, since the last one of an epoch may have very few.
        """
        rows = self._rows()
        count, largest = math.ceil(len(rows) / 10), max(rows, default=0.0)
        while count < len(rows) and sum(rows[-count:]) < largest:
            count += 1
        return list(zip(self.training, rows, strict=True))[len(rows) - count :]

    def _rows(self) -> list[float]:
        """Rows of each step's batch, from how many there were in a second, or episodes; 1 where its line says none."""
        found, before = [], 0.0
        for line in self.training:
            speed = next((line[name] for name in SPEEDS if line.get(name)), None)
            took, episode = line.get("step_seconds"), line.get("episode")
            if episode:
                found.append(max(1.0, episode - before))
                before = episode
            else:
                found.append(max(1.0, round(speed * took)) if speed and took else 1.0)
        return [float(n) for n in found]

    def names(self) -> list[str]:
        """The metrics that there are, in the order in which they are written."""
        lines = (*self.training, *self.held_out)
        there = (name for line in lines for name, value in line.items() if name != "step" and value is not None)
        return list(dict.fromkeys(there))


def read_history(folder: str | Path) -> History:
    """Read an output folder. Raises :class:`RunError` where it holds no run, or lines that are no metrics."""
    folder = Path(folder)
    record = read_record(folder)
    training: list[Line] = []
    held_out: list[Line] = []
    for line in read_metrics(folder):
        evaluated = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        if evaluated:
            held_out.append({"step": line["step"], **evaluated})
        if len(line) > len(evaluated) + 1:
            training.append({name: value for name, value in line.items() if not name.startswith("eval_")})
    return History(folder, record, training, held_out)


def averages_of(lines: Sequence[tuple[Line, float]]) -> dict[str, float]:
    """Each metric's average over rows, of lines with how many rows they are of; of :data:`PLACES` what the last
    line says."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for line, _ in lines for name in line):
        known = [(line[name], rows) for line, rows in lines if line.get(name) is not None]
        if name in PLACES and known:
            found[name] = known[-1][0]
        elif known and name == "objective/kl_error":  # the error of a mean of independent means
            found[name] = math.hypot(*(rows * error for error, rows in known)) / sum(rows for _, rows in known)
        elif known:
            found[name] = statistics.fmean(*zip(*known, strict=True))
    return found


def in_use(folder: Path) -> bool:
    """Whether a process trains into this folder."""
    path = folder / ".lock"
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False
