"""What ``prefopt score`` reads; it checks itself.

>>> ScoreConfig(files=["samples.jsonl"], reward="length", output="scored.jsonl").reward
'length'
"""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.data import ReadOptions
from prefopt.config.option import check_all, option


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ReadOptions):
    """Giving every response of some files a number."""

    files: list[str] = option(
        help="files, folders, globs or Hub data sets with responses, in any layout", group="data", positional=True
    )
    reward: str = option(
        help="what gives the number: a rule (vader: sentiment; length: words), or MODULE:FUNCTION of prompts and"
        " responses, two lists of text",
        group="reward",
    )
    output: str = option(help="file to write, JSON lines: the same rows with their scores", group="output")
    overwrite: bool = option(False, "replace the output file where it is there", group="output")

    def __post_init__(self) -> None:
        check_all(self)
