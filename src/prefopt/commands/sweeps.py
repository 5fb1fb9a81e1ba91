"""``prefopt frontier`` and ``prefopt methods``: run, then told as a table."""

from __future__ import annotations

from pathlib import Path

from prefopt.config.frontier import FrontierConfig


def show_frontier(config: FrontierConfig) -> None:
    from prefopt.evaluate.frontier_lines import lines
    from prefopt.evaluate.frontier_plot import plot_frontier
    from prefopt.evaluate.plot import require_matplotlib
    from prefopt.pipeline.frontier import run

    require_matplotlib()
    folder = Path(config.output)
    sweep = run(config)
    plot_frontier(sweep, folder / "frontier.png", folder / "frontier.svg")
    print("\n".join(lines(sweep)))
    print(f"\nwritten: {folder / 'frontier.json'}, {folder / 'frontier.png'}, {folder / 'frontier.svg'}")
