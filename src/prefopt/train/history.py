"""A run as its output folder tells it: ``run.json`` and ``metrics.jsonl``, read without torch.

>>> from prefopt.train.history import read_history
>>> read_history("OUTPUT").curve("loss")  # doctest: +SKIP
Curve(steps=[1, 2, 3], values=[0.693, 0.688, 0.671])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefopt.errors import RunError

Record = dict[str, Any]


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
    has the same name on both sides."""

    folder: Path
    record: Mapping[str, Any]
    training: Sequence[Record]
    held_out: Sequence[Record]

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that the run was started with."""
        found: Mapping[str, Any] = self.record.get("options", {})
        return found

    @property
    def step(self) -> int:
        """Steps done."""
        return max((int(line["step"]) for line in self.training), default=0)

    @property
    def steps(self) -> int | None:
        """Steps to be done in all, where the run came far enough to know."""
        found = self.record.get("steps")
        return int(found) if found is not None else None

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
        found = [(int(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), (int, float))]
        return Curve([step for step, _ in found], [value for _, value in found])

    def names(self) -> list[str]:
        """The metrics that there are, in the order in which they are written."""
        return list(dict.fromkeys(name for line in (*self.training, *self.held_out) for name in line if name != "step"))


def read_history(folder: str | Path) -> History:
    """Read an output folder. Raises :class:`RunError` where it holds no run, or lines that are no metrics."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text("utf-8"))
        if not isinstance(record, dict):
            raise ValueError
    except OSError as error:
        raise RunError(f"{folder}: no run of prefopt (no run.json in it); name its output folder") from error
    except ValueError as error:
        raise RunError(f"{folder / 'run.json'} is damaged; leave this run out") from error
    training, held_out = _lines(folder / "metrics.jsonl")
    return History(folder, record, training, held_out)


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


def _lines(path: Path) -> tuple[list[Record], list[Record]]:
    training: list[Record] = []
    held_out: list[Record] = []
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # cut off by a kill
                break
            raise RunError(f"{path}, line {number} holds no metrics; remove it, or leave this run out") from error
        evaluated = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
        if evaluated:
            held_out.append({"step": step, **evaluated})
        if len(record) > len(evaluated) + 1:
            training.append({name: value for name, value in record.items() if not name.startswith("eval_")})
    return training, held_out
