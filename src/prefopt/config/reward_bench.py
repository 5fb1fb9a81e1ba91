"""What ``prefopt reward-bench`` reads.

>>> RewardBenchConfig(data=["reward-bench"], reward="length").on_bad_row
'refuse'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.scoring import ScorerOptions
from prefopt.core.options import option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RewardBenchConfig(ScorerOptions):
    """A reward and the files of benchmarks to judge it on. Construction raises ``ConfigError``."""

    data: list[str] = option(
        help="files, folders or globs in the layout of RewardBench, RewardBench 2, RM-Bench or JudgeBench, which is"
        " recognised by the fields of a row",
        group="data",
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse",
        "a row that cannot be used: refuse stops with an error, skip leaves it out and counts it; numbers without some"
        " rows are not the benchmark's",
        group="data",
    )
    output: str | None = option(
        None, "file to write, JSON: all numbers, and the score of every response", group="output", default_text="none"
    )
    html: str | None = option(None, "page to write: the tables with a figure", default_text="none")
    overwrite: bool = option(False, "replace files that exist")
    json: bool = option(False, "print JSON, for programs")

    def check(self) -> None:
        super().check()
        if self.html is not None and not self.html.lower().endswith((".html", ".htm")):
            raise ConfigError(f"--html {self.html} must end in .html")
