"""``prefopt runs``, ``prefopt plot`` and ``prefopt report``: runs as words, as curves and as a page."""

from __future__ import annotations

from prefopt.config.report import ReportConfig
from prefopt.config.runs import PlotConfig, RunsConfig
from prefopt.errors import ConfigError
from prefopt.evaluate.runs import runs_of
from prefopt.evaluate.show import show_runs
from prefopt.screen import tell, tell_lines


def list_runs(config: RunsConfig) -> int:
    tell_lines(show_runs(config.folder or ["."], as_json=config.json))
    return 0


def draw_runs(config: PlotConfig) -> int:
    from prefopt.evaluate.plot import plot_runs  # listing runs needs neither torch nor matplotlib

    runs = [run for folder in config.run for run in runs_of(folder)]
    plot_runs(runs, config.output, metrics=config.metrics, x=config.x)
    tell(f"{config.output}: {len(runs)} run{'s' * (len(runs) != 1)}")
    return 0


def report_runs(config: ReportConfig) -> int:
    """Draws with matplotlib, as the figures of ``prefopt plot``."""
    from prefopt.evaluate.report.page import write_report

    if not config.run and not config.comparisons:
        raise ConfigError("there is nothing to report: name output folders, or --comparisons")
    tell(f"written: {write_report(config)}")
    return 0
