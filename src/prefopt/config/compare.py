"""What ``prefopt compare`` reads.

>>> CompareConfig(a="new", b="old", prompts=["prompts.txt"], judge="length").num
1
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from prefopt.config.data import READING, RowOptions, SamplingOptions
from prefopt.config.judges import LLM, JudgeServerOptions
from prefopt.config.scoring import is_model_reward
from prefopt.config.training import MachineOptions, ProgressOptions
from prefopt.core.options import Config, flag, option, options
from prefopt.errors import ConfigError

_OF_VOTES = {"votes", *READING, "json", "progress"}
_OF_DRAWING = ("num", "max_new_tokens", "temperature")
_OF_READING = (*(name for name in READING if name != "picture_folder"), "on_bad_row")
"""Options that files of samples do not read."""
_OF_MACHINES = tuple(field.name for field in fields(MachineOptions))


@dataclass(frozen=True, kw_only=True)
class ComparisonJudgeOptions(Config):
    """What decides between two responses."""

    judge: str | None = option(
        None,
        "what decides which response is better: length, vader, regex:PATTERN, gsm8k (the answer after #### in the"
        " prompts' file), MODULE:FUNCTION of prompts and responses, a reward model's folder or name,"
        " implicit:MODEL,REFERENCE, or llm",
        group="judge",
        default_text="required",
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(
    JudgeServerOptions, ComparisonJudgeOptions, MachineOptions, ProgressOptions, SamplingOptions, RowOptions
):
    """Two or more models compared on prompts. Construction raises ``ConfigError``."""

    a: str | None = option(
        None, "a model, or a .jsonl file of its samples from prefopt sample", group="model", default_text="required"
    )
    b: str | None = option(None, "the model to compare it with, named in the same way", default_text="required")
    others: list[str] | None = option(
        None, "more models: all pairs are compared, and all models get a place on one scale"
    )
    reference: str | None = option(
        None, "reference model: each model's KL from it is measured on that model's own samples"
    )

    prompts: list[str] | None = option(
        None,
        "files, folders, globs or Hub data sets with prompts, in any layout; or .txt, one prompt per line",
        group="data",
        default_text="required; where all models are files of samples, only --judge gsm8k needs them",
    )
    category: str | None = option(None, "column of the prompts to report rates by")
    held_out: list[str] | None = option(None, "data to measure each model's perplexity on, over their best responses")
    votes: list[str] | None = option(None, "count people's votes instead: files of prefopt chat, or studies")

    tasks: list[str] | None = option(
        None, "lm-eval tasks to run on each model, to measure the alignment tax", group="tasks"
    )
    task_folder: str | None = option(None, "folder with your own tasks, in lm-eval's YAML", needs="tasks")
    task_limit: int | None = option(
        None, "maximum number of questions per task", default_text="all", needs="tasks", at_least=2
    )
    task_results: list[str] | None = option(
        None, "existing results of lm-eval, one file per model in this order: --a, --b, --others"
    )

    num: int = option(1, "samples per prompt and model", group="sampling", at_least=1)

    output: str | None = option(
        None, "file for the judged pairs: JSON lines, in a layout that dpo and reward read", group="output"
    )
    overwrite: bool = option(False, "replace an existing output file")
    json: bool = option(False, "print one JSON document, and nothing else")

    def check(self) -> None:
        if self.votes is not None:
            for name in (o.name for o in options(type(self)) if o.name not in _OF_VOTES and self.is_given(o.name)):
                raise ConfigError(f"{flag(name)}: --votes counts existing votes; leave one of them out")
            return
        for name in ("a", "b", "judge"):
            if getattr(self, name) is None:
                raise ConfigError(f"{flag(name)} is missing; or count people's votes with --votes")
        sampled = [name for name in self.models if not is_file(name)]
        if self.prompts is None and sampled:
            raise ConfigError(f"--prompts is missing: {sampled[0]} is to answer them")
        if not sampled:
            self._check_files()
        self.need("output", "overwrite")
        if len(set(self.models)) < len(self.models):
            raise ConfigError("one of the models is named twice; a model is not compared with itself")
        self.check_judge(self.judge == LLM, "--judge llm")
        if self.reference is not None and self.temperature != 1:
            raise ConfigError("--reference measures KL on unmodified samples of the model: leave --temperature out")
        if self.temperature == 0 and self.num > 1:
            raise ConfigError(f"--temperature 0 draws the same sample {self.num} times: leave --num out")
        self._check_tasks(sampled)

    def _check_files(self) -> None:
        """Refuse options of sampling and of models where all models are files of samples."""
        why = "all models are files of samples"
        for name in (n for n in _OF_DRAWING if self.is_given(n)):
            raise ConfigError(f"{flag(name)} configures sampling, and {why}; leave it out")
        if self.held_out is not None:
            raise ConfigError(f"--held-out measures models, and {why}; leave it out")
        if self.prompts is not None and self.judge != "gsm8k":
            raise ConfigError(f"--prompts are for models to answer, and {why}; leave it out")
        for name in (n for n in _OF_READING if self.prompts is None and self.is_given(n)):
            raise ConfigError(f"{flag(name)} is for prompts and held-out data, and {why}; leave it out")
        by_model = self.judge is not None and (is_model_reward(self.judge) or self.judge.startswith("implicit:"))
        for name in (n for n in _OF_MACHINES if self.reference is None and not by_model and self.is_given(n)):
            raise ConfigError(f"{flag(name)} is for running models, and {why}; leave it out")

    def _check_tasks(self, sampled: list[str]) -> None:
        if self.tasks is not None and self.task_results is not None:
            raise ConfigError("--task-results are existing results: leave --task-results or --tasks out")
        if self.tasks is not None and len(sampled) < len(self.models):
            files = next(name for name in self.models if is_file(name))
            raise ConfigError(f"--tasks needs models, and {files} holds samples; give --task-results instead")
        if self.task_results is not None and len(self.task_results) != len(self.models):
            raise ConfigError(
                f"--task-results names {len(self.task_results)} files for {len(self.models)} models; name one for each"
            )

    @property
    def models(self) -> list[str]:
        return [name for name in (self.a, self.b, *(self.others or ())) if name is not None]


def is_file(model: str) -> bool:
    """Whether a model is given by a file of its samples."""
    return model.endswith(".jsonl")
