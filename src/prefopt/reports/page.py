"""``prefopt report``: an HTML file on runs and comparisons, without scripts and without network access."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import jinja2
from markupsafe import Markup

import prefopt
from prefopt.config.methods import METHODS, read_options
from prefopt.config.tools import ReportConfig
from prefopt.core.files import output_errors, replace_file
from prefopt.core.options import command, options
from prefopt.errors import UserError
from prefopt.evaluate.result import CompareResult
from prefopt.reports.comparison import LONGEST, comparison_report, read_comparison
from prefopt.runs.diagnose import diagnose
from prefopt.runs.experts import read_experts
from prefopt.runs.history import History
from prefopt.runs.listing import cells_of
from prefopt.runs.plot import COLOURS, figure_of, in_words, panels_by_method, require_matplotlib, shortened
from prefopt.runs.samples import AFTER, read_samples
from prefopt.runs.settings import differing, short_path, shown
from prefopt.runs.table import as_number, caveats, labels, reached, runs_of, summary

Row = tuple[str, str]
"""A name and its value."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section rendered elsewhere: ``html`` is inserted unescaped, ``sentences`` stand at the top of the page, and
    ``title`` in the list of contents."""

    name: str
    title: str
    html: Markup
    sentences: Sequence[str]
    caveats: Sequence[str]


def run_report(run: History, name: str) -> dict[str, Any]:
    """The template's values for a run, under a ``name`` that distinguishes it from the others."""
    found, values = diagnose(run), reached(run)
    return {
        "name": name,
        "summary": summary(run),
        "findings": [f.text for f in found if not f.look],
        "warnings": [f.text for f in found if f.look],
        "accuracy": [f.text for f in found if f.name in OF_ACCURACY],
        "held_out": [(key, as_number(value)) for key, value in values["held_out"].items()],
        "training": [(key, as_number(value)) for key, value in values["training"].items()],
        "data": _data(run),
        "identity": [(title, str(run.record[key])) for key, title in HASHED.items() if run.record.get(key)],
        "settings": _settings(run),
        "environment": run.record.get("environment", {}),
        "command": _command(run),
        "samples": _samples(run),
        "texts": _texts(run),
        "experts": [(name, [f"{share:.2%}" for share in shares]) for name, shares in read_experts(run.folder)],
    }


def _data(run: History) -> list[Row]:
    rows, options = run.rows, run.options
    found = [("files", _files(options.get("data") or options.get("prompts")))]
    found += [("held-out files", _files(value))] if (value := options.get("eval_data")) else []
    found += [(f"rows {key}", f"{value:,}") for key, value in rows.items()]
    if {"read", "kept"} <= rows.keys():
        found.append(("rows refused and skipped", f"{rows['read'] - rows['kept']:,}"))
    if value := run.record.get("max_length"):
        found.append(("longest sequence", f"{value} tokens"))
    return found


def _files(value: Any) -> str:
    """Names of files without their folders; the command has them in full."""
    return shown([short_path(one) for one in value] if isinstance(value, list) else short_path(value))


def _settings(run: History) -> list[tuple[str, str, bool]]:
    """Name and value of each option, and whether it differs from the default."""
    defaults = {o.name: o.default for o in options(METHODS[run.method].config)} if run.method in METHODS else {}
    return [
        (name.replace("_", "-"), shown(value), name not in defaults or value != defaults[name])
        for name, value in run.options.items()
    ]


def _command(run: History) -> str:
    """The command that repeats a run; empty where this version has other options."""
    try:
        return command(run.method, read_options(run.method, run.options)) if run.method in METHODS else ""
    except UserError:
        return ""


