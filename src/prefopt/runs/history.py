"""A run read from its output folder, ``run.json`` and ``metrics.jsonl``, without torch.

Types of values are checked. Unknown keys are kept; a known key with a value of another type is an error with its place.

>>> read_history("OUTPUT").curve("loss")  # doctest: +SKIP
Curve(steps=[1, 2, 3], values=[0.693, 0.688, 0.671])
>>> check_record({"status": "finished", "steps": 3})
{'status': 'finished', 'steps': 3}
>>> check_record({"steps": "many"})
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
from prefopt.core.options import RENAMED
from prefopt.errors import RunError

RECORD, METRICS = "run.json", "metrics.jsonl"
POINTS = "points.json"
"""What a sweep measured of a run. It may be there before the run: a sweep goes on from points made elsewhere."""
WORKING = "working_folder"
"""The key of ``run.json`` with the folder that relative paths among the options are read from; empty: not known."""
LARGEST_COUNT = 2**53
"""Of steps, rows, tokens, bytes: floats cannot tell larger neighbours apart."""
LARGEST = 1e100
"""Of any number: no measurement comes near it, and its square is still finite."""

Line = dict[str, Any]
"""``step`` (1 or more) and metrics by name: finite numbers, None where one was not finite."""


def read_record(folder: Path, remedy: str = "leave this run out") -> dict[str, Any]:
    """The ``run.json`` of an output folder. Raises :class:`RunError`, with ``remedy``, if it is absent, unreadable, or
    has a value of another type."""
    if not (folder / RECORD).exists():
        raise RunError(f"{folder}: no run of prefopt (no {RECORD} in it); name its output folder")
    return read_json(folder / RECORD, check_record, remedy)


def read_metrics(folder: Path) -> list[Line]:
    """The lines of ``metrics.jsonl``, empty without that file. A last line that a kill cut off is ignored. Raises
    :class:`RunError` for any other line without metrics."""
    return [line for _, line in numbered_lines(folder / METRICS)]


def numbered_lines(path: Path) -> Iterator[tuple[bytes, Line]]:
    """Each line as written, and parsed. Raises as :func:`read_metrics`."""
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); restore it, or leave this run out") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        cut = number == len(lines)
        try:
            values = parsed(text)
            cut = False
            line = _check_line(values)
        except ValueError as error:
            if cut:  # by a kill
                return
            raise RunError(
                f"{path}, line {number} holds no metrics ({error}); remove it, or leave this run out"
            ) from None
        yield text, line


def check_record(record: Any) -> dict[str, Any]:
    """``record`` without nulls and half surrogates, renamed options by their new names. Raises ``ValueError`` for a
    value of another type."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    for name, value in record.items():
        if name in TYPES and value is not None and not TYPES[name](value):
            raise ValueError(f"{name} is {_short(value)}")
    found = {name: value for name, value in printable(record).items() if value is not None}
    if "options" in found:
        found["options"] = {RENAMED.get(name, name): value for name, value in found["options"].items()}
    return found


def _check_line(values: Any) -> Line:
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    if not (_is_count(values.get("step")) and values["step"] >= 1):
        raise ValueError(f"step is {_short(values.get('step'))}")
    line: Line = {}
    for name, value in values.items():
        never_negative = name.startswith(("epoch", "step_seconds", "tokens"))
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            line[name] = None
        elif not _is_number(value) or (never_negative and value < 0):
            raise ValueError(f"{_short(name)} is {_short(value)}")
        else:
            line[name] = value
    return line


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST_COUNT else "a number that is too large"
    return text if len(text) <= 40 else f"{text[:39]}…"


# -- types of values -------------------------------------------------------------------------------------------------

IsType = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_option(value: Any) -> bool:
    if isinstance(value, list):
        return not any(isinstance(item, list) for item in value) and all(map(_is_option, value))
    not_finite = isinstance(value, float) and not math.isfinite(value)
    return value is None or isinstance(value, str | bool) or not_finite or _is_number(value)


def _mapping(of: IsType) -> IsType:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


TYPES: Mapping[str, IsType] = {
    **dict.fromkeys((WORKING, "status", "started", "finished", "method", "algorithm", "loss"), _is_text),
    **dict.fromkeys(("data", "model", "reference", "reward", "true_reward", "ptx_data"), _is_text),
    **dict.fromkeys(("steps", "max_length", "token_budget", "scoring_budget", "sampled_at_once"), _is_count),
    **dict.fromkeys(("options", "results"), _mapping(_is_option)),
    **dict.fromkeys(("costs", "memory"), _mapping(lambda value: _is_number(value) and value >= 0)),
    # First versions of PPO wrote a count here: responses drawn at once.
    "rows": lambda value: _is_count(value) or _mapping(_is_count)(value),
    "tracking": _mapping(_is_text),
    "environment": _mapping(_mapping(_is_text)),
}
"""The types of the keys of ``run.json``."""

# -- a run -----------------------------------------------------------------------------------------------------------

