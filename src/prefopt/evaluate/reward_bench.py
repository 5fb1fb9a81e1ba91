"""``prefopt reward-bench``: a reward on the files of benchmarks of rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import prefopt
from prefopt.config.reward_bench import RewardBenchConfig
from prefopt.config.scoring import IMPLICIT
from prefopt.core.files import OVERWRITE, output_errors, refuse_existing, write_json
from prefopt.core.options import command
from prefopt.core.shown import ShownLines
from prefopt.core.statistics import Interval
from prefopt.evaluate.bench_rows import BenchRow, BenchRows, read_rows
from prefopt.evaluate.bench_scores import BenchMeasure, BenchResult, results_of
from prefopt.evaluate.score import BATCH, RowScorer, load_row_scorer
from prefopt.runs.table import columns

HEAD = ("", "accuracy", "95 % interval", "prompts", "ties")


@dataclass(frozen=True, repr=False)
class RewardBenchReport(ShownLines):
    """The numbers of a reward on every benchmark among the files, and the ``scores`` of every row's answers, the right
    ones first. ``truncated`` rows were too long for a model."""

    reward: str
    results: list[BenchResult]
    rows: list[BenchRow]
    scores: list[tuple[float, ...]]
    truncated: int
    notes: list[str]
    command: str

    def lines(self) -> list[str]:
        """The tables that ``prefopt reward-bench`` prints."""
        lines = []
        for result in self.results:
            lines += [f"{result.benchmark}: {result.rows} rows, reward {self.reward}"]
            lines += columns([HEAD, *map(cells, result.measures)])
            lines += [f"note: {note}" for note in result.notes] + [""]
        return [*lines, *(f"note: {note}" for note in self.notes)] if self.notes else lines[:-1]

    def to_dict(self, *, with_scores: bool = True) -> dict[str, Any]:
        """As plain values, for JSON."""
        found: dict[str, Any] = {
            "reward": self.reward,
            "prefopt": prefopt.__version__,
            "command": self.command,
            "results": [asdict(result) for result in self.results],
            "truncated": self.truncated,
            "notes": self.notes,
        }
        if with_scores:
            found["scores"] = [
                {
                    "benchmark": row.benchmark,
                    "subset": row.subset,
                    "id": row.id,
                    "file": row.file,
                    "row": row.row,
                    "chosen": list(scores[: len(row.chosen)]),
                    "rejected": list(scores[len(row.chosen) :]),
                }
                for row, scores in zip(self.rows, self.scores, strict=True)
            ]
        return found


def cells(measure: BenchMeasure) -> tuple[str, str, str, str, str]:
    """A number as the cells of a table with :data:`HEAD`."""
    found: Interval = measure.interval
    name = measure.name if measure.kind == "subset" else f"{measure.name} ({measure.kind})"
    return (
        name,
        f"{found.mean:.1%}",
        f"{found.low:.1%} to {found.high:.1%}",
        f"{found.count:,}",
        str(measure.ties) if measure.ties else "-",
    )


def run(config: RewardBenchConfig) -> RewardBenchReport:
    """Score the answers of all rows and count. Raises :class:`prefopt.errors.UserError`; ``output`` is written, the
    page is not (:mod:`prefopt.reports.bench`)."""
    for name in (config.output, config.html):
        if name is not None:
            refuse_existing(Path(name), OVERWRITE, unless=config.overwrite)
    rows = read_rows(config.data, skip=config.on_bad_row == "skip")
    scorer = load_row_scorer(config)
    scores = list(_scores(rows.rows, scorer))
    report = RewardBenchReport(
        _name(config),
        results_of(list(zip(rows.rows, scores, strict=True))),
        rows.rows,
        scores,
        scorer.truncated,
        _notes(rows, scorer),
        command("reward-bench", config),
    )
    if config.output is not None:
        path = Path(config.output)
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report.to_dict())
    return report


def _name(config: RewardBenchConfig) -> str:
    if config.reward != IMPLICIT:
        return config.reward
    reference = config.reference or "the model without it"
    return f"{config.beta:g} log({config.adapter or config.model} / {reference})"


def _notes(rows: BenchRows, scorer: RowScorer) -> list[str]:
    notes = [rows.left_out] if rows.left_out else []
    if scorer.truncated:
        notes.append(f"{scorer.truncated} rows truncated to what the model takes")
    return notes


def _scores(rows: Sequence[BenchRow], scorer: RowScorer) -> Iterator[tuple[float, ...]]:
    """The scores of each row's answers, in order."""
    left = iter(rows)
    while batch := list(islice(left, BATCH)):
        yield from scorer([row.comparison() for row in batch])
