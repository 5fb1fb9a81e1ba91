r"""Runs in the terminal: a list, one run, or a comparison of several, and curves of Braille characters.

>>> from prefopt.runs.history import Curve
>>> print("\n".join(chart(Curve([1, 2, 3, 4], [1.0, 0.5, 0.25, 0.125]), width=22, height=3)))
    1 ⠑⠢⢄⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀
      ⠀⠀⠀⠉⠒⠤⣀⣀⠀⠀⠀⠀⠀⠀⠀⠀
0.125 ⠀⠀⠀⠀⠀⠀⠀⠀⠉⠉⠒⠒⠤⠤⢄⣀
      step 1         4
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from prefopt.config.dpo import DpoConfig
from prefopt.config.methods import STAGES
from prefopt.core.options import options
from prefopt.errors import RunError
from prefopt.runs.diagnose import diagnose, in_words
from prefopt.runs.history import RECORD, Curve, History, averages_of, read_history
from prefopt.runs.settings import differing, of_one_method, set_options, short_path, shown, took, when

CLOCK = ("step", "step_seconds", "tokens", "epoch", "learning_rate")
"""Metrics of progress, not of results."""
WIDTH = 72
CHAIN = "stages.json"
"""File of ``prefopt rlhf`` beside the folders of its stages."""


def find_runs(folder: str | Path) -> tuple[list[History], list[str]]:
    """The run in ``folder``, or all runs below it by start time; and a line for each damaged one. Raises
    :class:`RunError` for an absent folder, or if the run in ``folder`` itself is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; name an output folder, or one above some")
    if (folder / RECORD).exists():
        return [read_history(folder)], []
    found, damaged = [], []
    for path in sorted(folder.rglob(RECORD)):
        try:
            found.append(read_history(path.parent))
        except RunError as error:
            damaged.append(str(error))

    def order(run: History) -> tuple[str, int]:
        name = run.folder.name  # stages of a chain may start within a second
        return str(run.record.get("started", "")), STAGES.index(name) if name in STAGES else -1

    return sorted(found, key=order), damaged


def runs_of(folder: str | Path) -> list[History]:
    """The run in an output folder, or the stages of ``prefopt rlhf``. Raises :class:`RunError` for any other folder."""
    folder = Path(folder)
    if (folder / RECORD).exists():
        return [read_history(folder)]
    if (folder / CHAIN).exists() and (stages := [s for s in STAGES if (folder / s / RECORD).exists()]):
        return [read_history(folder / stage) for stage in stages]
    below = sorted(path.parent for path in folder.rglob(RECORD))
    if not below:
        return [read_history(folder)]  # raises
    many = f"{len(below)} runs" if len(below) > 1 else "a run"
    raise RunError(f"{folder} holds no run of its own, but {many} below it: name output folders, such as {below[0]}")


def describe(run: History) -> list[str]:
    """One run: status, the curve of its loss, and what its metrics show."""
    facts = {name: value for name, value in summary(run).items() if name != "data"}
    facts |= {"data": shown(run.options.get("data", run.options.get("prompts")))}
    facts |= {"options set": " ".join(f"{n}={shown(v)}" for n, v in set_options(run).items() if n not in facts)}
    lines = columns([[f"{name}:", value] for name, value in facts.items() if value])
    curve, held_out = run.curve("loss"), run.curve("loss", held_out=True)
    title = f"loss of training batches{f', and {MARK} of held-out rows' if held_out else ''}"
    if scores := run.curve("objective/scores"):  # the loss of such a run is not informative
        curve, title = scores, "reward of the policy's samples"
    if len(curve.steps) > 1:
        lines += ["", *chart(curve, held_out, title=title, width=WIDTH)]
    findings = in_words(diagnose(run))
    return [*lines, "", *findings] if findings else lines


def reached(run: History) -> dict[str, dict[str, float]]:
    """``training``: metrics averaged over the rows of the last tenth of the steps. ``held_out``: the metrics and the
    ``step`` of the evaluation with the lowest loss."""
    training = {n: value for n, value in averages_of(run.ending()).items() if n not in CLOCK}
    scored = [line for line in run.held_out if line.get("loss") is not None]
    best = min(scored, key=lambda line: float(line["loss"]), default={})
    return {"training": training, "held_out": {n: float(value) for n, value in best.items() if value is not None}}


def steps_words(run: History) -> str:
    return f"{run.step}" if run.steps in (None, run.step) else f"{run.step} of {run.steps}"


def comparison(runs: Sequence[History]) -> list[str]:
    """Options that differ, and metrics, with a column per run."""
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
        rows = [[name, *map(as_number, values)] for name, values in side_by_side(runs, [f[side] for f in found])]
        if rows:
            lines += ["", title, *columns([["", *names], *rows], indent=2)]
    return lines + [f"note: {line}" for line in caveats(runs)]


PER_KIND = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
"""Metrics whose numbers compare only between losses of one kind."""


def side_by_side(
    runs: Sequence[History], values: Sequence[Mapping[str, float]]
) -> list[tuple[str, list[float | None]]]:
    """Each metric with its value in every run. Where runs have losses of several kinds, each kind has a row of its
    own."""
    kinds = list(dict.fromkeys(run.loss_kind for run in runs))
    found: list[tuple[str, list[float | None]]] = []
    for name in dict.fromkeys(name for one in values for name in one):
        for kind in kinds if len(kinds) > 1 and name in PER_KIND else [None]:
            of = zip(runs, values, strict=True)
            row = [one.get(name) if kind in (None, run.loss_kind) else None for run, one in of]
            if any(value is not None for value in row):
                found.append((name if kind is None else f"{name} ({kind})", row))
    return found


