"""Figures of runs: a panel per metric, a colour per run, held-out points as markers."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefopt.core.files import output_errors
from prefopt.core.options import nearest
from prefopt.core.plugins import how_to_install
from prefopt.errors import ConfigError
from prefopt.runs.diagnose import change_of, loss_at_start
from prefopt.runs.history import Curve, History
from prefopt.runs.settings import differing, shown
from prefopt.runs.table import PER_KIND, as_number, labels, what_differs

# Okabe and Ito's colours for any colour vision, without yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SIDES = ("chosen", "rejected")
STYLES = {"": "-", "chosen": "-", "rejected": (0, (4, 2))}
MOST_MARKERS = 40
EXACT = ("learning_rate", "peak_memory_bytes")  # drawn without smoothing


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel: a metric, or a family of two, NAME/chosen and NAME/rejected."""

    name: str
    title: str
    unit: str
    line: float | None = None
    """Where to draw a thin line: the value of no preference or no change."""
    line_name: str = ""
    sides: bool = False


STANDARD = (
    Panel("loss", "Loss", "loss", math.log(2), "ln 2"),
    Panel("rewards/margins", "Margin of rewards, chosen − rejected", "margin (reward)", 0.0),
    Panel("rewards/accuracies", "Accuracy: chosen above rejected", "fraction of rows", 0.5, "chance"),
    Panel("log_ratios_per_token", "Log-ratio to the reference", "nats per token", 0.0, sides=True),
    Panel("objective/scores", "Reward of the policy's samples", "reward"),
    Panel("objective/kl", "KL to the reference", "nats per response", 0.0),
    Panel("val/length", "Length of the policy's samples", "tokens"),
    Panel("objective/entropy", "Entropy", "nats per response"),
)
KNOWN = {
    **{panel.name: panel for panel in STANDARD},
    "rewards": Panel("rewards", "Rewards", "reward", 0.0, sides=True),
    "logps": Panel("logps", "Log-probability of responses", "nats", sides=True),
    "lengths": Panel("lengths", "Length of responses", "tokens", sides=True),
    "grad_norm": Panel("grad_norm", "Norm of the gradient, before clipping", "norm"),
    "learning_rate": Panel("learning_rate", "Learning rate", "learning rate"),
    "tokens_per_second": Panel("tokens_per_second", "Throughput", "tokens per second"),
    "peak_memory_bytes": Panel("peak_memory_bytes", "Peak memory", "bytes"),
}


def require_matplotlib() -> None:
    """Raises :class:`ConfigError` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"pictures need matplotlib: run {how_to_install('plot')}")


def plot_runs(
    runs: Sequence[History], path: str | Path, *, metrics: Sequence[str] | None = None, x: str = "step"
) -> None:
    """Write :func:`figure_of` these runs to ``path``, whose ending names the format."""
    figure = figure_of(runs, metrics=metrics, x=x)
    with output_errors(Path(path)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def figure_of(
    runs: Sequence[History],
    *,
    metrics: Sequence[str] | None = None,
    x: str = "step",
    titled: bool = True,
    among: Sequence[History] | None = None,
) -> Any:
    """A matplotlib figure, ``titled`` with what the runs have in common. Without ``metrics``, each method has its own
    panels. ``among``: all runs of a page, so that a run has one colour in all its figures. Raises :class:`ConfigError`
    for metrics that no run has, and if matplotlib is not installed."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = panels_by_method(runs) if metrics is None else by_kind([(p, runs) for p in panels_of(runs, metrics)])
    if not panels:
        raise ConfigError("there is nothing to draw yet: no run has written a step")
    across = 1 if len(panels) == 1 else 2
    down = math.ceil(len(panels) / across)
    names = what_differs(runs) if len(runs) > 1 else []
    figure = Figure(figsize=(5.6 * across, 3.1 * down + 0.9 + 0.22 * math.ceil(len(names) / 2)), layout="constrained")
    if titled:
        figure.suptitle(_title(runs, 48 * across), fontsize=11)
    all_axes: list[Any] = list(figure.subplots(down, across, squeeze=False).flat)
    colours = {id(run): COLOURS[i % len(COLOURS)] for i, run in enumerate(among or runs)}
    for axes, (panel, several) in zip(all_axes, panels, strict=False):
        _draw(axes, with_line(panel, several), several, [colours[id(run)] for run in several], x)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    if names:
        drawn = zip(runs, names, strict=True)
        lines = [Line2D([], [], color=colours[id(run)], linewidth=2.5, label=name) for run, name in drawn]
        figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure


