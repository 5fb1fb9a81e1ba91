"""Figures as inline SVG: text stays text, and no two figures share an id."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from markupsafe import Markup

from prefopt.reports.comparison import ComparisonReport
from prefopt.runs.diagnose import change_of
from prefopt.runs.history import History
from prefopt.runs.plot import COLOURS, SIDES, Panel, figure_of, panels_by_method, require_matplotlib, shortened
from prefopt.runs.table import as_number, labels

WRAPPING = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.S)


def curves(runs: Sequence[History]) -> list[tuple[Markup, list[str]]]:
    """The standard panels of these runs, each as a figure with sentences on what it shows."""
    found = []
    for n, (panel, several) in enumerate(panels_by_method(runs)):
        figure, of = figure_of(several, metrics=[panel.name], titled=False), ", ".join(labels(several))
        figure.axes[0].set_title(panel.title, fontsize=10, loc="left")
        found.append((inline(figure, name=f"curve{n}", label=f"{panel.title}: {of}"), in_words(panel, several)))
    return found


def in_words(panel: Panel, runs: Sequence[History]) -> list[str]:
    """A line for each curve of a panel: its start, its end, and whether it changed beyond noise."""
    told = []
    for run, name in zip(runs, labels(runs), strict=True):
        for side in SIDES if panel.sides else ("",):
            metric = f"{panel.name}/{side}" if side else panel.name
            of = ", ".join(part for part in (name if len(runs) > 1 else "", side) if part)
            if words := _curve_words(run, metric):
                told.append(f"{of}: {words}" if of else words)
    return told


def _curve_words(run: History, metric: str) -> str:
    parts = []
    if (found := change_of(run, metric)) is not None:
        verb = {1: "rose", -1: "fell", 0: "did not change beyond noise:"}[found.direction]
        parts.append(f"{verb} from {as_number(found.first)} to {as_number(found.last)} (noise {found.noise:.2g})")
    if held := run.curve(metric, held_out=True):
        if len(held.steps) > 1:
            first, last = as_number(held.values[0]), as_number(held.values[-1])
            parts.append(f"on held-out rows from {first} at step {held.steps[0]} to {last} at step {held.steps[-1]}")
        else:
            parts.append(f"on held-out rows {as_number(held.values[0])} at step {held.steps[0]}")
    return "; ".join(parts)


def win_rates(found: ComparisonReport, *, name: str) -> Markup | None:
    """Win rates with their intervals and the line of no difference; None without any interval."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rates = [(rate.name, rate.bounds) for rate in found.rates if rate.bounds is not None]
    if not rates:
        return None
    figure: Any = Figure(figsize=(7.5, 0.9 + 0.34 * len(rates)), layout="constrained")
    axes = figure.subplots()
    for y, (_, (mean, low, high)) in enumerate(rates):
        axes.plot([low, high], [y, y], color=COLOURS[0], linewidth=2)
        axes.plot([mean], [y], color=COLOURS[0], marker="o", markersize=6)
    axes.axvline(0.5, color="0.45", linewidth=0.9, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rates) - 0.5, -0.5)
    axes.set_yticks(range(len(rates)), [plain(shortened(text, 48)) for text, _ in rates], fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("win rate, a tie counting half; the line is its 95 % interval", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return inline(figure, name=name, label=f"Win rates by the judge {found.judge}")


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
