"""A sweep as a picture: divergence to the right, reward upwards, a colour and a marker for every road."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.disk.write import output_errors
from prefopt.evaluate.frontier import Frontier, Point, frontier
from prefopt.evaluate.plot import COLOURS, require_matplotlib

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_frontier(sweep: Frontier, *paths: Path) -> None:
    """Write the picture to files, whose endings name their kind."""
    figure = figure_of_frontier(sweep)
    for path in paths:
        with output_errors(path):
            figure.savefig(path, dpi=150)


def figure_of_frontier(sweep: Frontier, *, titled: bool = True) -> Any:
    """A matplotlib figure that is nobody's current one. Hollow points do not count; those without numbers are left out.

    Raises :class:`prefopt.errors.ConfigError` where matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    roads = list(dict.fromkeys(p.road for p in sweep.points if p.kl is not None))
    for n, road in enumerate(roads):
        here = [p for p in sweep.points if p.road == road and p.kl is not None]
        _draw(axes, here, road, COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)])
    best = frontier(sweep.points)
    axes.plot(
        [p.kl for p in best],
        [p.reward for p in best],
        color="0.6",
        linewidth=1,
        linestyle=":",
        zorder=1,
        label="dominated by none",
    )
    axes.set_xlabel("KL(policy ‖ reference), nats per response", fontsize=9)
    axes.set_ylabel(f"true reward ({sweep.reward})", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    if titled:
        figure.suptitle(
            f"Reward against divergence on {sweep.prompts} held-out prompts, {sweep.samples} samples each", fontsize=10
        )
    return figure


def _draw(axes: Any, points: list[Point], road: str, colour: str, marker: str) -> None:
    """The points of one road with their intervals; two standard errors of a divergence that was measured."""
    named = False
    for p in points:
        assert p.kl is not None and p.reward is not None and p.interval is not None
        errors = {"yerr": [[max(0.0, p.reward - p.interval[0])], [max(0.0, p.interval[1] - p.reward)]]}
        errors |= {"xerr": [[2 * p.kl_se]] * 2} if p.kl_se else {}
        axes.errorbar(
            [p.kl],
            [p.reward],
            **errors,
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor=colour if p.counted else "white",
            elinewidth=0.8,
            linestyle="none",
            alpha=0.9,
            label=None if named else (f"{road} (KL: upper bound)" if p.kl_is == "bound" else road),
        )
        named = True
