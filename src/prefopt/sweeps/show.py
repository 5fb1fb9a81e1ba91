"""A sweep in words: a table of its points, which of them are on the frontier, and how many of PPO's DPO dominates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefopt.core.files import output_errors
from prefopt.core.terminal import duration
from prefopt.runs.plot import COLOURS, require_matplotlib
from prefopt.sweeps.points import Frontier, Point, dominated, frontier

HEAD = ("road", "setting", "seed", "step", "reward", "95 %", "KL", "± error", "tokens", "training", "")


def lines(sweep: Frontier) -> Iterator[str]:
    """What a person is told."""
    yield f"true reward {sweep.reward} on {sweep.prompts} held-out prompts, {sweep.samples} samples each; KL in nats"
    yield f"preferences: {sweep.made}"
    if not sweep.finished:
        yield "the sweep is not finished: more points are to come"
    yield ""
    best = frontier(sweep.points)
    yield from table([HEAD, *(_row(p, p in best) for p in sweep.points)])
    left_out = [p for p in sweep.points if not p.counted]
    if left_out:
        yield ""
        yield "not counted:"
        yield from (f"  {p.road} {p.setting}, seed {p.seed}: {p.why_not}" for p in left_out)
    yield ""
    yield from plateaus(sweep.points)
    yield from _against_ppo(sweep.points)


def _against_ppo(points: Sequence[Point]) -> Iterator[str]:
    """How many trainings of PPO a training of DPO dominates; that none counts is said too."""
    roads = [road for road in ("ppo-true", "ppo-learned") if any(p.road == road for p in points)]
    if not roads or not any(p.road == "dpo" for p in points):
        return
    yield "DPO against PPO, trainings of the same seed, each at its last step: checkpoints before it are not counted"
    for road in roads:
        count, of = dominated(points, "dpo", road)
        clear, _ = dominated(points, "dpo", road, clearly=True)
        if of:
            yield f"  DPO dominates {count} of {of} counted trainings of {road}; beyond the errors of both, {clear}"
        else:
            yield f"  no training of {road} counts, so that DPO is not compared with it"


def plateaus(points: Sequence[Point]) -> Iterator[str]:
    """What the true reward did in the last steps of PPO."""
    shown = [p for p in points if p.plateau is not None]
    if shown:
        yield "true reward on the held-out prompts over the last steps of PPO: rise [95 %], and the whole climb"
    for p in shown:
        f = p.plateau
        assert f is not None
        yield (
            f"  {p.road} {p.setting}, seed {p.seed}: {f.rise:+.3f} [{f.low:+.3f}, {f.high:+.3f}] in {f.steps} steps,"
            f" climb {f.climb:+.3f}: {f.told}"
        )
    if shown:
        yield ""


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns side by side, each as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(p: Point, on_frontier: bool) -> tuple[str, ...]:
    told = ("", "", "", "", "")
    if p.reward is not None and p.interval is not None and p.kl is not None:
        error = "at most" if p.kl_is == "bound" else f"{p.kl_se or 0:.2f}"
        bounds = f"[{p.interval[0]:+.3f}, {p.interval[1]:+.3f}]"
        told = (f"{p.reward:+.3f}", bounds, f"{p.kl:z.2f}", error, f"{p.length or 0:.1f}")
    mark = "on the frontier" if on_frontier else "" if p.counted else "not counted"
    time = "unknown" if p.seconds is None else duration(p.seconds) if p.seconds else ""
    return (p.road, p.setting, str(p.seed), str(p.step), *told, time, mark)


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
