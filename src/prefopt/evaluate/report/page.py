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
from prefopt.evaluate.report.comparison import ComparisonFacts, read_comparison
from prefopt.evaluate.report.facts import RunFacts, facts
from prefopt.evaluate.report.figures import curves, win_rates
from prefopt.evaluate.runs import caveats, differing, labels, shown
from prefopt.train.history import History, read_history

UNKNOWN = "whether the models' own answers got better is not in these numbers: compare samples of them"

JUDGED = (
    "a win rate is what this judge says on these prompts: another judge, or people, may say otherwise",
    "where KL, length or repetition rise with the win rate, it may be a weakness of the judge that was found",
)


def write_report(config: ReportConfig) -> Path:
    """Tell of runs and comparisons in one file. Raises :class:`prefopt.errors.UserError`."""
    runs = [read_history(folder) for folder in config.run]
    comparisons = [read_comparison(name) for name in config.comparisons or ()]
    path = Path(config.output)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half of a surrogate pair, which a data set may hold, has no place in a file.
        replace_file(path, page(runs, comparisons, title=config.title).encode("utf-8", "replace"))
    return path


def page(runs: Sequence[History], comparisons: Sequence[ComparisonFacts] = (), *, title: str | None = None) -> str:
    """The whole page. Whatever comes from runs and their data is escaped by the template engine."""
    names = labels(runs)
    told = facts(runs)
    several = len(runs) > 1
    return template().render(
        title=title or ", ".join(names),
        version=prefopt.__version__,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        verdict=[s for c in comparisons for s in c.sentences] or [verdict(run) for run in told],
        comparisons=[(c, win_rates(c, name=f"rates{n}")) for n, c in enumerate(comparisons)],
        runs=told,
        figures=curves(runs) if any(run.training for run in runs) else [],
        different=[(n.replace("_", "-"), [shown(r.options.get(n)) for r in runs]) for n in differing(runs)]
        if several
        else [],
        caveats=[*(caveats(runs) if several else []), *(JUDGED if comparisons else (UNKNOWN,))],
    )


def verdict(run: RunFacts) -> str:
    """One sentence on one run: what its held-out rows say, or that there are none."""
    values = dict(run.held_out)
    if "loss" not in values:
        return f"{run.name}: no row was held out, so that nothing is known of rows that it was not trained on"
    parts = [f"the loss on held-out rows is {values['loss']} at step {values['step']}"]
    if "rewards/accuracies" in values:
        parts.append(f"{float(values['rewards/accuracies']):.1%} of their pairs are ordered as people did")
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
    found: jinja2.Template = environment.get_template("report.html.j2")
    return found
