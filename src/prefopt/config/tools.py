"""What the commands on data, models, the cache and runs read.

>>> ScoreConfig(files=["samples.jsonl"], reward="length", output="scored.jsonl").reward
'length'
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from prefopt.config.data import CompareOptions, ReadOptions, RowOptions
from prefopt.config.scoring import ScorerOptions
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import Config, flag, option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig(CompareOptions, ReadOptions):
    """Contents and problems of data files. Construction raises ``ConfigError``."""

    data: list[str] = option(
        help="files, folders, globs or Hub data sets to check; one or more", group="data", positional=True
    )
    eval_data: list[str] | None = option(
        None, "evaluation data to check as well, also for prompts that the training data have too"
    )
    want: Literal["pairs", "scored", "ranking", "labels", "demonstrations", "prompts"] | None = option(
        None, "form that every row must have", default_text="that of each row"
    )
    model: str | None = option(
        None,
        "model or tokenizer, a folder or a Hub name: counts tokens and checks their rendering",
        group="model",
        default_text="none: lengths are in characters",
    )
    show: int = option(0, "examples to print, with --model as tokens, trained ones in ⟦ ⟧", group="output", at_least=0)
    json: bool = option(False, "print one JSON document with all rows of every problem, and nothing else")

    def check(self) -> None:
        for f in fields(CompareOptions):
            if self.model is None and self.is_given(f.name):
                raise ConfigError(f"{flag(f.name)} needs tokens: add --model with a model or tokenizer")


@dataclass(frozen=True, kw_only=True)
class WriteOptions(RowOptions):
    """Part of the config of commands that write rows."""

    data: list[str] = option(
        help="files, folders, globs or Hub data sets to read; one or more", group="data", positional=True
    )
    overwrite: bool = option(False, "replace files that exist", group="output")


@dataclass(frozen=True, kw_only=True)
class DataConvertConfig(WriteOptions):
    """Conversion of rows to another layout."""

    output: str = option(help="file to write: .jsonl or .parquet", group="output", positional=True)
    layout: str = option("canonical", "layout to write, by its name in prefopt data layouts")


@dataclass(frozen=True, kw_only=True)
class DataSplitConfig(WriteOptions):
    """Split of rows into two files, by prompt."""

    fraction: float = option(help="fraction of the prompts to write to --output-eval", group="data", above=0, below=1)
    seed: int = option(0, "seed of the split; a run with --eval-fraction and this seed holds out the same prompts")
    output_train: str = option(
        help="file for the rows to train on: .jsonl or .parquet", group="output", positional=True
    )
    output_eval: str = option(help="file for the rows to evaluate on: .jsonl or .parquet", positional=True)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScorerOptions, ReadOptions):
    """Scores for all responses of some files. Construction raises ``ConfigError``."""

    files: list[str] = option(
        help="files, folders, globs or Hub data sets with responses, in any layout", group="data", positional=True
    )
    output: str = option(help="file to write, JSON lines: the same rows with their scores", group="output")
    overwrite: bool = option(False, "replace an existing output file")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Config):
    """A model and the adapter to merge into it. ``model`` alone may be the adapter."""

    adapter: str = option(
        help="LoRA adapter to merge: a folder, or a name on the Hugging Face Hub",
        group="model",
        computed=lambda c: c.model if c.model is not None and is_adapter(c.model) else None,
        default_text="--model, where that is an adapter",
    )
    model: str | None = option(None, "model that the adapter belongs to", default_text="the one that the adapter names")
    output: str = option(help="folder for the merged model", group="output")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "type of the saved weights; two-byte types halve the folder and lose part of a small update to rounding, which"
        " the command reports",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps", group="machine", default_text="the first available of cuda, mps and cpu"
    )

    def check(self) -> None:
        if self.adapter is None:
            raise ConfigError("--adapter is missing: LoRA adapter to merge, a folder or a name on the Hub")
        if self.adapter == self.model:
            object.__setattr__(self, "model", None)


@dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """A finished folder and the repository to upload it to."""

    folder: str = option(help="folder of a finished model or adapter", group="push", positional=True)
    repo: str = option(help="repository on the Hugging Face Hub, OWNER/NAME; created if absent")
    private: bool = option(
        True, "create a private repository, and refuse one that exists and is public; false creates a public one"
    )
    with_run: bool = option(
        False, "upload run.json, metrics.jsonl and config.yaml too; they contain paths of this machine"
    )
    with_checkpoints: bool = option(False, "upload checkpoints too, with optimiser states")
    yes: bool = option(False, "do not ask for confirmation")


@dataclass(frozen=True, kw_only=True)
class CacheListConfig(Config):
    """No options: the folder is ``PREFOPT_CACHE``."""


@dataclass(frozen=True, kw_only=True)
class CacheVerifyConfig(Config):
    """Check of all cached files against their checksums."""

    repair: bool = option(
        False, "remove damaged files, so that their contents are computed again when needed", group="cache"
    )


@dataclass(frozen=True, kw_only=True)
class CacheClearConfig(Config):
    """Entries to remove; two conditions must both hold."""

    space: list[str] | None = option(
        None, "ids of entries to remove, from prefopt cache list", group="cache", default_text="all"
    )
    older_than: float | None = option(
        None, "remove only entries unused for this many days", default_text="any age", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Runs to report, and the page to write. Construction raises ``ConfigError``."""

    run: list[str] | None = option(
        None,
        "output folders of runs, of prefopt rlhf and of prefopt frontier",
        group="report",
        default_text="none; then give --comparisons",
        positional=True,
    )
    comparisons: list[str] | None = option(
        None, "output files of prefopt compare --json: win rates, and some of the samples"
    )
    output: str = option("report.html", "page to write")
    title: str | None = option(None, "heading of the page", default_text="the names of the runs' folders")

    def check(self) -> None:
        if not self.output.lower().endswith((".html", ".htm")):
            raise ConfigError(f"--output {self.output} must end in .html")


