"""What ``prefopt report`` reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.option import check_all, option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Runs to tell about, and the page to write."""

    run: list[str] | None = option(
        None,
        "output folders of the runs to tell about, of chains of prefopt rlhf, and of sweeps of prefopt frontier",
        group="report",
        default_text="none; then give --comparisons",
        positional=True,
    )
    comparisons: list[str] | None = option(
        None, "files of what prefopt compare --json printed: win rates, and some of the samples", group="report"
    )
    output: str = option("report.html", "page to write", group="report")
    title: str | None = option(
        None, "heading of the page", group="report", default_text="the names of the runs' folders"
    )

    def __post_init__(self) -> None:
        check_all(self)
        if not self.output.lower().endswith((".html", ".htm")):
            raise ConfigError(f"--output {self.output} must end in .html")
