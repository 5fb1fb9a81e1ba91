"""A run as its output folder tells it: ``run.json`` and ``metrics.jsonl``, read without torch.

>>> from prefopt.runs.history import read_history
>>> read_history("OUTPUT").curve("loss")  # doctest: +SKIP
Curve(steps=[1, 2, 3], values=[0.693, 0.688, 0.671])

Everybody who reads a run reads it here, so that no other place has to ask what a value is. What this version does not
know is let through; what it knows and finds of another kind is told in one line, with its place.

>>> checked({"status": "finished", "steps": 3})
{'status': 'finished', 'steps': 3}
>>> checked({"steps": "many"})
Traceback (most recent call last):
ValueError: steps is 'many'
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefopt.core.files import parsed, printable, read_json
from prefopt.errors import RunError

RECORD, METRICS = "run.json", "metrics.jsonl"
LARGEST_COUNT = 2**53
"""Of steps, rows, tokens, bytes: beyond it a float does not tell neighbours apart."""
LARGEST = 1e100
"""Of any number: nothing that is measured comes near it, and squares of it are still numbers."""

Line = dict[str, Any]
"""``step`` (1 or more) and metrics by name, each a finite number, or none where it was not finite."""
Is = Callable[[Any], bool]


def read_record(folder: Path, remedy: str = "leave this run out") -> dict[str, Any]:
    """The ``run.json`` of an output folder.

    Raises :class:`RunError` where there is none, where it cannot be read, and where a value is of another kind than
    runs write: with ``remedy``, what to do then.
    """
    if not (folder / RECORD).exists():
        raise RunError(f"{folder}: no run of prefopt (no {RECORD} in it); name its output folder")
    return read_json(folder / RECORD, checked, remedy)


def read_metrics(folder: Path) -> list[Line]:
    """The lines of ``metrics.jsonl``, none where there is no such file. A last line that a kill cut off is left out.

    Raises :class:`RunError` for any other line that holds no metrics.
    """
    return [line for _, line in numbered_lines(folder / METRICS)]


def numbered_lines(path: Path) -> Iterator[tuple[bytes, Line]]:
    """Each line as it stands in the file, and what it says. Raises as :func:`read_metrics`."""
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); restore it, or leave this run out") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            values = parsed(text)
        except ValueError as error:
            if number == len(lines):  # cut off by a kill
                return
            raise _no_metrics(path, number, str(error)) from None
        try:
            line = _line(values)
        except ValueError as error:
            raise _no_metrics(path, number, str(error)) from None
        yield text, line


def checked(record: Any) -> dict[str, Any]:
    """``record`` with half surrogates out of its texts. Raises ``ValueError`` for a value of another kind."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    for name, value in record.items():
        if name in KINDS and value is not None and not KINDS[name](value):
            raise ValueError(f"{name} is {_short(value)}")
    found: dict[str, Any] = printable(record)
    # A null is what is not there.
    return {name: value for name, value in found.items() if value is not None}


def _line(values: Any) -> Line:
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    if not (_is_count(values.get("step")) and values["step"] >= 1):
        raise ValueError(f"step is {_short(values.get('step'))}")
    line: Line = {}
    for name, value in values.items():
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            line[name] = None
        elif not _is_number(value) or not _in_bounds(name, value):
            raise ValueError(f"{_short(name)} is {_short(value)}")
        else:
            line[name] = value
    return line


def _in_bounds(name: str, value: float) -> bool:
    """Time does not run backwards."""
    return value >= 0 or not name.startswith(("epoch", "step_seconds", "tokens"))


def _no_metrics(path: Path, number: int, why: str) -> RunError:
    return RunError(f"{path}, line {number} holds no metrics ({why}); remove it, or leave this run out")


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST_COUNT else "a number without end"
    return text if len(text) <= 40 else f"{text[:39]}…"


# -- kinds of values -------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_plain(value: Any) -> bool:
    """The value of an option."""
    not_finite = isinstance(value, float) and not math.isfinite(value)
    return value is None or isinstance(value, str | bool) or not_finite or _is_number(value)


def _is_option(value: Any) -> bool:
    return _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value)))


def _mapping(of: Is) -> Is:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


KINDS: Mapping[str, Is] = {
    **dict.fromkeys(("status", "started", "finished", "method", "algorithm", "loss"), _is_text),
    **dict.fromkeys(("data", "model", "reference", "reward", "ptx_data"), _is_text),
    **dict.fromkeys(("steps", "max_length", "token_budget", "scoring_budget", "sampled_at_once"), _is_count),
    "options": _mapping(_is_option),
    "results": _mapping(_is_option),
    # Earlier runs of PPO wrote here how many responses they drew at once.
    "rows": lambda value: _is_count(value) or _mapping(_is_count)(value),
    "costs": _mapping(_is_amount),
    "memory": _mapping(_is_amount),
    "tracking": _mapping(_is_text),
    "environment": _mapping(_mapping(_is_text)),
}
"""What the keys of ``run.json`` hold."""


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
    has the same name on both sides. Values are of the kinds that :mod:`prefopt.runs.history` lets through."""

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
