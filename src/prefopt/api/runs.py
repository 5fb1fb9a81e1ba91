"""The functions on runs and sweeps: report, plot, list_runs, frontier, compare_methods; env and list_losses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefopt.api.functions import Command, command_function, public
from prefopt.api.objects import NAME
from prefopt.config.frontier import FrontierConfig
from prefopt.config.sweeps import MethodsConfig
from prefopt.config.tools import EnvConfig, LossesConfig, PlotConfig, ReportConfig, RunsConfig
from prefopt.core.plugins import imported
from prefopt.core.shown import Shown
from prefopt.core.terminal import tell
from prefopt.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from prefopt.api.types import Name
    from prefopt.evaluate.result import CompareResult


@public()
def report(
    runs: Name | Sequence[Name] = (),
    *,
    comparisons: Sequence[Name | CompareResult] = (),
    output: Name = "report.html",
    title: str | None = None,
) -> Path:
    """Write an HTML report of runs and comparisons, as ``prefopt report`` does; returns its path.

    ``runs`` are output folders; ``comparisons`` are what :func:`compare` returned, or files with what
    ``prefopt compare --json`` printed.

    >>> import prefopt
    >>> found = prefopt.compare("aligned", "base", "in.txt", judge="vader", output="judged.jsonl")  # doctest: +SKIP
    >>> prefopt.report("aligned", comparisons=[found])  # doctest: +SKIP
    PosixPath('report.html')
    """
    from prefopt.sweeps.report import write_report

    folders = [runs] if isinstance(runs, NAME) else list(runs)
    files = [os.fspath(x) for x in comparisons if isinstance(x, NAME)]
    results = [x for x in comparisons if not isinstance(x, NAME)]
    if not folders and not files and not results:
        raise ConfigError("there is nothing to report: name runs, or give comparisons")
    run = [os.fspath(folder) for folder in folders] or None
    values = {"run": run, "comparisons": files or None, "title": title, "output": os.fspath(output)}
    return write_report(ReportConfig.from_dict({k: v for k, v in values.items() if v is not None}), results)


@public()
def plot(
    runs: Name | Sequence[Name],
    *,
    output: Name | None = None,
    metrics: str | Sequence[str] | None = None,
    x: str = "step",
) -> Any:
    """Plot the metrics of runs, as ``prefopt plot`` does; returns a matplotlib figure, which a notebook shows.

    ``runs`` are output folders, also of ``prefopt.rlhf``. ``metrics``: names of ``metrics.jsonl``, by default loss,
    margin, accuracy and log-ratios. ``x``: step or epoch. With ``output`` (.png, .svg or .pdf) the figure is written,
    too. Raises ``prefopt.errors.UserError`` where ``prefopt plot`` prints one line.

    >>> import prefopt
    >>> prefopt.plot(["runs/dpo", "runs/ipo"], x="epoch")  # doctest: +SKIP
    """
    folders = [os.fspath(runs)] if isinstance(runs, NAME) else [os.fspath(folder) for folder in runs]
    given = {"run": folders, "metrics": metrics, "x": x, "output": None if output is None else os.fspath(output)}
    config = PlotConfig.from_dict({name: value for name, value in given.items() if value is not None})

    from prefopt.runs.plot import figure_of, plot_runs, shown_in_notebooks
    from prefopt.runs.table import runs_of

    found = [run for folder in config.run for run in runs_of(folder)]
    if output is not None:
        plot_runs(found, config.output, metrics=config.metrics, x=config.x)
    return shown_in_notebooks(figure_of(found, metrics=config.metrics, x=config.x))


class RunList(Shown):
    """Runs with their options and results, a dict for each, as ``prefopt runs --json`` prints them. A sequence that
    prints as the list of ``prefopt runs``."""

    def __init__(self, runs: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
        self._runs, self._lines = list(runs), list(lines)

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self._runs[number]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._runs)

    def __repr__(self) -> str:
        return "\n".join(self._lines)

    def table(self) -> tuple[str, list[tuple[str, str]]]:
        """What a notebook shows: the name of each run and its result."""
        rows = [(str(run["folder"]), f"{run.get('method')}, {run.get('status')}") for run in self._runs]
        return f"{len(self)} run{'s' * (len(self) != 1)}", rows


def _list_runs(config: RunsConfig) -> RunList:
    from prefopt.runs.listing import in_order, run_as_json, show_runs
    from prefopt.runs.table import find_runs

    folders = config.folder or ["."]
    runs = [run for folder in folders for run in find_runs(folder)[0]]
    if config.sort is not None:
        runs = in_order(runs, config.sort)
    return RunList([run_as_json(run) for run in runs], show_runs(folders, sort=config.sort))


def _list_losses(config: LossesConfig) -> None:
    from prefopt.losses.parse import describe_loss, list_losses

    tell(list_losses() if config.name is None else describe_loss(config.name))


COMMANDS = {
    "list_runs": Command(
        RunsConfig,
        _list_runs,
        "RunList",
        "List runs, as ``prefopt runs`` does: a sequence with a dict for each, which prints as a table.",
        ("json", "csv"),
    ),
    "frontier": Command(
        FrontierConfig,
        lambda config: imported("prefopt.sweeps.frontier:run")(config),
        "Frontier",
        "Measure reward against KL for DPO, PPO and other methods on the same data, as ``prefopt frontier`` does.",
    ),
    "compare_methods": Command(
        MethodsConfig,
        lambda config: imported("prefopt.sweeps.methods:run")(config),
        "MethodsTable",
        "Compare cost and quality of DPO with those of reward model and PPO, as ``prefopt methods`` does.",
    ),
    "list_losses": Command(
        LossesConfig, _list_losses, "None", "Print the losses, or the description of one, as ``prefopt losses`` does."
    ),
    "env": Command(
        EnvConfig,
        lambda _: imported("prefopt.model.environment:environment")(),
        "dict[str, dict[str, str]]",
        "Versions, devices, folders and missing packages, as ``prefopt env`` prints them.",
        ("json",),
    ),
}
list_runs, frontier, compare_methods, list_losses, env = (
    command_function(name, __name__, command) for name, command in COMMANDS.items()
)
