"""The page of ``prefopt reward-bench``: a section for each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from prefopt.config.tools import ReportConfig
from prefopt.evaluate.bench_rows import REWARD_BENCH_2
from prefopt.evaluate.bench_scores import BenchResult
from prefopt.evaluate.reward_bench import HEAD, RewardBenchReport, cells
from prefopt.reports import page

CAVEATS = (
    "an interval is over the prompts of a benchmark: it does not tell how the reward does on prompts of other kinds",
    "accuracy on a benchmark of rewards does not tell how a model that is trained on the reward turns out",
)


def write_page(report: RewardBenchReport, path: str) -> Path:
    """Write the report as a page. Raises :class:`prefopt.errors.UserError`."""
    sections = [_section(report, result, n) for n, result in enumerate(report.results)]
    config = ReportConfig(output=path, title=f"{report.reward} on {', '.join(r.benchmark for r in report.results)}")
    return page.write_report(config, sections=sections)


def _section(report: RewardBenchReport, result: BenchResult, number: int) -> page.Section:
    sentences = _sentences(report, result)
    rates = [(cells(m)[0], (m.interval.mean, m.interval.low, m.interval.high)) for m in result.measures]
    label = f"Accuracy on {result.benchmark} with intervals; the table has the numbers"
    chance = 0.25 if result.benchmark == REWARD_BENCH_2 else 0.5
    axis = f"accuracy; the line is its 95 % interval, and {chance:.0%} (dotted) is chance"
    values = {
        "title": result.benchmark,
        "sentences": sentences,
        "figure": page.intervals(rates, axis=axis, name=f"bench{number}", label=label, chance=chance),
        "heads": ["prompts of", *HEAD[1:]],
        "rows": [cells(measure) for measure in result.measures],
        "notes": [*result.notes, *report.notes],
        "command": report.command,
    }
    html = page.template("prefopt.reports", "bench.html.j2").render(found=values)
    return page.Section(result.benchmark, f"Benchmark: {result.benchmark}", Markup(html), sentences, CAVEATS)


def _sentences(report: RewardBenchReport, result: BenchResult) -> Sequence[str]:
    if result.overall is None:
        return [f"no overall number on {result.benchmark}"]
    found = result.overall.interval
    return [
        f"{report.reward} has {found.mean:.1%} on {result.benchmark} (95 % interval {found.low:.1%} to"
        f" {found.high:.1%}, {result.rows} rows)"
    ]
