"""``prefopt report``: runs as one HTML file that needs no network and no script."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

import prefopt
from prefopt.config.rlhf import METHODS, read_options
from prefopt.config.tools import ReportConfig
from prefopt.core.files import output_errors, replace_file
from prefopt.core.options import command, options
from prefopt.errors import UserError
from prefopt.evaluate.result import CompareResult
from prefopt.reports.comparison import ComparisonFacts, comparison_facts, read_comparison
from prefopt.reports.figures import curves, win_rates
from prefopt.reports.sweep import SweepFacts, is_sweep, sweep_facts
from prefopt.runs.diagnose import diagnose
from prefopt.runs.history import History
from prefopt.runs.plot import shortened
from prefopt.runs.table import as_number, caveats, differing, labels, reached, runs_of, shown, summary
from prefopt.runs.trends import Finding

Row = tuple[str, str]
"""A name and its value."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An option as the run had it; ``given``: it was not left at its default."""

    name: str
    value: str
    given: bool


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run. ``command`` starts it again, and is empty where its options are not those of this version. ``samples``
    says what a run that learns from samples of its own earned, and is empty for others."""

    name: str
    summary: Mapping[str, str]
    happened: Sequence[Finding]
    look: Sequence[Finding]
    held_out: Sequence[Row]
    training: Sequence[Row]
    data: Sequence[Row]
    identity: Sequence[Row]
    settings: Sequence[Setting]
    environment: Mapping[str, Mapping[str, str]]
    command: str
    samples: str


def facts(runs: Sequence[History]) -> list[RunFacts]:
    """The facts of each run, under names that tell the runs apart."""
    return [_facts(run, name) for run, name in zip(runs, labels(runs), strict=True)]


def _facts(run: History, name: str) -> RunFacts:
    found, values = diagnose(run), reached(run)
    return RunFacts(
        name=name,
        summary=summary(run),
        happened=[f for f in found if not f.look],
        look=[f for f in found if f.look],
        held_out=[(key, as_number(value)) for key, value in values["held_out"].items()],
        training=[(key, as_number(value)) for key, value in values["training"].items()],
        data=_data(run),
        identity=_identity(run),
        settings=_settings(run),
        environment=run.record.get("environment", {}),
        command=_command(run),
        samples=_samples(run),
    )


def _data(run: History) -> list[Row]:
    """Where the rows come from, how many there were, and what became of them."""
    rows = run.rows
    told = [("files", shown(run.options.get("data", run.options.get("prompts"))))]
    told += [("held-out files", shown(value))] if (value := run.options.get("eval_data")) else []
    told += [(f"rows {key}", f"{value:,}") for key, value in rows.items()]
    if {"read", "kept"} <= rows.keys():
        told.append(("rows refused and left out", f"{rows['read'] - rows['kept']:,}"))
    if value := run.record.get("max_length"):
        told.append(("longest sequence", f"{value} tokens"))
    return told


def _identity(run: History) -> list[Row]:
    """Hashes: two runs that agree in one had the same."""
    names = {"reference": "reference model", "data": "training and held-out tokens"}
    return [(title, str(run.record[key])) for key, title in names.items() if run.record.get(key)]


def _settings(run: History) -> list[Setting]:
    defaults = {o.name: o.default for o in options(METHODS[run.method])} if run.method in METHODS else {}
    return [
        Setting(name.replace("_", "-"), shown(value), name not in defaults or value != defaults[name])
        for name, value in run.options.items()
    ]


def _command(run: History) -> str:
    try:
        return command(run.method, read_options(run.method, run.options)) if run.method in METHODS else ""
    except UserError:
        return ""


def _samples(run: History) -> str:
    scores, ending = run.curve("objective/scores").values, reached(run)["training"]
    if not scores or "objective/scores" not in ending:
        return ""
    far = f", at {ending['objective/kl']:.3g} nats from the reference" if "objective/kl" in ending else ""
    return (
        f"the reward of its own samples was {scores[0]:.3g} in the first step and is {ending['objective/scores']:.3g}"
        f" over the last tenth of the steps{far}; this is the reward that it was trained on"
    )


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
    folder = files("prefopt.reports")
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
