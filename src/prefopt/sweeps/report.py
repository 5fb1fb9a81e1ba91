"""A frontier sweep as text, as a figure and as a section of ``prefopt report``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefopt.config.tools import ReportConfig
from prefopt.core.files import output_errors
from prefopt.core.terminal import duration
from prefopt.evaluate.result import CompareResult
from prefopt.reports import page
from prefopt.runs.plot import COLOURS, require_matplotlib
from prefopt.runs.table import columns
from prefopt.sweeps.compared import dominance, tables
from prefopt.sweeps.points import FILE, Frontier, Point, dominated, frontier, read_frontier

HEAD = ("method", "setting", "", "reward (95 %)", "KL", "tokens", "training", "included")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CAVEATS = (
    "dominance compares the numbers without their errors: identical methods also dominate one another by chance",
    "intervals at fixed KL are over prompts, for these trainings; only several seeds show how much another seed"
    " changes them",
    "a sweep holds for these settings, this data and this reward: better tuning may change it",
)


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """One point as text; ``best`` is * where no other point dominates it."""

    method: str
    setting: str
    best: str
    reward: str
    kl: str
    tokens: str
    training: str
    included: str


def rows_of(sweep: Frontier) -> list[FrontierRow]:
    best = frontier(sweep.points)
    return [_row(p, "*" if p in best else "") for p in sweep.points]


def _row(p: Point, best: str) -> FrontierRow:
    reward = "-" if p.reward is None else f"{p.reward:.3f}"
    if p.reward is not None and p.interval is not None:
        reward += f" ({p.interval[0]:.3f} to {p.interval[1]:.3f})"
    kl = "-" if p.kl is None else f"{p.kl:z.2f}"
    if p.kl is not None:
        kl = f"at most {kl}" if p.kl_is == "bound" else kl + ("" if p.kl_se is None else f" ± {p.kl_se:.2f}")
    setting = f"{p.setting}, seed {p.seed}, step {p.step}"
    tokens = "-" if p.length is None else f"{p.length:.1f}"
    training = "unknown" if p.seconds is None else duration(p.seconds) if p.seconds else "-"
    included = "yes" if p.included else f"no: {p.why_not or 'it has no numbers'}"
    return FrontierRow(p.method, setting, best, reward, kl, tokens, training, included)


def sentences(sweep: Frontier) -> Iterator[str]:
    """Which method dominates which, by the numbers and beyond their errors."""
    methods = list(dict.fromkeys(p.method for p in sweep.points if p.included))
    if len(methods) < 2:
        yield "Fewer than two methods have an included point, so nothing is compared"
    for one in methods:
        for other in methods:
            count, of = dominated(sweep.points, one, other)
            if one != other and count:
                sure, _ = dominated(sweep.points, one, other, clearly=True)
                trained = all(p.step for p in sweep.points if p.method in (one, other))
                chance = f"; dealt at random, {dominance(sweep, one, other).average:.1f}" if trained else ""
                yield (
                    f"{one} has more reward at no more KL than {count} of the {of} included trainings of {other}, each"
                    f" at its last step and within a seed{chance}; beyond the errors, than {sure}"
                )
    if out := sum(not p.included for p in sweep.points):
        yield f"{out} of {len(sweep.points)} points are excluded; the table says why"


def lines(sweep: Frontier) -> Iterator[str]:
    """The sweep as text; * marks points that no other dominates."""
    yield f"true reward {sweep.reward} on {sweep.prompts} held-out prompts, {sweep.samples} samples each; KL in nats"
    if sweep.judge is not None:
        yield f"judge: {sweep.judge}, on the same samples; nothing was trained on it"
    if sweep.seconds is not None:
        yield f"equal cost: about {sweep.seconds:g} processor seconds for every training, by the time of a few steps"
    yield f"preferences: {sweep.made}"
    if sweep.task is not None:
        yield f"task: {' '.join(sweep.task)}, answered by log-probability"
    if not sweep.finished:
        yield unfinished(sweep)
    yield ""
    yield from columns([HEAD, *map(astuple, rows_of(sweep))])
    yield ""
    yield from sentences(sweep)
    for table in tables(sweep):
        yield ""
        yield table.title
        yield from columns([table.head, *table.rows])
        yield f"({table.note})"


def unfinished(sweep: Frontier) -> str:
    """How much of the sweep is missing."""
    tried, trials = sum(d.tried for d in sweep.done), sum(d.trials for d in sweep.done)
    trained, trainings = sum(d.trained for d in sweep.done), sum(d.trainings for d in sweep.done)
    rates = f"{tried} of {trials} trials of rates and " if trials else ""
    counts = f": {rates}{trained} of {trainings} trainings are done" if sweep.done else ""
    return f"the sweep is not finished{counts}; more points are to come"


# -- figure ----------------------------------------------------------------------------------------------------


def plot_frontier(sweep: Frontier, *paths: Path) -> None:
    """Write the figure to files, whose endings name the format."""
    figure = figure_of_frontier(sweep)
    for path in paths:
        with output_errors(path):
            figure.savefig(path, dpi=150)


def figure_of_frontier(sweep: Frontier, *, titled: bool = True) -> Any:
    """Reward over KL with intervals. Excluded points are hollow; points without numbers are left out. Raises
    :class:`prefopt.errors.ConfigError` where matplotlib is not installed."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(p.method for p in sweep.points if p.kl is not None))
    for n, method in enumerate(methods):
        points = [p for p in sweep.points if p.method == method and p.kl is not None]
        _draw(axes, points, method, COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)])
    best = frontier(sweep.points)
    style: dict[str, Any] = {"color": "0.6", "linewidth": 1, "linestyle": ":", "zorder": 1, "label": "not dominated"}
    axes.plot([p.kl for p in best], [p.reward for p in best], **style)
    axes.set_xlabel("KL(policy ‖ reference), nats per response", fontsize=9)
    axes.set_ylabel(f"true reward ({sweep.reward})", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    if titled:
        title = f"Reward against KL on {sweep.prompts} held-out prompts, {sweep.samples} samples each"
        figure.suptitle(title, fontsize=10)
    return figure


def _draw(axes: Any, points: list[Point], method: str, colour: str, marker: str) -> None:
    """One method: intervals of reward, and two standard errors of a measured KL."""
    label: str | None = f"{method} (KL: upper bound)" if points[0].kl_is == "bound" else method
    for p in points:
        assert p.kl is not None and p.reward is not None and p.interval is not None
        errors = {"yerr": [[max(0.0, p.reward - p.interval[0])], [max(0.0, p.interval[1] - p.reward)]]}
        errors |= {"xerr": [[2 * p.kl_se]] * 2} if p.kl_se else {}
        face = colour if p.counted else "white"
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "markerfacecolor": face}
        axes.errorbar([p.kl], [p.reward], **errors, **style, elinewidth=0.8, linestyle="none", alpha=0.9, label=label)
        label = None