def with_line(panel: Panel, runs: Sequence[History]) -> Panel:
    """The panel without its thin line where that is the loss before training and no run started there."""
    known_start = any(loss_at_start(run) is not None for run in runs if run.training)
    return panel if panel.name != "loss" or known_start else replace(panel, line=None)


def shown_in_notebooks(figure: Any) -> Any:
    """The figure, which a notebook shows also without pyplot."""

    def png() -> bytes:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return file.getvalue()

    figure._repr_png_ = png
    return figure


def panels_of(runs: Sequence[History], metrics: Sequence[str]) -> list[Panel]:
    """The panels for ``metrics``. Raises :class:`ConfigError` for an unknown one."""
    there, families = _names(runs)
    if unknown := [name for name in metrics if name not in there | families]:
        near = nearest(unknown[0], sorted(there | families)) or f"; there are {', '.join(sorted(there))}"
        raise ConfigError(f"--metrics {unknown[0]}: no run has it{near}")
    names = list(dict.fromkeys(metrics))
    return [KNOWN.get(n, Panel(n, n, n, sides=n in families and n not in there)) for n in names]


def panels_by_method(runs: Sequence[History]) -> list[tuple[Panel, Sequence[History]]]:
    """The standard panels with their runs, by method: losses of different methods are not comparable."""
    found: list[tuple[Panel, Sequence[History]]] = []
    for method in dict.fromkeys(run.method for run in runs):
        several = [run for run in runs if run.method == method]
        there, families = _names(several)
        prefix = f"{method}: " if len(several) < len(runs) else ""
        panels = [replace(p, title=prefix + p.title) for p in STANDARD if p.name in there | families]
        found += by_kind([(panel, several) for panel in panels])
    return found


def by_kind(panels: Sequence[tuple[Panel, Sequence[History]]]) -> list[tuple[Panel, Sequence[History]]]:
    """The same panels, with one for each kind of loss where numbers of several kinds would share an axis."""
    found: list[tuple[Panel, Sequence[History]]] = []
    for panel, runs in panels:
        kinds = list(dict.fromkeys(run.loss_kind for run in runs))
        if len(kinds) == 1 or not any(name.startswith(panel.name) for name in PER_KIND):
            found.append((panel, runs))
            continue
        for kind in kinds:
            several = [run for run in runs if run.loss_kind == kind]
            there, families = _names(several)
            if panel.name in there | families:
                found.append((replace(panel, title=f"{panel.title} ({kind})"), several))
    return found


def _names(runs: Sequence[History]) -> tuple[set[str], set[str]]:
    """The metrics of runs, and their families: NAME of NAME/chosen and NAME/rejected."""
    there = {name for run in runs for name in run.names()}
    return there, {name.rpartition("/")[0] for name in there if name.rpartition("/")[2] in SIDES}


def _draw(axes: Any, panel: Panel, runs: Sequence[History], colours: Sequence[str], x: str) -> None:
    shown_values: list[float] = []
    held_out = False
    for run, colour in zip(runs, colours, strict=True):
        for side in SIDES if panel.sides else ("",):
            name = f"{panel.name}/{side}" if side else panel.name
            style: Any = STYLES[side]
            curve, marks = run.curve(name), run.curve(name, held_out=True)
            if curve:
                smooth = curve.values if panel.name in EXACT else smoothed(curve.values)
                if smooth != curve.values:
                    axes.plot(along(run, curve, x), curve.values, color=colour, alpha=0.18, linewidth=0.8)
                axes.plot(along(run, curve, x), smooth, color=colour, linestyle=style, linewidth=1.6)
                low, high = min(smooth), max(smooth)  # values beyond them by more than their height are outliers
                shown_values += [*smooth, *(v for v in curve.values if 2 * low - high <= v <= 2 * high - low)]
            if marks:
                held_out = True
                edge, face = (colour, "white") if side == "rejected" else ("white", colour)
                marker = {"marker": "o", "markersize": 5, "markeredgecolor": edge, "markerfacecolor": face}
                every = math.ceil(len(marks.steps) / MOST_MARKERS)
                x_values, y_values = along(run, marks, x)[::every], marks.values[::every]
                axes.plot(x_values, y_values, linestyle="none", markeredgewidth=0.9, zorder=3, **marker)
                shown_values += marks.values
    _frame(axes, panel, shown_values, x)
    widths = {window(len(run.training)) for run in runs}
    width = 1 if panel.name in EXACT else widths.pop() if len(widths) == 1 else None
    _key(axes, panel, held_out, width)