@dataclass(frozen=True, kw_only=True)
class UiConfig(Config):
    """The folder of a local page, and its port. It listens on this machine alone."""

    folder: str = option(".", "folder of runs; what the page starts is written below it", group="page", positional=True)
    port: int = option(8710, "port to listen on; 0 takes a free one", at_least=0, at_most=65535)
    open: bool = option(False, "open the page in the browser")


PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class RunsConfig(Config):
    """Folders of runs to list, one run to describe, or several to compare."""

    folder: list[str] | None = option(
        None,
        "folders to list the runs of; or the output folder of one run to describe, or of two to compare",
        group="runs",
        default_text="the current folder",
        positional=True,
    )
    sort: str | None = option(
        None,
        "order: started, name, method, took, status, accuracy, loss or reward (the best first), or an option's name",
        default_text="started",
    )
    json: bool = option(False, "print JSON, for programs")
    csv: bool = option(False, "print CSV, for spreadsheets: every option that a run sets is a column")

    def check(self) -> None:
        if self.json and self.csv:
            raise ConfigError("--json and --csv are two forms of the output: give one")


@dataclass(frozen=True, kw_only=True)
class PlotConfig(Config):
    """Runs to plot. Construction raises ``ConfigError``."""

    run: list[str] = option(
        help="output folders of the runs to plot, and of prefopt rlhf", group="plot", positional=True
    )
    output: str = option("curves.png", "image to write: .png, .svg or .pdf")
    metrics: list[str] | None = option(
        None,
        "metrics to plot, by their names in metrics.jsonl; a name up to its slash plots chosen and rejected together",
        default_text="loss, margin, accuracy and log-ratios, where the runs have them",
    )
    x: Literal["step", "epoch"] = option("step", "x axis; epoch compares runs of different batch sizes")

    def check(self) -> None:
        if not self.output.lower().endswith(PICTURES):
            raise ConfigError(f"--output {self.output} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")


@dataclass(frozen=True, kw_only=True)
class LossesConfig(Config):
    """The list of losses, or the description of one."""

    name: str | None = option(
        None,
        "loss to describe: a name, or your own as module:function",
        group="loss",
        default_text="a list of all",
        positional=True,
    )


@dataclass(frozen=True, kw_only=True)
class DataLayoutsConfig(Config):
    """The list of layouts, or the description of one."""

    name: str | None = option(None, "layout to describe", group="layout", default_text="a list of all", positional=True)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """The demonstration."""

    output: str = option("runs/demo", "folder for the results", group="output")
    seed: int = option(0, "seed of prompts, samples and training", group="machine", at_least=0, at_most=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class EnvConfig(Config):
    """The state of this installation."""

    json: bool = option(False, "print JSON, for programs", group="env")


@dataclass(frozen=True, kw_only=True)
class CompletionConfig(Config):
    """The shell to complete commands in."""

    shell: Literal["bash", "zsh", "fish"] = option(
        help="shell: bash, zsh or fish; the script's first line says where it goes", group="shell", positional=True
    )
