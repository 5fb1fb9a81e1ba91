"""``prefopt runs``: runs as a list with a line each, sorted, or as JSON or CSV; one in full, two compared.

Losses of different kinds have columns of their own.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.options import nearest
from prefopt.core.terminal import json_text
from prefopt.errors import ConfigError, RunError
from prefopt.runs.diagnose import Accuracy, diagnose, held_out_accuracy
from prefopt.runs.history import RECORD, History
from prefopt.runs.settings import differing_set, set_options, short_path, shown, took, when
from prefopt.runs.table import as_number, caveats, columns, comparison, data_words, describe, find_runs, reached

log = logging.getLogger(__name__)

IN_COLUMNS = ("data", "prompts", "loss", "algorithm", "weighting")
"""Options that the list shows in a column of their own."""
OPTION = 40
"""Most characters of an option's value in the list."""


def show_runs(
    folders: Sequence[str], *, as_json: bool = False, as_csv: bool = False, sort: str | None = None
) -> list[str]:
    """One output folder is described, two are compared, and all other runs are listed, as lines.

    ``sort``: a name of :data:`SORTS` or of an option. Raises :class:`RunError` as :func:`find_runs`, and for a mix of
    output folders and other folders; :class:`ConfigError` for another ``sort``."""
    found = [find_runs(folder) for folder in folders]
    runs = [run for several, _ in found for run in several]
    if sort is not None:
        runs = in_order(runs, sort)
    damaged = [line for _, lines in found for line in lines]
    if as_json or as_csv:
        for line in damaged:
            log.warning("%s", line)
        return json_text([run_as_json(run) for run in runs]).split("\n") if as_json else as_table(runs)
    single = [Path(folder, RECORD).exists() for folder in folders]
    if all(single) and len(folders) < 3:
        return describe(runs[0]) if len(folders) == 1 else comparison(runs)
    if any(single) and not all(single):
        one, other = folders[single.index(False)], folders[single.index(True)]
        remedy = "name output folders to compare, or folders to list"
        raise RunError(f"{one} holds no run of its own, {other} does: {remedy}")
    if not runs:
        return [*(f"no run of prefopt below {folder}" for folder in folders), *damaged]
    base = Path(folders[0]) if len(folders) == 1 else None
    notes = [f"note: {line}" for line in caveats(runs)] if all(single) else []
    return [*list_of(runs, base), *damaged, *notes]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the list shows of a run. ``loss`` is the lowest on held-out rows, ``reward`` the average over the last tenth
    of the steps, ``options`` those that are set to another value than their default."""

    run: History
    accuracy: Accuracy | None
    loss: float | None
    reward: float | None
    options: Mapping[str, Any]

    @property
    def held_out(self) -> str:
        """The accuracy with its interval."""
        a = self.accuracy
        return "-" if a is None else f"{a.share:.0%} [{a.low:.0%}, {a.high:.0%}] of {a.rows:,}"

    @property
    def status(self) -> str:
        run = self.run
        return run.status if run.step == run.steps else f"{run.status}, step {run.step} of {run.steps or '?'}"


def facts_of(run: History) -> Facts:
    values = reached(run)
    return Facts(
        run,
        held_out_accuracy(run),
        values["held_out"].get("loss"),
        values["training"].get("objective/scores"),
        set_options(run),
    )


def list_of(runs: Sequence[History], base: Path | None) -> list[str]:
    """A line per run, its name below ``base``."""
    return columns(cells_of(runs, [_name(run, base) for run in runs]))


def cells_of(runs: Sequence[History], names: Sequence[str]) -> list[list[str]]:
    """The titles of the list, then the cells of each run. Options are listed where they are set and differ."""
    every = [facts_of(run) for run in runs]
    rows = [["run", "method", "started", "took"]]
    own = zip(names, runs, strict=True)
    rows += [[name, run.label, when(run.record.get("started")), took(run)] for name, run in own]
    more: list[tuple[str, Callable[[Facts], str]]] = [("data", lambda f: data_words(f.run))]
    if any(f.accuracy for f in every):
        more.append(("held-out accuracy", lambda f: f.held_out))
    for kind in _kinds_to_show(every):
        more.append((f"held-out {kind}", lambda f, kind=kind: as_number(_loss(f, kind))))  # type: ignore[misc]
    if any(f.reward is not None for f in every):
        more.append(("reward of samples", lambda f: as_number(f.reward)))
    more.append(("status", lambda f: f.status))
    if names := names_to_list(runs):
        more.append(("options set", lambda f: options_words(f, names)))
    for title, cell in more:
        for row, text in zip(rows, [title, *map(cell, every)], strict=True):
            row.append(text)
    return rows


def names_to_list(runs: Sequence[History]) -> list[str]:
    """The options that are listed: set by some run, different, and in no column of their own."""
    return [name for name in differing_set(runs) if name not in IN_COLUMNS]


def _kinds_to_show(every: Sequence[Facts]) -> list[str]:
    """The kinds of loss that get a column: the only one, else those of runs without an accuracy."""
    known = [f for f in every if f.loss is not None]
    kinds = list(dict.fromkeys(f.run.loss_kind for f in known))
    return kinds if len(kinds) == 1 else [k for k in kinds if any(f.accuracy is None for f in known if _is(f, k))]


def _is(f: Facts, kind: str) -> bool:
    return f.run.loss_kind == kind


def _loss(f: Facts, kind: str) -> float | None:
    return f.loss if _is(f, kind) else None


def options_words(f: Facts, names: Sequence[str]) -> str:
    """Those of the options ``names`` that a run sets: ``beta=0.3 epochs=2``."""
    own = {name: f.options[name] for name in names if name in f.options}
    return " ".join(f"{name}={_value(value)}" for name, value in own.items()) or "-"


def _value(value: Any) -> str:
    text = shown([short_path(v) for v in value] if isinstance(value, list) else short_path(value))
    return text if len(text) <= OPTION else f"{text[: OPTION - 1]}…"


def _name(run: History, base: Path | None) -> str:
    return str(run.folder if base is None else run.folder.relative_to(base))


# -- sorting ---------------------------------------------------------------------------------------------------

SORTS: Mapping[str, Callable[[Facts], Any]] = {
    "started": lambda f: f.run.record.get("started"),
    "name": lambda f: str(f.run.folder),
    "method": lambda f: f.run.label,
    "took": lambda f: f.run.seconds,
    "status": lambda f: f.run.status,
    "accuracy": lambda f: None if f.accuracy is None else -f.accuracy.share,
    "loss": lambda f: None if f.loss is None else (f.run.loss_kind, f.loss),
    "reward": lambda f: None if f.reward is None else -f.reward,
}
"""Orders of the list: accuracy and reward from the best, loss within its kind. Runs without the value come last."""


def in_order(runs: Sequence[History], sort: str) -> list[History]:
    """Runs sorted by a name of :data:`SORTS`, or by an option. Raises :class:`ConfigError` for another name."""
    name = sort.replace("-", "_")
    known = {name for run in runs for name in run.options}
    if sort not in SORTS and name not in known:
        near = nearest(sort, [*SORTS, *sorted(known)]) or f"; there are {', '.join(SORTS)}, and options"
        raise ConfigError(f"--sort {sort}: no run has it{near}")
    key = SORTS.get(sort) or (lambda f: _comparable(f.run.options.get(name)))
    every = [(facts, key(facts)) for facts in map(facts_of, runs)]
    return [f.run for f, _ in sorted(every, key=lambda pair: (pair[1] is None, pair[1] if pair[1] is not None else 0))]


def _comparable(value: Any) -> tuple[bool, float, str] | None:
    """Numbers before text."""
    if value is None:
        return None
    number = isinstance(value, int | float) and math.isfinite(value)
    return (not number, float(value) if number else 0.0, "" if number else shown(value))


# -- for programs ----------------------------------------------------------------------------------------------


def run_as_json(run: History) -> dict[str, Any]:
    """A run for programs; ``options`` are all, ``set`` those that differ from their default."""
    a = held_out_accuracy(run)
    interval = None if a is None else {"share": a.share, "low": a.low, "high": a.high, "rows": a.rows, "step": a.step}
    return {
        "folder": str(run.folder),
        "method": run.record.get("method"),
        "algorithm": run.algorithm,
        "loss": run.loss_kind,
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "started": run.record.get("started"),
        "finished": run.record.get("finished"),
        "seconds": run.seconds,
        "options": dict(run.options),
        "set": set_options(run),
        "held_out_accuracy": interval,
        **reached(run),
        "findings": [{"name": f.name, "text": f.text, "look": f.look} for f in diagnose(run)],
    }


def as_table(runs: Sequence[History]) -> list[str]:
    """Lines of CSV: a row per run, a column per kind of loss and per option that some run sets."""
    every = [facts_of(run) for run in runs]
    kinds = list(dict.fromkeys(f.run.loss_kind for f in every if f.loss is not None))
    names = list(dict.fromkeys(name for f in every for name in f.options))
    rows = []
    for f in every:
        run, a = f.run, f.accuracy
        row: dict[str, Any] = {
            "folder": str(run.folder),
            "method": run.method,
            "loss": run.loss_kind,
            "status": run.status,
            "step": run.step,
            "steps": run.steps,
            "started": run.record.get("started"),
            "finished": run.record.get("finished"),
            "seconds": run.seconds,
            "rows": run.rows.get("kept"),
            "held_out_rows": a.rows if a else None,
            "held_out_accuracy": a.share if a else None,
            "held_out_accuracy_low": a.low if a else None,
            "held_out_accuracy_high": a.high if a else None,
            **{f"held_out_loss {kind}": _loss(f, kind) for kind in kinds},
            "reward_of_samples": f.reward,
        }
        option = {n: f.options[n] for n in names if n in f.options}
        rows.append(row | {f"option {n}": shown(option[n]) if n in option else None for n in names})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["folder"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().splitlines()
