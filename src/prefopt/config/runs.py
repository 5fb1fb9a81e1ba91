"""What ``prefopt runs`` and ``prefopt plot`` read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.option import check_all, option
from prefopt.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Folders of runs to list, one run to tell about, or several to compare."""

    folder: list[str] | None = option(
        None,
        "folders whose runs are listed; or the output folders of one run, which is told about, or of several, which"
        " are compared",
        group="runs",
        default_text="the current folder",
        positional=True,
    )
    json: bool = option(False, "print JSON, for programs", group="runs")

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Runs to draw, and how."""

    run: list[str] = option(
        help="output folders of the runs to draw, and of chains of prefopt rlhf", group="plot", positional=True
    )
    output: str = option("curves.png", "picture to write: .png, .svg or .pdf", group="plot")
    metrics: list[str] | None = option(
        None,
        "what to draw, by the names of metrics.jsonl; the part before the slash draws chosen and rejected in one panel",
        group="plot",
        default_text="loss, margin, accuracy and log-ratios, as far as the runs have them",
    )
    x: Literal["step", "epoch"] = option(
        "step", "what the curves run over; epoch compares runs of different batch sizes", group="plot"
    )

    def __post_init__(self) -> None:
        check_all(self)
        if not self.output.lower().endswith(PICTURES):
            raise ConfigError(f"--output {self.output} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
