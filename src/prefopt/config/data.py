"""Options that say which data are read, how rows are parsed and rendered, and what happens to a bad row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefopt.core.files import expanded
from prefopt.core.options import Config, option
from prefopt.errors import ConfigError

READING = ("format", "columns", "label_means", "ignore_columns", "header", "picture_folder")
"""The options of :class:`ReadOptions`, for whoever hands them on."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Config):
    """How the rows of a file are parsed."""

    format: str | None = option(
        None,
        "layout of the rows: a name that prefopt data layouts lists, or your own as module:function",
        group="data",
        default_text="recognised from all rows, or from a dataset_info.json beside the file",
    )
    columns: list[str] | None = option(
        None, "renamed columns and roles, NAME=COLUMN, such as prompt=question or user_tag=human"
    )
    label_means: list[str] | None = option(
        None,
        "meaning of label values, LABEL=MEANING, with first, second, tie, good or bad, such as 0=first,1=second,2=tie",
    )
    ignore_columns: list[str] | None = option(None, "columns to ignore on purpose, such as responses or scores")
    header: Literal["first-line", "none"] = option(
        "first-line",
        "where .csv and .tsv files name their columns; none: nowhere, and the columns are called 1, 2, ...",
    )
    picture_folder: str | None = option(
        None,
        "folder that rows may name files of pictures in: relative paths start there, and rows that name a file outside"
        " of it are refused; / permits all",
        default_text="the folder of each data file, and of rows in memory the working folder",
    )

    @property
    def column_words(self) -> list[str] | None:
        """The options on columns and pictures, as :mod:`prefopt.data.layouts.columns` parses them; None without any."""
        words = list(self.columns or ())
        words += [f"--label-means={word}" for word in self.label_means or ()]
        words += [f"--ignore-columns={word}" for word in self.ignore_columns or ()]
        words += self.picture_words or ()
        return words + ["--header=none"] * (self.header == "none") or None

    @property
    def picture_words(self) -> list[str] | None:
        """The option on pictures alone, for files that the others are not about."""
        if self.picture_folder is None:
            return None
        return [f"--picture-folder={Path(expanded(self.picture_folder)).absolute()}"]  # whole, for keys of caches


@dataclass(frozen=True, kw_only=True)
class RowOptions(ReadOptions):
    """The same, and what happens to a row that cannot be used."""

    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse",
        "a row that cannot be used: refuse stops with an error, skip leaves it out and counts it",
        group="data",
    )


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Config):
    """The prompts that a model answers."""

    prompts: list[str] = option(
        help="files, folders, globs or Hub data sets with prompts, in any layout; or .txt, one prompt per line",
        group="data",
    )
    lines: Literal["auto", "user", "text"] = option(
        "auto", "the lines of a .txt: user turns, or text to continue; auto: user turns if there is a chat template"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Config):
    """How samples are drawn."""

    max_new_tokens: int = option(256, "maximum tokens of a sample", group="sampling", at_least=1)
    temperature: float = option(
        1.0,
        "sampling temperature, which divides the logits; 0 is greedy decoding",
        at_least=0,
    )
    seed: int = option(
        0,
        "seed of the samples; each prompt has its own random stream, so its samples do not depend on the batch",
        at_least=0,
        at_most=2**32 - 1,
    )


@dataclass(frozen=True, kw_only=True)
class TemplateOptions(Config):
    """How a conversation becomes text."""

    chat_template: str | None = option(
        None, "file with a chat template (Jinja)", group="data", default_text="the tokenizer's own"
    )
    template_variables: list[str] | None = option(
        None, "variables of the chat template, NAME=VALUE, such as enable_thinking=false"
    )


@dataclass(frozen=True, kw_only=True)
class RenderOptions(TemplateOptions):
    """How a conversation becomes tokens."""

    max_length: int | None = option(
        None,
        "maximum tokens of prompt and response together; longer conversations lose their oldest turns first, then words"
        " of a turn, then the ends of responses, and are counted",
        group="data",
        default_text="1024, or the model's context where that is smaller",
        at_least=2,
    )
    reasoning: Literal["keep", "strip"] = option("keep", "reasoning blocks of responses: train on them, or remove them")
    earlier_turns: Literal["auto", "as-generated", "as-shown"] = option(
        "auto",
        "turns of a response that the chat template changes once another follows: trained as they were generated, in a"
        " sequence of their own, or as the finished conversation shows them; auto: as generated in rows where that"
        " loses reasoning, tool calls, words or the end token of such a turn",
    )


@dataclass(frozen=True, kw_only=True)
class CompareOptions(RenderOptions):
    """The same, and what of a row is compared."""

    compare: Literal["responses", "steps"] = option(
        "responses",
        "what is compared: whole responses, or each assistant turn that has a label or a rejected alternative,"
        " after the turns before it",
        group="data",
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(CompareOptions, RowOptions):
    """The data of a run: part of the config of every command that trains."""

    data: list[str] = option(help="files, folders, globs or Hub data sets to train on; one or more", group="data")
    data_weights: list[str] | None = option(
        None,
        "times that an epoch reads each --data, one number for each: 2 is twice, 0.5 a different half every epoch",
        default_text="once each",
    )
    eval_data: list[str] | None = option(None, "evaluation data, named like --data")
    eval_fraction: float | None = option(
        0.0, "fraction of the prompts to hold out for evaluation; no prompt is in both sets", at_least=0, below=1
    )
    shuffle: bool = option(True, "shuffle the rows every epoch, by the seed")

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on; where ``eval_fraction`` is None, there may be."""
        return self.eval_data is not None or self.eval_fraction != 0

    @property
    def weights(self) -> list[float] | None:
        """``data_weights`` as numbers, one for each name in ``data``. Raises ``ConfigError``."""
        given, names = self.data_weights, self.data
        if given is None:
            return None
        if len(given) != len(names):
            raise ConfigError(
                f"--data-weights has {len(given)} numbers and --data {len(names)} names: give one number for each name"
            )
        return [
            positive(text, f"--data-weights {text}: the weight of {n}") for text, n in zip(given, names, strict=True)
        ]

    def check(self) -> None:
        _ = self.weights
        if self.eval_data is not None and self.eval_fraction:
            raise ConfigError("--eval-data and --eval-fraction both name evaluation data: give one of them")


def positive(text: str, name: str) -> float:
    """``text`` as a number above 0. Raises ``ConfigError`` that begins with ``name``."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{name} must be a number above 0, such as 0.5")
    return number