def _samples(run: History) -> str:
    """A sentence on the reward of a run that learns from its own samples, else empty."""
    scores, ending = run.curve("objective/scores").values, reached(run)["training"]
    if not scores or "objective/scores" not in ending:
        return ""
    far = f", at {ending['objective/kl']:.3g} nats from the reference" if "objective/kl" in ending else ""
    return (
        f"the reward of its own samples was {scores[0]:.3g} in the first step and is {ending['objective/scores']:.3g}"
        f" over the last tenth of the steps{far}; this is the reward that it was trained on"
    )


def _texts(run: History) -> list[dict[str, Any]]:
    """Samples on held-out prompts, before and after training."""
    rows = [row for row in read_samples(run.folder) if AFTER in row["models"]]
    return [
        {
            "verdict": f"row {row['source_row']}",
            "prompt": shortened(row["prompt"], LONGEST),
            "models": row["models"],
            "responses": [shortened(text, LONGEST) for text in row["responses"]],
        }
        for row in rows
    ]


OF_ACCURACY = ("accuracy", "no better than chance", "worse than chance")
"""Findings that the headline repeats, so that it says no more than they do."""
COLUMNS = 4
"""Runs side by side in a table; more have a table of their own below, so that print cuts none off."""
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
    comparisons: Sequence[Mapping[str, Any]] = (),
    sections: Sequence[Section] = (),
    *,
    title: str | None = None,
) -> str:
    """The page as text."""
    names = labels(runs) if runs else []
    reports = [run_report(run, name) for run, name in zip(runs, names, strict=True)]
    several = len(runs) > 1
    told = [*names, *(section.name for section in sections)]
    title = title or ", ".join(told) or " and ".join(dict.fromkeys(m for c in comparisons for m in c["compared"]))
    figures = curves(runs)
    return template("prefopt.reports", "report.html.j2").render(
        title=title,
        heading=shortened(title, 70),  # of a browser's tab
        version=prefopt.__version__,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        verdict=[s for c in comparisons for s in c["sentences"]]
        or [*(_verdict(run) for run in reports), *(s for section in sections for s in section.sentences)],
        contents=_contents(comparisons, sections, runs, names, figures),
        sections=sections,
        comparisons=[(c, win_rates(c, name=f"rates{n}")) for n, c in enumerate(comparisons)],
        runs=reports,
        figures=figures,
        overview=cells_of(runs, names) if several else [],
        different=_different(runs, names),
        caveats=[
            *(caveats(runs) if several else []),
            *(JUDGED if comparisons else ()),
            *(line for section in sections for line in section.caveats),
            *(() if comparisons or sections else (UNKNOWN,)),
        ],
    )


def _contents(
    comparisons: Sequence[Mapping[str, Any]],
    sections: Sequence[Section],
    runs: Sequence[History],
    names: Sequence[str],
    figures: Sequence[Any],
) -> list[tuple[str, str]]:
    """The id and the name of each section of the page, in order."""
    found = [(f"comparison-{n}", f"Compared by {c['judge']}") for n, c in enumerate(comparisons, 1)]
    found += [(f"section-{n}", section.title) for n, section in enumerate(sections, 1)]
    found += [("runs", "Runs")] if len(runs) > 1 else []
    found += [("curves", "Curves")] if figures else []
    found += [("differences", "What differs between the runs")] if differing(runs) else []
    found += [(f"run-{n}", name) for n, name in enumerate(names, 1)]
    return [*found, ("caveats", "Caveats")]


Beside = tuple[Sequence[str], list[tuple[str, list[str]]]]
"""The names of runs, and options with their value in each."""


def _different(runs: Sequence[History], names: Sequence[str]) -> list[Beside]:
    """Tables of the options that differ, each with the names of its runs; paths by their ends."""
    options = differing(runs)
    found: list[Beside] = []
    for first in range(0, len(runs) if options else 0, COLUMNS):
        several = runs[first : first + COLUMNS]
        rows = [(n.replace("_", "-"), [_files(run.options.get(n)) for run in several]) for n in options]
        found.append((names[first : first + COLUMNS], rows))
    return found


