"""``prefopt report``: an HTML file on runs and comparisons, without scripts and without network access."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import prefopt
from prefopt.config.methods import METHODS, read_options
from prefopt.config.tools import ReportConfig
from prefopt.core.files import output_errors, replace_file
from prefopt.core.options import command, options
from prefopt.errors import UserError
from prefopt.evaluate.result import CompareResult
from prefopt.reports.comparison import ComparisonReport, comparison_report, read_comparison
from prefopt.reports.figures import curves, win_rates
from prefopt.runs.diagnose import Finding, diagnose
from prefopt.runs.history import History
from prefopt.runs.plot import shortened
from prefopt.runs.table import as_number, caveats, differing, labels, reached, runs_of, shown, summary

Row = tuple[str, str]
"""A name and its value."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An option of a run; ``given``: it differs from the default."""

    name: str
    value: str
    given: bool


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run. ``command`` repeats it, empty where this version has other options. ``samples`` is a sentence on the
    reward of a run that learns from its own samples, else empty."""

    name: str
    summary: Mapping[str, str]
    findings: Sequence[Finding]
    warnings: Sequence[Finding]
    held_out: Sequence[Row]
    training: Sequence[Row]
    data: Sequence[Row]
    identity: Sequence[Row]
    settings: Sequence[Setting]
    environment: Mapping[str, Mapping[str, str]]
    command: str
    samples: str


@dataclass(frozen=True, slots=True)
class Section:
    """A section rendered elsewhere: ``html`` is inserted unescaped, ``sentences`` stand at the top of the page."""

    name: str
    html: Markup
    sentences: Sequence[str]
    caveats: Sequence[str]


def run_report(run: History, name: str) -> RunReport:
    """What the page shows of a run, under a ``name`` that distinguishes it from the others."""
    found, values = diagnose(run), reached(run)
    return RunReport(
        name=name,
        summary=summary(run),
        findings=[f for f in found if not f.look],
        warnings=[f for f in found if f.look],
        held_out=[(key, as_number(value)) for key, value in values["held_out"].items()],
        training=[(key, as_number(value)) for key, value in values["training"].items()],
        data=_data(run),
        identity=[(title, str(run.record[key])) for key, title in HASHED.items() if run.record.get(key)],
        settings=_settings(run),
        environment=run.record.get("environment", {}),
        command=_command(run),
        samples=_samples(run),
    )


def _data(run: History) -> list[Row]:
    rows, options = run.rows, run.options
    found = [("files", shown(options.get("data", options.get("prompts"))))]
    found += [("held-out files", shown(value))] if (value := options.get("eval_data")) else []
    found += [(f"rows {key}", f"{value:,}") for key, value in rows.items()]
    if {"read", "kept"} <= rows.keys():
        found.append(("rows refused and skipped", f"{rows['read'] - rows['kept']:,}"))
    if value := run.record.get("max_length"):
        found.append(("longest sequence", f"{value} tokens"))
    return found


def _settings(run: History) -> list[Setting]:
    defaults = {o.name: o.default for o in options(METHODS[run.method].config)} if run.method in METHODS else {}
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


HASHED = {"reference": "reference model", "data": "training and held-out tokens"}
UNKNOWN = "these numbers do not show whether the models' own answers got better: compare samples"
JUDGED = (
    "a win rate holds for this judge and these prompts: another judge, or people, may disagree",
    "where KL, length or repetition rise with the win rate, the model may exploit a weakness of the judge",
)


def write_report(config: ReportConfig, results: Sequence[CompareResult] = (), sections: Sequence[Section] = ()) -> Path:
    """Write the report of runs and comparisons; ``results`` are comparisons in memory.

    Raises :class:`prefopt.errors.UserError`.
    """
    runs = [run for folder in config.run or () for run in runs_of(folder)]
    comparisons = [read_comparison(name) for name in config.comparisons or ()]
    comparisons += [comparison_report(result.to_dict()) for result in results]
    path = Path(config.output)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half of a surrogate pair, which a data set may hold, has no place in a file.
        replace_file(path, page(runs, comparisons, sections, title=config.title).encode("utf-8", "replace"))
    return path


def page(
    runs: Sequence[History],
    comparisons: Sequence[ComparisonReport] = (),
    sections: Sequence[Section] = (),
    *,
    title: str | None = None,
) -> str:
    """The whole page. The template engine escapes everything that comes from runs and their data."""
    names = labels(runs) if runs else []
    reports = [run_report(run, name) for run, name in zip(runs, names, strict=True)]
    several = len(runs) > 1
    names += [section.name for section in sections]
    title = title or ", ".join(names) or " and ".join(dict.fromkeys(m for c in comparisons for m in c.models))
    different = differing(runs) if several else []
    return template("prefopt.reports", "report.html.j2").render(
        title=title,
        heading=shortened(title, 70),  # of a browser's tab
        version=prefopt.__version__,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        verdict=[s for c in comparisons for s in c.sentences]
        or [*(verdict(run) for run in reports), *(s for section in sections for s in section.sentences)],
        sections=sections,
        comparisons=[(c, win_rates(c, name=f"rates{n}")) for n, c in enumerate(comparisons)],
        runs=reports,
        figures=curves(runs),
        different=[(n.replace("_", "-"), [shown(r.options.get(n)) for r in runs]) for n in different],
        caveats=[
            *(caveats(runs) if several else []),
            *(JUDGED if comparisons else ()),
            *(line for section in sections for line in section.caveats),
            *(() if comparisons or sections else (UNKNOWN,)),
        ],
    )


def verdict(run: RunReport) -> str:
    """One sentence on a run: its held-out loss and accuracy, or the reward of its samples."""
    values = dict(run.held_out)
    if run.samples:
        return f"{run.name}: {run.samples}"
    if "loss" not in values:
        return f"{run.name}: no row was held out, so that nothing is known about rows outside the training data"
    parts = [f"the loss on held-out rows is {values['loss']} at step {values['step']}"]
    if "rewards/accuracies" in values:
        parts.append(f"{float(values['rewards/accuracies']):.1%} of their pairs are ranked as in the data")
    return f"{run.name}: " + "; ".join(parts)


def template(package: str, name: str) -> jinja2.Template:
    """A template of a package, which may import those of this one. It escapes values and refuses undefined names."""
    environment: Any = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(found, ".") for found in (package, "prefopt.reports")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalise"] = _capitalised
    found: jinja2.Template = environment.get_template(name)
    return found


def _capitalised(text: str) -> str:
    """A sentence with a capital, unless it begins with a name."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first in _FIRST_WORDS else text


_FIRST_WORDS = {"no", "responses", "fewer"}