def caveats(runs: Sequence[History]) -> list[str]:
    """Why numbers of these runs may not be comparable."""
    found = []
    of_the_loss = {o.name for o in options(DpoConfig) if o.group == "loss"}
    if parts := [name for name in differing(runs) if name in of_the_loss]:
        verb = "changes" if len(parts) == 1 else "change"
        found.append(f"{', '.join(parts)} {verb} the loss: compare accuracies or samples, not losses")
    if not of_one_method(runs):
        found.append("the runs are of different methods: their metrics are not comparable")
    elif len({run.record.get("data") for run in runs}) > 1:
        found.append("the runs have different data or held-out rows")
    if len({run.record.get("reference") for run in runs}) > 1:
        found.append("the runs have different references: rewards and log-ratios are not comparable")
    if rough := [label for label, run in zip(labels(runs), runs, strict=True) if run.status != "finished"]:
        found.append(f"not finished: {', '.join(rough)}")
    return found


def labels(runs: Sequence[History]) -> list[str]:
    """Short distinct names: the ends of the paths."""
    parts = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({i})" for i, p in enumerate(parts, 1)]


def what_differs(runs: Sequence[History]) -> list[str]:
    """A name per run for a legend: the options that differ, or else the ends of the paths."""
    different = differing(runs)
    titles = {name: name.replace("_", " ") for name in different}
    names = [", ".join(f"{title} {shown(run.options.get(n))}" for n, title in titles.items()) for run in runs]
    short = of_one_method(runs) and len(different) <= 3 and len(set(names)) == len(names) and all(names)
    return names if short else labels(runs)


def columns(rows: Sequence[Sequence[str]], *, indent: int = 0) -> list[str]:
    """Rows of cells as aligned lines; the last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [" " * indent + line.rstrip() for line in padded]


def as_number(value: float | None) -> str:
    """A metric with four digits; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def summary(run: History) -> Mapping[str, str]:
    """Method, status, steps, times, model and data of a run, for a reader: dates to the minute, paths by their ends."""
    values = {
        "method": run.label,
        "status": run.status,
        "steps": steps_words(run),
        "started": when(run.record.get("started")),
        "finished": when(run.record.get("finished")),
        "took": took(run),
        "model": short_path(run.options.get("model")),
        "data": data_words(run),
    }
    return {name: str(value) for name, value in values.items() if value not in (None, "-")}


def data_words(run: History) -> str:
    """The names of a run's files, without their folders, and the rows that were kept: ``pairs.jsonl, 590 rows``."""
    value = run.options.get("data") or run.options.get("prompts") or []
    names = [short_path(name) for name in (value if isinstance(value, list) else [value])]
    text = names[0] if len(names) == 1 else f"{len(names)} files" if names else "-"
    kept = run.rows.get("kept")
    return text if kept is None else f"{text}, {kept:,} rows"


# Bits of a Braille character by row, from the top, and column.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
MARK = "●"
NO_CURVE = Curve([], [])


def chart(
    curve: Curve, marks: Curve = NO_CURVE, *, title: str = "", unit: str = "step", width: int = 60, height: int = 8
) -> list[str]:
    """``curve`` as lines of Braille characters, with ``marks`` (held-out points) as ●, ``width`` by ``height``.

    Steps that share a column of dots are averaged. A curve without points gives only the title.
    """
    lines = [title] if title else []
    finite, others = ([p for p in zip(c.steps, c.values, strict=True) if math.isfinite(p[1])] for c in (curve, marks))
    if not finite:
        return lines
    seen = [y for _, y in finite + others]
    low, high = min(seen), max(seen)
    names = _numbers(high, low)
    room = max(4, width - len(names[0]) - 1)
    first, last = min(x for x, _ in finite + others), max(x for x, _ in finite + others)
    across, down = 2 * room - 1, 4 * height - 1

    def place(x: float, y: float) -> tuple[int, int]:
        column = round((x - first) / (last - first) * across) if last > first else 0
        row = round((high - y) / (high - low) * down) if high > low else down // 2
        return column, row

    cells = [[0] * room for _ in range(height)]
    rows: dict[int, list[int]] = {}
    for column, row in (place(x, y) for x, y in finite):
        rows.setdefault(column, []).append(row)
    means = [(column, round(sum(many) / len(many))) for column, many in sorted(rows.items())]
    for start, end in pairwise([means[0], *means]):
        for c, r in _line(start, end):
            cells[r // 4][c // 2] |= DOTS[r % 4][c % 2]
    signs = [[chr(0x2800 + bits) for bits in line] for line in cells]
    for column, row in (place(x, y) for x, y in others):
        signs[row // 4][column // 2] = MARK
    margins = [names[0], *[" " * len(names[0])] * (height - 2), names[1]] if height > 1 else [names[0]]
    lines += [f"{name} {''.join(line)}" for name, line in zip(margins, signs, strict=True)]
    left, right = f"{unit} {first}", f"{last}"
    return [*lines, " " * (len(names[0]) + 1) + left + right.rjust(room - len(left))]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line."""
    across, down = end[0] - start[0], end[1] - start[1]
    steps = max(abs(across), abs(down), 1)
    return [(round(start[0] + across * i / steps), round(start[1] + down * i / steps)) for i in range(steps + 1)]


def _numbers(high: float, low: float) -> tuple[str, str]:
    """The ends of an axis, equally wide, with as many digits as tell them apart."""
    digits = 3
    while f"{high:.{digits}g}" == f"{low:.{digits}g}" and high != low and digits < 9:
        digits += 1
    top, bottom = f"{high:.{digits}g}", f"{low:.{digits}g}"
    width = max(len(top), len(bottom))
    return top.rjust(width), bottom.rjust(width)
