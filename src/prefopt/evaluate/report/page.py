"""``prefopt report``: runs as one HTML file that needs no network and no script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

import prefopt
from prefopt.config.report import ReportConfig
from prefopt.disk.write import output_errors, replace_file
from prefopt.evaluate.compare import CompareResult
from prefopt.evaluate.plot import shortened
from prefopt.evaluate.report.comparison import ComparisonFacts, comparison_facts, read_comparison
from prefopt.evaluate.report.facts import RunFacts, facts
from prefopt.evaluate.report.figures import curves, win_rates
from prefopt.evaluate.report.sweep import SweepFacts, is_sweep, sweep_facts
from prefopt.evaluate.runs import caveats, differing, labels, runs_of, shown
from prefopt.train.history import History

UNKNOWN = "whether the models' own answers got better is not in these numbers: compare samples of them"

SWEPT = (
    "a point dominates another by the numbers as they are; only what lies beyond the errors is shown",
    "a sweep tells of these settings, this data and this reward: a road that was tuned better may lie elsewhere",
)
JUDGED = (
    "a win rate is what this judge says on these prompts: another judge, or people, may say otherwise",
    "where KL, length or repetition rise with the win rate, it may be a weakness of the judge that was found",
)


def write_report(config: ReportConfig, results: Sequence[CompareResult] = ()) -> Path:
    """Tell of runs, sweeps and comparisons in one file; ``results`` are comparisons in memory.

    Raises :class:`prefopt.errors.UserError`.
    """
    sweeps = [folder for folder in config.run or () if is_sweep(folder)]
    runs = [run for folder in config.run or () if folder not in sweeps for run in runs_of(folder)]
    comparisons = [read_comparison(name) for name in config.comparisons or ()]
    comparisons += [comparison_facts(result.to_dict()) for result in results]
    swept = [sweep_facts(folder, number=n) for n, folder in enumerate(sweeps)]
    path = Path(config.output)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half of a surrogate pair, which a data set may hold, has no place in a file.
        replace_file(path, page(runs, comparisons, swept, title=config.title).encode("utf-8", "replace"))
    return path


def page(
    runs: Sequence[History],
    comparisons: Sequence[ComparisonFacts] = (),
    sweeps: Sequence[SweepFacts] = (),
    *,
    title: str | None = None,
) -> str:
    """The whole page. Whatever comes from runs and their data is escaped by the template engine."""
    names = [*(labels(runs) if runs else []), *(sweep.name for sweep in sweeps)]
    told = facts(runs)
    several = len(runs) > 1
    title = title or ", ".join(names) or " and ".join(dict.fromkeys(m for c in comparisons for m in c.models))
    return template().render(
        title=title,
        heading=shortened(title, 70),  # of a browser's tab
        version=prefopt.__version__,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        verdict=[s for c in comparisons for s in c.sentences]
        or [*(verdict(run) for run in told), *(s for sweep in sweeps for s in sweep.sentences)],
        sweeps=sweeps,
        comparisons=[(c, win_rates(c, name=f"rates{n}")) for n, c in enumerate(comparisons)],
        runs=told,
        figures=curves(runs),
        different=[(n.replace("_", "-"), [shown(r.options.get(n)) for r in runs]) for n in differing(runs)]
        if several
        else [],
        caveats=[
            *(caveats(runs) if several else []),
            *(JUDGED if comparisons else ()),
            *(SWEPT if sweeps else ()),
            *(() if comparisons or sweeps else (UNKNOWN,)),
        ],
    )


def verdict(run: RunFacts) -> str:
    """One sentence on one run: what its held-out rows say, or that there are none; of PPO what its samples earned."""
    values = dict(run.held_out)
    if run.samples:
        return f"{run.name}: {run.samples}"
    if "loss" not in values:
        return f"{run.name}: no row was held out, so that nothing is known of rows that it was not trained on"
    parts = [f"the loss on held-out rows is {values['loss']} at step {values['step']}"]
    if "rewards/accuracies" in values:
        parts.append(f"{float(values['rewards/accuracies']):.1%} of their pairs are in the order of the data")
    return f"{run.name}: " + "; ".join(parts)


def template() -> jinja2.Template:
    """Autoescaped, and a name that is missing is an error."""
    folder = files("prefopt.evaluate.report")
    sources = {name: (folder / name).read_text("utf-8") for name in ("report.html.j2", "report.css")}
    environment: Any = jinja2.Environment(
        loader=jinja2.DictLoader(sources),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalise"] = _capitalised
    found: jinja2.Template = environment.get_template("report.html.j2")
    return found


def _capitalised(text: str) -> str:
    """The first letter of a sentence large, unless it begins with a name: a path, or a word with a dot or digit."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first in _FIRST_WORDS else text


_FIRST_WORDS = {"no", "responses", "fewer"}
