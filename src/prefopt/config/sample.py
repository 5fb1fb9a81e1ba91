"""What ``prefopt sample`` and ``prefopt chat`` read.

>>> SampleConfig(model="m", prompts="prompts.txt", output="samples.jsonl").num
1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.data import PromptOptions, RowOptions, SamplingOptions, TemplateOptions
from prefopt.config.training import MachineOptions, ProgressOptions, Quantise, quantise_option
from prefopt.core.model_folder import NOT_QUANTISED
from prefopt.core.options import flag, option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SampleConfig(MachineOptions, ProgressOptions, TemplateOptions, SamplingOptions, PromptOptions, RowOptions):
    """One run of a sampler. Construction raises ``ConfigError``."""

    model: str = option(
        help="model to sample from: a folder, or the name of one on the Hugging Face Hub", group="model"
    )
    adapter: str | None = option(None, "LoRA adapter on the model")
    quantise: Quantise = quantise_option("load the model in")
    num: int = option(1, "samples per prompt", group="sampling", at_least=1)
    min_new_tokens: int = option(0, "minimum tokens of a sample", at_least=0)
    top_p: float = option(
        1.0, "nucleus sampling: from the most likely tokens with this total probability", above=0, at_most=1
    )
    top_k: int | None = option(None, "sample from this many of the most likely tokens", default_text="all", at_least=1)
    best_of: int | None = option(
        None, "draw this many for each sample and keep the one with the highest --reward (best-of-N)", at_least=2
    )
    reward: str | None = option(
        None,
        "reward of --best-of: a rule (vader, length), MODULE:FUNCTION of prompts and responses, or the folder or Hub"
        " name of a reward model with one label and this model's tokenizer",
    )
    engine: Literal["transformers", "vllm"] = option(
        "transformers", "sampling engine; vllm needs a GPU and the extra prefopt[vllm]"
    )

    output: str | None = option(
        None,
        "file to write, JSON lines; Python may leave it out",
        group="output",
        default_text="required on the command line",
    )
    resume: bool = option(False, "continue the output file of an interrupted run", needs="output")

    batch_size: int | None = option(
        None, "samples drawn in parallel", group="machine", default_text="estimated from memory", at_least=1
    )

    def check(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"--min-new-tokens {self.min_new_tokens} is more than --max-new-tokens {self.max_new_tokens}: lower it"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise ConfigError("--top-p and --top-k do nothing at --temperature 0 (greedy decoding): leave them out")
        if (self.best_of is None) != (self.reward is None):
            raise ConfigError("--best-of and --reward go together: --reward chooses the best")
        if self.temperature == 0 and self.best_of is not None:
            raise ConfigError("--temperature 0 draws the same sample every time: leave --best-of out")
        if self.temperature == 0 and self.num > 1:
            raise ConfigError(f"--temperature 0 draws the same sample {self.num} times: leave --num out")
        if self.engine == "vllm" and self.quantise not in (None, NOT_QUANTISED):
            raise ConfigError("--quantise does nothing with --engine vllm, which loads the model itself: leave it out")
        if self.engine == "vllm" and self.batch_size is not None:
            raise ConfigError("--batch-size does nothing with --engine vllm, which forms its own batches: leave it out")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(MachineOptions, TemplateOptions):
    """One chat. Construction raises ``ConfigError``."""

    model: str | None = option(
        None,
        "model to chat with: a folder, or its name on the Hugging Face Hub",
        group="model",
        default_text="the one behind --url",
    )
    adapter: str | None = option(None, "LoRA adapter on the model", needs="model")
    against: str | None = option(None, "a second model that also answers")
    against_adapter: str | None = option(
        None, "LoRA adapter on the second model (on --against, else on --model without its own adapter)"
    )
    quantise: Quantise = quantise_option("load the models in")
    url: str | None = option(
        None, "an OpenAI-compatible server, such as http://localhost:8000/v1; with --model it is the second model"
    )
    url_model: str | None = option(
        None, "name of the model on the server", default_text="the server's only model", needs="url"
    )
    url_key: str | None = option(
        None, "environment variable with the server's key", default_text="no key is sent", needs="url"
    )

    blind: bool = option(False, "two models answer as A and B, and you vote for the better one", group="chat")
    votes: str = option("votes.jsonl", "file to append votes to; --data reads it", needs="blind")
    system: str | None = option(None, "system prompt to start with")
    complete: bool = option(False, "continue text, without turns and chat template")

    max_new_tokens: int = option(512, "maximum tokens of an answer", group="sampling", at_least=1)
    temperature: float | None = option(
        None,
        "sampling temperature, which divides the logits; 0 is greedy decoding",
        default_text="that of the model's generation_config.json, else 1",
        at_least=0,
    )
    top_p: float | None = option(
        None,
        "nucleus sampling: from the most likely tokens with this total probability",
        default_text="as for --temperature",
        above=0,
        at_most=1,
    )
    top_k: int | None = option(
        None, "sample from this many of the most likely tokens", default_text="as for --temperature", at_least=1
    )
    seed: int | None = option(None, "seed of the answers", default_text="random", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        if self.model is None and self.url is None:
            raise ConfigError("--model is missing: model to chat with, a folder or a Hub name; or give --url")
        if self.model is None and self.quantise is not None:
            raise ConfigError("--quantise does nothing without --model: add it, or leave --quantise out")
        two = self.against is not None or self.against_adapter is not None
        if two and self.url is not None:
            raise ConfigError("--against and --url both name the second model: leave one of them out")
        if two and self.model is None:
            raise ConfigError(f"{flag('against' if self.against else 'against_adapter')} needs --model to compare with")
        if self.blind and not two and (self.url is None or self.model is None):
            raise ConfigError("--blind needs two models: give --against, or --url beside --model")
        if self.complete and (self.system or self.chat_template or self.template_variables):
            raise ConfigError("--complete continues text: --system and chat templates are for conversations")
