"""``prefopt frontier`` and ``prefopt methods``: run, then told as a table."""

from __future__ import annotations

from pathlib import Path

from prefopt.config.frontier import FrontierConfig
from prefopt.config.methods_table import MethodsConfig
from prefopt.screen import tell, tell_lines


def show_frontier(config: FrontierConfig) -> None:
    from prefopt.evaluate.frontier_lines import lines
    from prefopt.evaluate.frontier_plot import plot_frontier
    from prefopt.evaluate.plot import require_matplotlib
    from prefopt.pipeline.frontier import run

    require_matplotlib()
    folder = Path(config.output)
    sweep = run(config)
    plot_frontier(sweep, folder / "frontier.png", folder / "frontier.svg")
    tell_lines(lines(sweep))
    tell(f"\nwritten: {folder / 'frontier.json'}, {folder / 'frontier.png'}, {folder / 'frontier.svg'}")


def show_methods(config: MethodsConfig) -> None:
    from prefopt.evaluate.methods_table import markdown
    from prefopt.pipeline.methods import run

    tell_lines(markdown(run(config)))
    folder = Path(config.output)
    tell(f"\nwritten: {folder / 'methods.json'}, {folder / 'methods.md'}")
