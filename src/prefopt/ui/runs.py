"""The runs below a folder, read again when their files change, as rows of a table and as curves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.core.files import printable
from prefopt.errors import RunError
from prefopt.runs.history import METRICS, RECORD, History, in_use, read_history
from prefopt.runs.listing import Facts, facts_of, names_to_list, options_words
from prefopt.runs.plot import EXACT, SIDES, along, in_words, panels_by_method, smoothed, with_line
from prefopt.runs.settings import took, when
from prefopt.runs.table import as_number, data_words
from prefopt.ui.feed import PACE, Event

SKIPPED = ("checkpoints", "last-good", "cache")
"""Folders inside a run that hold no other run."""
DEEPEST = 6
"""Levels of folders that are looked through."""
PATIENCE = 5.0
"""A run that is long to read is read again after so many times the time that it takes."""
MOST_POINTS = 400
"""Points of a curve that are sent: more than a screen can show."""


def files_below(base: Path, name_ends: Sequence[str]) -> Iterator[Path]:
    """Files whose names end so, outside of checkpoints and hidden folders, in order. Links that lead out of ``base``
    are left out: those of a folder from elsewhere may name any file."""
    inside = base.resolve()
    for place, folders, names in os.walk(base):
        deep = len(Path(place).relative_to(base).parts)
        kept = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED)
        folders[:] = kept if deep < DEEPEST else []
        for path in (Path(place) / name for name in sorted(names) if name.endswith(tuple(name_ends))):
            if not path.is_symlink() or path.resolve().is_relative_to(inside):
                yield path


@dataclass(slots=True)
class _KnownRun:
    """A run as last read. ``stamp`` is of its files, ``after``: when it may be read again."""

    stamp: tuple[object, ...]
    running: bool
    facts: Facts | None
    problem: str = ""
    after: float = 0.0


@dataclass(slots=True)
class Runs:
    """All runs below ``base``, by their path from there (``.`` for a run in ``base`` itself)."""

    base: Path
    _known: dict[str, _KnownRun] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _looked: float = -PACE
    version: int = 0
    """Grows with every change that a look has found."""
    _table: tuple[int, float, list[dict[str, Any]]] = (-1, 0.0, [])

    def look(self) -> dict[str, Facts]:
        """The runs as they are, at most :data:`PACE` seconds old."""
        with self._turn:
            if time.monotonic() - self._looked >= PACE * 0.8:
                self._read()
                self._looked = time.monotonic()
            return {name: known.facts for name, known in self._known.items() if known.facts is not None}

    def run(self, name: str) -> History | None:
        found = self.look().get(name)
        return None if found is None else found.run

    def damaged(self) -> list[str]:
        """A line for each run that cannot be read."""
        return [known.problem for known in self._known.values() if known.problem]

    def table(self) -> tuple[int, list[dict[str, Any]]]:
        """The rows of the table, and the version that they show: of many runs they may be a few seconds old."""
        found, now = self.look(), time.monotonic()
        with self._turn:
            shown, after, rows = self._table
            if shown != self.version and now >= after:
                shown, rows = self.version, rows_of(found)
                self._table = shown, now + PATIENCE * (time.monotonic() - now), rows
            return shown, rows

    def _read(self) -> None:
        there = {}
        for path in files_below(self.base, [RECORD]):
            if path.name == RECORD:
                there[str(path.parent.relative_to(self.base))] = path.parent
        gone = self._known.keys() - there.keys()
        for name in gone:
            del self._known[name]
        changed = bool(gone)
        for name, folder in there.items():
            changed |= self._read_one(name, folder)
        self.version += changed

    def _read_one(self, name: str, folder: Path) -> bool:
        before, now = self._known.get(name), time.monotonic()
        finished = before is not None and before.facts is not None and before.facts.run.status == "finished"
        stamp, running = _stamp(folder), not finished and in_use(folder)
        if before is not None and (before.after > now or (before.stamp == stamp and before.running == running)):
            return False
        try:
            facts, problem = facts_of(read_history(folder)), ""
        except RunError as error:
            facts, problem = None, str(error)
        ended = time.monotonic()
        self._known[name] = _KnownRun(stamp, running, facts, problem, ended + PATIENCE * (ended - now))
        return True


def _stamp(folder: Path) -> tuple[object, ...]:
    found: list[object] = []
    for name in (RECORD, METRICS):
        try:
            about = (folder / name).stat()
            found += [about.st_mtime_ns, about.st_size]
        except OSError:
            found.append(None)
    return tuple(found)


# -- the table -----------------------------------------------------------------------------------------------------


def rows_of(found: Mapping[str, Facts]) -> list[dict[str, Any]]:
    """A row for each run: text for the eye, and numbers to sort by. A loss stands with its kind."""
    names = names_to_list([f.run for f in found.values()])
    return [printable(_row(name, facts, names)) for name, facts in found.items()]


def _row(name: str, f: Facts, options: Sequence[str]) -> dict[str, Any]:
    run, a = f.run, f.accuracy
    return {
        "name": name,
        "method": run.label,
        "kind": run.loss_kind,
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "started": when(run.record.get("started")),
        "took": took(run),
        "seconds": run.seconds,
        "data": data_words(run),
        "accuracy": None if a is None else a.share,
        "held_out": f.held_out,
        "loss": f.loss,
        "loss_words": "-" if f.loss is None else as_number(f.loss),
        "reward": f.reward,
        "reward_words": as_number(f.reward),
        "options": options_words(f, options),
    }


@dataclass(slots=True)
class TableTopic:
    """The table, whole, whenever a run has changed."""

    runs: Runs
    _sent: int = -1

    def changes(self) -> list[Event]:
        version, rows = self.runs.table()
        if self._sent == version:
            return []
        self._sent = version
        return [("runs", {"rows": rows, "damaged": self.runs.damaged()})]


# -- curves --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class CurvesTopic:
    """The panels of some runs, whenever one of them has changed."""

    runs: Runs
    names: Sequence[str]
    x: str = "step"
    _sent: int = -1

    def changes(self) -> list[Event]:
        found = self.runs.look()
        if self._sent == self.runs.version:
            return []
        self._sent = self.runs.version
        shown = {name: found[name].run for name in self.names if name in found}
        return [("curves", {"runs": list(shown), "panels": panels_of(shown, self.x)})]


def panels_of(runs: Mapping[str, History], x: str = "step") -> list[dict[str, Any]]:
    """The panels of ``prefopt report``, as numbers: one for each kind of loss, never two kinds on one axis."""
    places = {id(run): place for place, run in enumerate(runs.values())}
    found = []
    for panel, several in panels_by_method(list(runs.values())):
        panel = with_line(panel, several)
        series = [s for run in several for s in _series(run, panel.name, panel.sides, x, places[id(run)])]
        if series:
            about = {"title": panel.title, "unit": panel.unit, "line": panel.line, "line_name": panel.line_name}
            found.append({**about, "words": in_words(panel, several), "series": series})
    return found


def _series(run: History, name: str, sides: bool, x: str, place: int) -> Iterator[dict[str, Any]]:
    for side in SIDES if sides else ("",):
        metric = f"{name}/{side}" if side else name
        curve, marks = run.curve(metric), run.curve(metric, held_out=True)
        if not curve and not marks:
            continue
        values = curve.values if name in EXACT else smoothed(curve.values)
        points = list(zip(along(run, curve, x), values, strict=True))
        held_out = list(zip(along(run, marks, x), marks.values, strict=True))
        yield {"run": place, "side": side, "points": thinned(points), "marks": thinned(held_out)}


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` of the points, evenly, the first and the last among them.

    >>> thinned([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], 3)
    [(0, 1), (2, 3), (4, 5)]
    """
    if len(points) <= most:
        return list(points)
    return [points[round(k * (len(points) - 1) / (most - 1))] for k in range(most)]