def _verdict(run: Mapping[str, Any]) -> str:
    """One sentence on a run: its held-out loss and what its findings say of the accuracy, or the reward of its
    samples."""
    name, values = run["name"], dict(run["held_out"])
    if run["samples"]:
        return f"{name}: {run['samples']}"
    if "loss" not in values:
        return f"{name}: no row was held out, so how it does on unseen rows is not known"
    parts = [f"the loss on held-out rows is {values['loss']} at step {values['step']}", *run["accuracy"]]
    return f"{name}: " + "; ".join(parts)


def template(package: str, name: str) -> jinja2.Template:
    """A template of a package, which may import those of this one. It escapes values and refuses undefined names."""
    environment: Any = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(found, ".") for found in (package, "prefopt.reports")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found: jinja2.Template = environment.get_template(name)
    return found


# -- figures: inline SVG in which text stays text and no two share an id --------------------------------------

WRAPPING = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.S)


def curves(runs: Sequence[History]) -> list[tuple[Markup, list[str]]]:
    """The standard panels of these runs, each as a figure with sentences on what it shows."""
    found = []
    for n, (panel, several) in enumerate(panels_by_method(runs)):
        figure, of = figure_of(several, metrics=[panel.name], titled=False, among=runs), ", ".join(labels(several))
        figure.axes[0].set_title(panel.title, fontsize=10, loc="left")
        found.append((inline(figure, name=f"curve{n}", label=f"{panel.title}: {of}"), in_words(panel, several)))
    return found


def win_rates(found: Mapping[str, Any], *, name: str) -> Markup | None:
    """Win rates with their intervals and the line of no difference; None without any interval."""
    rates = [(rate["name"], rate["bounds"]) for rate in found["rates"] if rate["bounds"] is not None]
    axis, label = (
        "win rate, a tie counting half; the line is its 95 % interval",
        f"Win rates by the judge {found['judge']}",
    )
    return intervals(rates, axis=axis, name=name, label=label)


def intervals(
    rates: Sequence[tuple[str, tuple[float, float, float]]], *, axis: str, name: str, label: str, chance: float = 0.5
) -> Markup | None:
    """Rates with intervals and a line at ``chance``; None for no rate. ``name`` and ``label``: see :func:`inline`."""
    require_matplotlib()
    from matplotlib.figure import Figure

    if not rates:
        return None
    figure: Any = Figure(figsize=(7.5, 0.9 + 0.34 * len(rates)), layout="constrained")
    axes = figure.subplots()
    for y, (_, (mean, low, high)) in enumerate(rates):
        axes.plot([low, high], [y, y], color=COLOURS[0], linewidth=2)
        axes.plot([mean], [y], color=COLOURS[0], marker="o", markersize=6)
    axes.axvline(chance, color="0.45", linewidth=0.9, linestyle=":")
    axes.set_xlim(0, max(1.0, *(high for _, (_, _, high) in rates)))
    axes.set_ylim(len(rates) - 0.5, -0.5)
    axes.set_yticks(range(len(rates)), [plain(shortened(text, 48)) for text, _ in rates], fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(axis, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return inline(figure, name=name, label=label)


def inline(figure: Any, *, name: str, label: str) -> Markup:
    """A matplotlib figure as an ``svg`` element that fills the width it is given.

    ``name`` keeps the ids of several figures of one page apart; ``label`` is read out in the figure's place.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = WRAPPING.sub("", file.getvalue()).strip().replace("xlink:href", "href")
    # Some ids are hashes, others names such as figure_1 that every figure has.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib gives every picture a viewBox"
    return Markup(f'<svg {box[0]} role="img" aria-label={quoteattr(label)}>{body}')


def plain(text: str) -> str:
    """As text for matplotlib, to which a dollar begins mathematics, and an underscore in front hides a label."""
    found = text.replace("$", r"\$")
    return f" {found}" if found.startswith("_") else found