def _frame(axes: Any, panel: Panel, values: Sequence[float], x: str) -> None:
    """Title, units, limits that ignore outliers, and the line of no change."""
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("epoch" if x == "epoch" else "step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    low, high = min(values), max(values)
    if panel.line is not None and (low - (high - low) <= panel.line <= high + (high - low)):
        axes.axhline(panel.line, color="0.45", linewidth=0.9, linestyle=":", zorder=1)
        low, high = min(low, panel.line), max(high, panel.line)
        if panel.line_name:
            at: Any = {"xycoords": ("axes fraction", "data"), "xytext": (2, 0), "textcoords": "offset points"}
            axes.annotate(panel.line_name, (1.0, panel.line), **at, fontsize=7.5, color="0.35", va="center")
    room = 0.08 * (high - low) or max(abs(high), 1.0) * 0.05
    axes.set_ylim(low - room, high + room)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(8)
    if x == "step":
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _key(axes: Any, panel: Panel, held_out: bool, width: int | None) -> None:
    """The legend of line styles. ``width``: steps of the moving average, if equal for all runs."""
    from matplotlib.lines import Line2D

    grey = "0.25"
    lines: list[Any] = []
    if panel.sides:
        lines += [Line2D([], [], color=grey, linestyle=STYLES[side], label=side) for side in SIDES]  # type: ignore[arg-type]
    elif held_out or width != 1:
        mean = f", average of {width} steps" if width else ", average of nearby steps"
        lines.append(Line2D([], [], color=grey, label=f"training{mean if width != 1 else ''}"))
    if held_out:
        lines.append(Line2D([], [], color=grey, linestyle="none", marker="o", markersize=5, label="held out"))
    if lines:
        axes.legend(handles=lines, fontsize=7.5, frameon=True, framealpha=0.8, edgecolor="none", loc="best")


def _title(runs: Sequence[History], width: int) -> str:
    """What the runs have in common, in lines of about ``width`` characters."""
    first, different = runs[0], set(differing(runs))
    parts = [first.folder.resolve().name] if len(runs) == 1 else [f"{len(runs)} runs"]
    for name in ("loss", "model", "learning_rate", "beta", "batch_size"):
        value = first.options.get(name)
        if value is not None and name not in different:
            text = Path(str(value)).name if name in ("loss", "model") else f"{name.replace('_', ' ')} {shown(value)}"
            parts.append(text)
    lines = [shortened(parts[0], width)]
    for part in (shortened(part, width) for part in parts[1:]):
        fits = len(lines[-1]) + len(part) + 7 <= width
        lines[-1:] = [f"{lines[-1]}   ·   {part}"] if fits else [lines[-1], part]
    return "\n".join(lines)


def in_words(panel: Panel, runs: Sequence[History]) -> list[str]:
    """A line for each curve of a panel: its start, its end, and whether it changed beyond noise."""
    lines = []
    for run, name in zip(runs, labels(runs), strict=True):
        for side in SIDES if panel.sides else ("",):
            metric = f"{panel.name}/{side}" if side else panel.name
            of = ", ".join(part for part in (name if len(runs) > 1 else "", side) if part)
            if words := _curve_words(run, metric):
                lines.append(f"{of}: {words}" if of else words)
    return lines


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


def shortened(text: str, width: int) -> str:
    """``text`` cut to ``width`` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def along(run: History, curve: Curve, x: str) -> list[float]:
    """The x values of a curve."""
    if x == "step":
        return [float(step) for step in curve.steps]
    epochs = run.curve("epoch")
    per_step = epochs.values[-1] / epochs.steps[-1] if epochs else 1.0
    return [step * per_step for step in curve.steps]


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving average: narrower at the start, so that the first step shows the model before training."""
    whole, last = window(len(values)) // 2, len(values) - 1
    found = []
    for i in range(len(values)):
        before = min(whole, i)
        found.append(statistics.fmean(values[i - before : min(i + before, last) + 1]))
    return found


def window(count: int) -> int:
    """Steps of the moving average: a tenth of the curve, 1 for a short one."""
    return 2 * (count // 20) + 1 if count > 20 else 1
