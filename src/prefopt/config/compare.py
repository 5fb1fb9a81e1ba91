"""What ``prefopt compare`` reads; it checks itself.

>>> CompareConfig(a="new", b="old", prompts=["prompts.txt"], judge="length").num
1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from prefopt.config.data import READING, ReadOptions
from prefopt.config.tools import is_model_reward
from prefopt.config.training import MachineOptions
from prefopt.core.options import check_all, flag, from_dict, option, options, to_dict
from prefopt.errors import ConfigError

_OF_VOTES = {"votes", *READING, "seed", "json", "progress"}
_OF_DRAWING = ("num", "max_new_tokens", "temperature")
_OF_READING = (*READING, "on_bad_row")
_OF_MACHINES = tuple(field.name for field in fields(MachineOptions))
_OF_TASKS = ("tasks", "task_folder", "task_limit", "task_results")
_OF_LLM = ("judge_url", "judge_model", "judge_key")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(MachineOptions, ReadOptions):
    """Which of two or more models is better on some prompts. Construction raises ``ConfigError``."""

    a: str | None = option(
        None, "a model, or a .jsonl file that prefopt sample wrote with one", group="model", default_text="required"
    )
    b: str | None = option(None, "the model that it is compared with, likewise", group="model", default_text="required")
    others: list[str] | None = option(
        None, "more models: each is compared with each, and all are put on one scale", group="model"
    )
    reference: str | None = option(
        None, "model that each model's distance (KL) is measured to, on its own samples", group="model"
    )

    prompts: list[str] | None = option(
        None,
        "files, folders, globs or Hub data sets with prompts, in any layout; or .txt, a prompt in every line",
        group="data",
        default_text="required, unless all models are files of samples, and then for --judge gsm8k alone",
    )
    category: str | None = option(None, "column of the prompts by which rates are told apart", group="data")
    held_out: list[str] | None = option(
        None, "data whose best responses each model's perplexity is measured on", group="data"
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse",
        "a row of prompts or held-out data that cannot be used stops the comparison, or is left out and counted",
        group="data",
    )
    votes: list[str] | None = option(
        None, "votes of people to count instead: files of prefopt chat, or studies", group="data"
    )

    judge: str | None = option(
        None,
        "who says which response is better: length, vader, regex:PATTERN, gsm8k (the answer behind #### in the"
        " prompts' file), MODULE:FUNCTION of prompts and responses, a reward model's folder or name,"
        " implicit:MODEL,REFERENCE, or llm",
        group="judge",
        default_text="required",
    )
    judge_url: str | None = option(
        None, "where the judge llm is: an OpenAI-compatible server, such as http://localhost:8000/v1", group="judge"
    )
    judge_model: str | None = option(None, "its name there", group="judge", default_text="the server's only model")
    judge_key: str | None = option(
        None, "environment variable with the server's key", group="judge", default_text="none is sent"
    )

    tasks: list[str] | None = option(
        None, "tasks of lm-eval to put each model through: what alignment cost elsewhere", group="tasks"
    )
    task_folder: str | None = option(None, "folder with tasks of your own, in lm-eval's YAML", group="tasks")
    task_limit: int | None = option(
        None, "questions of each task at most", group="tasks", default_text="all", at_least=2
    )
    task_results: list[str] | None = option(
        None,
        "results of tasks that lm-eval wrote already, a file for each model in their order: --a, --b, --others",
        group="tasks",
    )

    num: int = option(1, "samples of every prompt and model", group="sampling", at_least=1)
    max_new_tokens: int = option(256, "tokens of a sample at most", group="sampling", at_least=1)
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", group="sampling", at_least=0)
    seed: int = option(0, "seed of the samples and of resampling", group="sampling", at_least=0, at_most=2**32 - 1)

    output: str | None = option(
        None, "file to write the judged pairs to, JSON lines that read as preferences", group="output"
    )
    overwrite: bool = option(False, "replace the output file where it is there", group="output")
    json: bool = option(False, "print one JSON document, and nothing else", group="output")
    progress: Literal["auto", "rich", "plain", "none"] = option(
        "auto", "how progress is shown; auto: rich on a terminal, plain lines elsewhere", group="output"
    )

    def __post_init__(self) -> None:
        check_all(self)
        self.check_machine()
        if self.votes is not None:
            for name in (o.name for o in options(type(self)) if o.name not in _OF_VOTES and self._given(o.name)):
                raise ConfigError(f"{flag(name)}: --votes counts what was judged already; leave one of them out")
            return
        for name in ("a", "b", "judge"):
            if getattr(self, name) is None:
                raise ConfigError(f"{flag(name)} is missing; or count votes of people with --votes")
        sampled = [name for name in self.models if not is_file(name)]
        if self.prompts is None and sampled:
            raise ConfigError(f"--prompts is missing, which {sampled[0]} is to answer")
        if not sampled:
            self._check_files()
        if self.overwrite and self.output is None:
            raise ConfigError("--overwrite belongs to --output; leave it out")
        if len(set(self.models)) < len(self.models):
            raise ConfigError("one of the models is named twice; a model is not compared with itself")
        if self.judge == "llm" and self.judge_url is None:
            raise ConfigError("--judge llm needs --judge-url, the address of the server that judges")
        for name in _OF_LLM:
            if getattr(self, name) is not None and self.judge != "llm":
                raise ConfigError(f"{flag(name)} belongs to --judge llm; leave it out")
        if self.reference is not None and self.temperature != 1:
            raise ConfigError("--reference measures KL on samples of the model itself: leave --temperature out")
        if self.temperature == 0 and self.num > 1:
            raise ConfigError(f"--temperature 0 draws the same sample {self.num} times: leave --num out")
        self._check_tasks(sampled)

    def _given(self, name: str) -> bool:
        """Whether an option has another value than it has by itself."""
        return bool(getattr(self, name) != self.__dataclass_fields__[name].default)

    def _check_files(self) -> None:
        """Models that are all files of samples draw nothing, so that what says how is refused."""
        why = "all models are files of samples"
        for name in (n for n in _OF_DRAWING if self._given(n)):
            raise ConfigError(f"{flag(name)} says how samples are drawn, and {why}; leave it out")
        if self.held_out is not None:
            raise ConfigError(f"--held-out measures models, and {why}; leave it out")
        if self.prompts is not None and self.judge != "gsm8k":
            raise ConfigError(f"--prompts are what models answer, and {why}, which hold theirs; leave it out")
        for name in (n for n in _OF_READING if self.prompts is None and self._given(n)):
            raise ConfigError(f"{flag(name)} is for prompts and held-out data, and {why}; leave it out")
        by_model = self.judge is not None and (is_model_reward(self.judge) or self.judge.startswith("implicit:"))
        for name in (n for n in _OF_MACHINES if self.reference is None and not by_model and self._given(n)):
            raise ConfigError(f"{flag(name)} says how models compute, and none does here: {why}; leave it out")

    def _check_tasks(self, sampled: list[str]) -> None:
        if self.tasks is None:
            for name in ("task_folder", "task_limit"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{flag(name)} belongs to --tasks; leave it out")
        elif self.task_results is not None:
            raise ConfigError("--task-results are of tasks that were run already: leave it or --tasks out")
        elif len(sampled) < len(self.models):
            files = next(name for name in self.models if is_file(name))
            raise ConfigError(f"--tasks needs models, and {files} holds samples; give --task-results instead")
        if self.task_results is not None and len(self.task_results) != len(self.models):
            raise ConfigError(
                f"--task-results names {len(self.task_results)} files for {len(self.models)} models; name one for each"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> CompareConfig:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return from_dict(cls, values, place)

    @property
    def models(self) -> list[str]:
        """All models, in their order."""
        return [name for name in (self.a, self.b, *(self.others or ())) if name is not None]


def is_file(model: str) -> bool:
    """Whether a model is given by a file of its samples."""
    return model.endswith(".jsonl")
