"""What ``prefopt data check``, ``convert`` and ``split`` read.

>>> ScoreConfig(files=["samples.jsonl"], reward="length", output="scored.jsonl").reward
'length'
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from prefopt.config.data import ReadOptions, RenderOptions
from prefopt.config.training import MachineOptions
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import check_all, flag, option
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


IMPLICIT = "implicit"
BETA = 0.1
RULES = ("vader", "length")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(MachineOptions, RenderOptions, ReadOptions):
    """Giving every response of some files a number.

    ``beta`` is filled in for the implicit reward.
    """

    files: list[str] = option(
        help="files, folders, globs or Hub data sets with responses, in any layout", group="data", positional=True
    )
    reward: str = option(
        help="what gives the number: a rule (vader: sentiment; length: words), MODULE:FUNCTION of prompts and"
        " responses, two lists of text, the folder or Hub name of a reward model, or implicit",
        group="reward",
    )
    model: str | None = option(None, "of --reward implicit: the model that was aligned", group="reward")
    adapter: str | None = option(None, "of --reward implicit: LoRA adapter on the model", group="reward")
    reference: str | None = option(
        None,
        "of --reward implicit: what it was aligned from",
        group="reward",
        default_text="with an adapter the model without it",
    )
    beta: float = option(
        None,
        "of --reward implicit: what the log-ratio is multiplied by, as in training",
        group="reward",
        default_text=f"{BETA}",
        above=0,
    )
    output: str = option(help="file to write, JSON lines: the same rows with their scores", group="output")
    overwrite: bool = option(False, "replace the output file where it is there", group="output")

    def __post_init__(self) -> None:
        check_all(self)
        self.check_machine()
        if self.reward == IMPLICIT:
            if self.model is None:
                raise ConfigError("--reward implicit compares two models: give --model and --reference")
            if self.reference is None and self.adapter is None and not is_adapter(self.model):
                raise ConfigError("--reward implicit: --model is compared with nothing; give --reference")
            if self.beta is None:
                object.__setattr__(self, "beta", BETA)
            return
        if not self.by_model:
            for f in (*fields(MachineOptions), *fields(RenderOptions)):
                if getattr(self, f.name) != f.default:
                    what = "is for rewards that are models"
                    raise ConfigError(f"{flag(f.name)} {what}, and {self.reward} is not: leave it out")
        for name in ("model", "adapter", "reference", "beta"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{flag(name)} is read with --reward implicit alone; leave it out")

    @property
    def by_model(self) -> bool:
        """Whether a model gives the numbers: ``implicit``, a folder, or a name on the Hub."""
        return self.reward == IMPLICIT or is_model_reward(self.reward)


def is_model_reward(name: str) -> bool:
    """Whether a reward is named as models are: ``owner/name``, a path, or a folder that is there; a rule is none."""
    return name not in RULES and ":" not in name and ("/" in name or Path(name).expanduser().is_dir())


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """A model and the adapter that becomes part of it. ``model`` alone may be an adapter: it is then moved there."""

    adapter: str = option(
        None,
        "LoRA adapter to fold in: a folder, or a name on the Hugging Face Hub",
        group="model",
        default_text="--model, where that is an adapter",
    )
    model: str | None = option(
        None, "model that the adapter belongs to", group="model", default_text="the one that the adapter names"
    )
    output: str = option(help="folder to write the whole model to", group="output")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "type of the saved weights; those of two bytes halve the folder, and round away the part of a small change"
        " that the command tells",
        group="output",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps", group="machine", default_text="cuda, then mps, where there is one, else cpu"
    )

    def __post_init__(self) -> None:
        check_all(self)
        if self.adapter is None:
            if self.model is None or not is_adapter(self.model):
                raise ConfigError("--adapter is missing: LoRA adapter to fold in, a folder or a name on the Hub")
            object.__setattr__(self, "adapter", self.model)
            object.__setattr__(self, "model", None)


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """A finished folder and where it goes."""

    folder: str = option(help="folder of a finished model or adapter", group="push", positional=True)
    repo: str = option(help="repository on the Hugging Face Hub, OWNER/NAME; made where there is none", group="push")
    private: bool = option(False, "make a new repository private; refused where it is there and public", group="push")
    with_run: bool = option(
        False, "upload run.json, metrics.jsonl and config.yaml too; they name folders of this machine", group="push"
    )
    with_checkpoints: bool = option(False, "upload checkpoints too, with the optimiser's state", group="push")
    yes: bool = option(False, "do not ask before anything is sent", group="push")

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class CacheListConfig:
    """Listing takes no option: the folder is ``PREFOPT_CACHE``."""


@dataclass(frozen=True, kw_only=True)
class CacheVerifyConfig:
    """Checking every stored file against its checksum."""

    repair: bool = option(
        False, "take damaged files out of use, so that what they held is made again when needed", group="cache"
    )

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class CacheClearConfig:
    """Removing entries. Both conditions together remove what meets both."""

    space: list[str] | None = option(
        None, "ids of what to remove, as prefopt cache list shows them", group="cache", default_text="all"
    )
    older_than: float | None = option(
        None, "remove only what was not used for this many days", group="cache", default_text="any age", at_least=0
    )

    def __post_init__(self) -> None:
        check_all(self)


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


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """The list of losses, or one of them."""

    name: str | None = option(
        None, "loss to tell everything of", group="loss", default_text="a list of all", positional=True
    )

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class DataLayoutsConfig:
    """The list of layouts, or one of them."""

    name: str | None = option(
        None, "layout to tell everything of", group="layout", default_text="a list of all", positional=True
    )

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demonstration decides everything but where its results go and the seed."""

    output: str = option("runs/demo", "folder to write the results to", group="output")
    seed: int = option(0, "seed of prompts, samples and training", group="machine", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """How the state of this installation is printed."""

    json: bool = option(False, "print JSON, for programs", group="env")

    def __post_init__(self) -> None:
        check_all(self)
