"""What ``prefopt data check``, ``convert`` and ``split`` read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.data import ReadOptions, RenderOptions
from prefopt.config.option import check_all, option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig(RenderOptions, ReadOptions):
    """What is in files of data, and what is wrong with it."""

    data: list[str] = option(
        help="files, folders, globs or Hub data sets to look at; one or more", group="data", positional=True
    )
    eval_data: list[str] | None = option(
        None, "data that a run evaluates on: looked at too, and compared with the prompts to train on", group="data"
    )
    want: Literal["pairs", "scored", "ranking", "labels", "demonstrations", "prompts"] | None = option(
        None, "what a run needs of every row", group="data", default_text="what each row says"
    )
    model: str | None = option(
        None,
        "model or tokenizer, a folder or a Hub name: counts tokens, and finds what only tokens show",
        group="model",
        default_text="none: lengths are in characters",
    )
    show: int = option(0, "examples to print, with --model as tokens, those trained in ⟦ ⟧", group="output", at_least=0)
    json: bool = option(
        False, "print one JSON document with all rows of every problem, and nothing else", group="output"
    )

    def __post_init__(self) -> None:
        check_all(self)
        if self.model is not None:
            return
        given = {
            "--max-length": self.max_length is not None,
            "--chat-template": self.chat_template is not None,
            "--template-variables": self.template_variables is not None,
            "--reasoning": self.reasoning != "keep",
        }
        if unread := [name for name, is_given in given.items() if is_given]:
            raise ConfigError(f"{unread[0]} is about tokens: name a model or tokenizer with --model")


@dataclass(frozen=True, kw_only=True)
class _Written(ReadOptions):
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "a row that cannot be read or written stops everything, or is left out and counted", group="data"
    )
    overwrite: bool = option(False, "replace files that exist", group="output")


@dataclass(frozen=True, kw_only=True)
class DataConvertConfig(_Written):
    """Rows into another layout."""

    data: list[str] = option(
        help="files, folders, globs or Hub data sets to read; one or more", group="data", positional=True
    )
    output: str = option(help="file to write: .jsonl or .parquet", group="output", positional=True)
    layout: str = option(
        "canonical", "layout of the rows that are written, as prefopt data layouts names them", group="output"
    )

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class DataSplitConfig(_Written):
    """Rows into two files, by prompt."""

    data: list[str] = option(
        help="files, folders, globs or Hub data sets to read; one or more", group="data", positional=True
    )
    fraction: float = option(help="part of the prompts that goes to --output-eval", group="data", above=0, below=1)
    seed: int = option(0, "another seed draws other prompts; a run with --eval-fraction draws the same", group="data")
    output_train: str = option(
        help="file for the rows to train on: .jsonl or .parquet", group="output", positional=True
    )
    output_eval: str = option(
        help="file for the rows to evaluate on: .jsonl or .parquet", group="output", positional=True
    )

    def __post_init__(self) -> None:
        check_all(self)