# -- a section of the report -----------------------------------------------------------------------------------


def write_report(config: ReportConfig, results: Sequence[CompareResult] = ()) -> Path:
    """The report of :func:`prefopt.reports.page.write_report`, with a section for each frontier in ``config.run``."""
    sweeps = [folder for folder in config.run or () if is_sweep(folder)]
    runs = [folder for folder in config.run or () if folder not in sweeps]
    sections = [frontier_section(folder, number=n) for n, folder in enumerate(sweeps)]
    return page.write_report(replace(config, run=runs or None), results, sections)


def is_sweep(folder: str | Path) -> bool:
    """Whether a folder holds a sweep of ``prefopt frontier``, or the path is its file."""
    path = Path(folder)
    return path.name == FILE or (path / FILE).is_file()


def frontier_section(folder: str | Path, *, number: int = 0) -> page.Section:
    """Read a sweep and render it. Raises :class:`prefopt.errors.RunError`."""
    sweep, path = read_frontier(folder), Path(folder)
    name = (path.parent if path.name == FILE else path).resolve().name
    about = [
        ("reference", sweep.reference),
        ("true reward", sweep.reward),
        ("judge", sweep.judge),
        ("equal cost", sweep.seconds and f"about {sweep.seconds:g} processor seconds for every training"),
        ("prompts", f"{sweep.prompts:,}, {sweep.samples} samples each, at most {sweep.max_new_tokens} tokens"),
        ("task", sweep.task and " ".join(sweep.task)),
        ("preferences", sweep.made),
        ("status", "finished" if sweep.finished else unfinished(sweep)),
    ]
    drawn = [replace(p, method=page.plain(p.method)) for p in sweep.points if None not in (p.reward, p.interval, p.kl)]
    figure = None
    if drawn:
        found = figure_of_frontier(replace(sweep, reward=page.plain(sweep.reward), points=tuple(drawn)), titled=False)
        label = "Expected reward against KL to the reference; the table has the numbers"
        figure = page.inline(found, name=f"frontier{number}", label=label)
    texts = list(sentences(sweep))
    values: dict[str, Any] = {"name": name, "about": [(title, value) for title, value in about if value]}
    values |= {"sentences": texts, "rows": rows_of(sweep), "figure": figure, "tables": tables(sweep)}
    rendered = page.template("prefopt.sweeps", "frontier.html.j2").render(sweep=values)
    return page.Section(name, f"Reward against KL: {name}", Markup(rendered), texts, CAVEATS)
