"""What ``prefopt sample`` and ``prefopt chat`` read.

>>> SampleConfig(model="m", prompts="prompts.txt", output="samples.jsonl").num
1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.config.data import ReadOptions, TemplateOptions
from prefopt.config.training import MachineOptions
from prefopt.core import options as _options
from prefopt.core.options import check_all, flag, option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SampledOptions:
    """What is sampled from; a class of its own so that it stands first."""

    model: str = option(
        help="model to sample from: a folder, or the name of one on the Hugging Face Hub", group="model"
    )
    adapter: str | None = option(None, "LoRA adapter on the model", group="model")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(MachineOptions, TemplateOptions, ReadOptions, SampledOptions):
    """One run of a sampler. Construction checks types, ranges and contradictions, and raises ``ConfigError``."""

    prompts: list[str] = option(
        help="files, folders, globs or Hub data sets with prompts, in any layout; or .txt, a prompt in every line",
        group="data",
    )
    lines: Literal["auto", "user", "text"] = option(
        "auto",
        "what the lines of a .txt are: the user's turns, or text to continue; auto: turns if there is a chat template",
        group="data",
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "a row that cannot be used stops the run, or is left out and counted", group="data"
    )

    num: int = option(1, "samples of every prompt", group="sampling", at_least=1)
    max_new_tokens: int = option(256, "tokens of a sample at most", group="sampling", at_least=1)
    min_new_tokens: int = option(0, "tokens of a sample at least", group="sampling", at_least=0)
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", group="sampling", at_least=0)
    top_p: float = option(
        1.0, "draw from the likeliest tokens that together have this probability", group="sampling", above=0, at_most=1
    )
    top_k: int | None = option(
        None, "draw from this many likeliest tokens", group="sampling", default_text="all", at_least=1
    )
    seed: int = option(
        0,
        "seed of the samples; each prompt draws its own, whatever stands beside it",
        group="sampling",
        at_least=0,
        at_most=2**32 - 1,
    )
    best_of: int | None = option(
        None,
        "draw so many for each sample and keep the one that --reward scores highest (best-of-N)",
        group="sampling",
        at_least=2,
    )
    reward: str | None = option(
        None,
        "of --best-of: a rule (vader, length), MODULE:FUNCTION of prompts and responses, or the folder or Hub name of a"
        " reward model with one label and this model's tokenizer",
        group="sampling",
    )
    engine: Literal["transformers", "vllm"] = option(
        "transformers", "what samples; vllm needs a GPU and the extra of that name", group="sampling"
    )

    output: str | None = option(
        None,
        "file to write, JSON lines; Python may leave it out",
        group="output",
        default_text="required on the command line",
    )
    resume: bool = option(False, "go on with the output file where a run was stopped", group="output")
    progress: Literal["auto", "rich", "plain", "none"] = option(
        "auto", "how progress is shown; auto: rich on a terminal, plain lines elsewhere", group="output"
    )

    batch_size: int | None = option(
        None, "samples drawn side by side", group="machine", default_text="estimated from memory", at_least=1
    )

    def __post_init__(self) -> None:
        _options.check_all(self)
        self.check_machine()
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"--min-new-tokens {self.min_new_tokens} is more than --max-new-tokens {self.max_new_tokens}: lower it"
            )
        if self.resume and self.output is None:
            raise ConfigError("--resume needs the --output that it goes on with")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise ConfigError("--top-p and --top-k do nothing at --temperature 0, which takes the likeliest token")
        if (self.best_of is None) != (self.reward is None):
            raise ConfigError("--best-of and --reward go together: --reward says which of them is the best")
        if self.temperature == 0 and self.best_of is not None:
            raise ConfigError("--temperature 0 draws the same sample again and again: leave --best-of out")
        if self.temperature == 0 and self.num > 1:
            raise ConfigError(f"--temperature 0 draws the same sample {self.num} times: leave --num out")
        if self.engine == "vllm" and self.batch_size is not None:
            raise ConfigError("--batch-size does nothing with --engine vllm, which makes its own batches: leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML."""
        return _options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> SampleConfig:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return _options.from_dict(cls, values, place)


@dataclass(frozen=True, kw_only=True)
class TalkerOptions:
    """Who answers; a class of its own so that it stands first."""

    model: str | None = option(
        None,
        "model to chat with: a folder, or its name on the Hugging Face Hub",
        group="model",
        default_text="the one behind --url",
    )
    adapter: str | None = option(None, "LoRA adapter on the model", group="model")
    against: str | None = option(None, "a second model, which answers too", group="model")
    against_adapter: str | None = option(
        None, "LoRA adapter on the second model (on --against, else on --model without its own)", group="model"
    )
    url: str | None = option(
        None,
        "a server with OpenAI's interface, such as http://localhost:8000/v1; with --model it answers second",
        group="model",
    )
    url_model: str | None = option(None, "which of the server's models", group="model", default_text="the one it has")
    url_key: str | None = option(
        None, "environment variable that holds the server's key", group="model", default_text="no key is sent"
    )


@dataclass(frozen=True, kw_only=True)
class ChatConfig(MachineOptions, TemplateOptions, TalkerOptions):
    """One session. Construction checks types, ranges and contradictions, and raises ``ConfigError``."""

    blind: bool = option(False, "two models answer as A and B, and you say which is better", group="chat")
    votes: str = option("votes.jsonl", "file that votes are appended to, to train on with --data", group="chat")
    system: str | None = option(None, "system prompt to begin with", group="chat")
    complete: bool = option(False, "continue text, without turns and chat template", group="chat")

    max_new_tokens: int = option(512, "tokens of an answer at most", group="sampling", at_least=1)
    temperature: float | None = option(
        None,
        "divides the logits; 0 takes the likeliest token",
        group="sampling",
        default_text="what the model's generation_config.json says, else 1",
        at_least=0,
    )
    top_p: float | None = option(
        None,
        "draw from the likeliest tokens that together have this probability",
        group="sampling",
        default_text="as for --temperature",
        above=0,
        at_most=1,
    )
    top_k: int | None = option(
        None, "draw from this many likeliest tokens", group="sampling", default_text="as for --temperature", at_least=1
    )
    seed: int | None = option(
        None,
        "seed of the answers",
        group="sampling",
        default_text="another one each time",
        at_least=0,
        at_most=2**32 - 1,
    )

    def __post_init__(self) -> None:
        check_all(self)
        self.check_machine()
        if self.model is None and self.url is None:
            raise ConfigError("--model is missing: model to chat with, a folder or a Hub name; or give --url")
        two = self.against is not None or self.against_adapter is not None
        if two and self.url is not None:
            raise ConfigError("--against and --url both name the second model: leave one of them out")
        if two and self.model is None:
            raise ConfigError(f"{flag('against' if self.against else 'against_adapter')} needs --model to compare with")
        for name in ("url_model", "url_key"):
            if getattr(self, name) is not None and self.url is None:
                raise ConfigError(f"{flag(name)} does nothing without --url: leave it out")
        if self.adapter is not None and self.model is None:
            raise ConfigError("--adapter needs the --model it belongs to")
        if self.blind and not two and (self.url is None or self.model is None):
            raise ConfigError("--blind needs two models: give --against, or --url beside --model")
        if self.votes != type(self).votes and not self.blind:
            raise ConfigError("--votes does nothing without --blind: leave it out")
        if self.complete and (self.system or self.chat_template or self.template_variables):
            raise ConfigError("--complete continues text: --system and chat templates are for conversations")
