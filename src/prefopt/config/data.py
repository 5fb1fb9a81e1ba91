"""Options that say which data are read, how, and what becomes of a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from prefopt.core.options import option
from prefopt.errors import ConfigError

# Options that say how rows are understood, for whoever hands them on.
READING = ("format", "columns", "label_means", "ignore_columns", "header")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How the rows of a file are understood."""

    format: str | None = option(
        None,
        "layout of the rows, as prefopt data layouts names them",
        group="data",
        default_text="recognised from all rows, or from a dataset_info.json beside the file",
    )
    columns: list[str] | None = option(
        None,
        "columns and roles by another name, NAME=COLUMN, such as prompt=question or user_tag=human",
        group="data",
    )
    label_means: list[str] | None = option(
        None,
        "what labels mean, LABEL=MEANING: first, second, tie; or good, bad; such as 0=first,1=second,2=tie",
        group="data",
    )
    ignore_columns: list[str] | None = option(
        None, "columns that are left unread on purpose, such as responses or scores", group="data"
    )
    header: Literal["first-line", "none"] = option(
        "first-line", "what names the columns of .csv and .tsv files; none: they are called 1, 2, ...", group="data"
    )

    @property
    def column_words(self) -> list[str] | None:
        """What is said of columns, see :func:`prefopt.data.layouts.columns.parse_column_options`; none for nothing."""
        words = list(self.columns or ())
        words += [f"--label-means={word}" for word in self.label_means or ()]
        words += [f"--ignore-columns={word}" for word in self.ignore_columns or ()]
        return words + ["--header=none"] * (self.header == "none") or None


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """How a conversation becomes text."""

    chat_template: str | None = option(
        None,
        "file with a chat template (Jinja) to render conversations with",
        group="data",
        default_text="the tokenizer's own",
    )
    template_variables: list[str] | None = option(
        None,
        "what the chat template is given besides the turns, NAME=VALUE, such as enable_thinking=false",
        group="data",
    )


@dataclass(frozen=True, kw_only=True)
class RenderOptions(TemplateOptions):
    """How a conversation becomes tokens."""

    max_length: int | None = option(
        None,
        "tokens of prompt and response together; longer conversations lose their oldest turns, then words of a turn,"
        " then the ends of responses, and are counted",
        group="data",
        default_text="1024, or the model's context where that is smaller",
        at_least=2,
    )
    reasoning: Literal["keep", "strip"] = option(
        "keep", "reasoning blocks of the answers: trained with them, or left out", group="data"
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(RenderOptions, ReadOptions):
    """The data of a run: part of the config of every verb that trains."""

    data: list[str] = option(help="files, folders, globs or Hub data sets to train on; one or more", group="data")
    data_weights: list[str] | None = option(
        None,
        "how often an epoch takes the rows of each --data, in their order: 2 is twice, 0.5 another half every epoch",
        group="data",
        default_text="each once",
    )
    eval_data: list[str] | None = option(None, "data to evaluate on, named as --data is", group="data")
    eval_fraction: float = option(
        0.0,
        "part of the prompts to hold out for evaluation; no prompt is on both sides",
        group="data",
        at_least=0,
        below=1,
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "a row that cannot be used stops the run, or is left out and counted", group="data"
    )
    shuffle: bool = option(True, "draw a new order every epoch, from the seed", group="data")

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out or given to evaluate on."""
        return self.eval_data is not None or self.eval_fraction > 0

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
        return [_weight(text, name) for text, name in zip(given, names, strict=True)]

    def check_data(self) -> None:
        """Refuse contradictions. Raises ``ConfigError``."""
        _ = self.weights
        if self.eval_data is not None and self.eval_fraction > 0:
            raise ConfigError("--eval-data and --eval-fraction both name evaluation pairs: give one of them")


def _weight(text: str, name: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"--data-weights {text}: the weight of {name} must be a number above 0, such as 0.5")
    return weight