SPEEDS = ("pairs_per_second", "rows_per_second")
"""Metrics that give the rows of a batch, with its time."""
PLACES = ("step", "epoch", "episode", "learning_rate", "peak_memory_bytes")
"""Metrics of progress: the last value counts, not an average."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps that have it."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, slots=True)
class History:
    """A run: ``record`` is ``run.json``, ``training`` and ``held_out`` are the lines of ``metrics.jsonl``, with the
    same names of metrics."""

    folder: Path
    record: Mapping[str, Any]
    training: Sequence[Line]
    held_out: Sequence[Line]

    @property
    def options(self) -> Mapping[str, Any]:
        return dict(self.record.get("options", {}))

    @property
    def working_folder(self) -> Path | None:
        """The folder that relative paths among the options are read from, where it is known and still there."""
        found = Path(self.record.get(WORKING) or "?")
        return found if found.is_absolute() and found.is_dir() else None

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.training), default=0)

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, if it came far enough to know."""
        steps = self.record.get("steps")
        return None if steps is None else int(steps)

    @property
    def method(self) -> str:
        """The command that trained it."""
        return str(self.record.get("method", "dpo"))

    @property
    def algorithm(self) -> str:
        """The algorithm of a command that has several, such as rloo, else the command."""
        return str(self.record.get("algorithm", self.method))

    @property
    def loss_kind(self) -> str:
        """What its loss is: ``dpo``, ``kto``, ``nll``, ``reward``, ``rloo``, ``distil, forward``, ``distil, jsd 0.5``.
        Losses are comparable only between runs of one kind."""
        if self.method == "dpo":
            parts = (self.options.get("loss"), self.options.get("weighting"))
            return ", ".join(str(part) for part in parts if part) or "dpo"
        if self.method == "distil":
            found = self.options.get("divergence") or "forward"
            return f"distil, jsd {self.options.get('jsd_weight')}" if found == "jsd" else f"distil, {found}"
        return {"sft": "nll"}.get(self.method, self.algorithm)

    @property
    def label(self) -> str:
        """The method, with its loss or algorithm where it has several: dpo (kto), ppo (rloo), sft."""
        kind = self.loss_kind if self.method == "dpo" else self.algorithm
        return self.method if kind == self.method else f"{self.method} ({kind})"

    @property
    def seconds(self) -> float | None:
        """Wall time of all its starts, with preparation; None for a run that has not said so yet."""
        found: Any = self.record.get("costs", {}).get("seconds")
        return None if found is None else float(found)

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of the data ``read``, ``kept`` and ``truncated``; empty for prompts."""
        found: Any = self.record.get("rows")
        return found if isinstance(found, dict) else {}

    @property
    def status(self) -> str:
        """``finished``, ``running`` (a process holds the folder), ``interrupted``, ``failed``, or ``stopped`` (killed,
        or before its first step)."""
        status = str(self.record.get("status"))
        if status != "finished" and in_use(self.folder):
            return "running"
        return status if status in ("finished", "interrupted", "failed") else "stopped"

    def curve(self, name: str, *, held_out: bool = False) -> Curve:
        """A metric over the steps that have a finite value of it."""
        lines = [line for line in (self.held_out if held_out else self.training) if line.get(name) is not None]
        return Curve([int(line["step"]) for line in lines], [float(line[name]) for line in lines])

    def ending(self) -> list[tuple[Line, float]]:
        """The lines of the last tenth of the steps, each with the rows of its batch, to average over rows.

        They cover at least as many rows as the largest batch: the last batch of an epoch may be small.
        """
        rows = self._rows()
        count, largest = math.ceil(len(rows) / 10), max(rows, default=0.0)
        while count < len(rows) and sum(rows[-count:]) < largest:
            count += 1
        return list(zip(self.training, rows, strict=True))[len(rows) - count :]

    def _rows(self) -> list[float]:
        """Rows of each batch, from rows per second or episodes; 1 where a line has neither."""
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
        """All metrics, in the order in which they are written."""
        lines = (*self.training, *self.held_out)
        found = (name for line in lines for name, value in line.items() if name != "step" and value is not None)
        return list(dict.fromkeys(found))


def read_history(folder: str | Path) -> History:
    """Read an output folder. Raises :class:`RunError` if it holds no run, or a damaged one."""
    folder = Path(folder)
    record = read_record(folder)
    training, held_out = list[Line](), list[Line]()
    for line in read_metrics(folder):
        evaluated = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        if evaluated:
            held_out.append({"step": line["step"], **evaluated})
        if len(line) > len(evaluated) + 1:
            training.append({name: value for name, value in line.items() if not name.startswith("eval_")})
    return History(folder, record, training, held_out)


def averages_of(lines: Sequence[tuple[Line, float]]) -> dict[str, float]:
    """Each metric averaged over rows, given lines with their rows; of :data:`PLACES` the last value."""
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
    """Whether a process is training into this folder."""
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
