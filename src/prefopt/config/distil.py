"""What ``prefopt distil`` reads. The command line, a YAML file and ``prefopt.distil(...)`` fill it.

>>> DistilConfig(model="small", teacher="large", data="chats.jsonl", output="out", on_policy=0.5).max_new_tokens
128
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.evaluation import SampleOptions
from prefopt.config.rollouts import CONCURRENCY, RolloutOptions
from prefopt.config.sft import LEARNING_RATE
from prefopt.config.training import ModelOptions, rate_option
from prefopt.core.endpoint import base_url, is_url
from prefopt.core.options import flag, option
from prefopt.errors import ConfigError

JSD_WEIGHT = 0.5
MAX_NEW_TOKENS = 128
TOP_K = 20
"""What vLLM gives without an option of its own."""


@dataclass(frozen=True, kw_only=True)
class DistilConfig(SampleOptions, RolloutOptions, ModelOptions):
    """One run of distillation. Construction raises ``ConfigError``."""

    model: str = option(help="model to train: a folder, or the name of one on the Hugging Face Hub", group="model")
    teacher: str = option(
        help="model to learn from, of the same tokenizer: a folder, a name on the Hub, or the URL of a vLLM server"
    )
    teacher_adapter: str | None = option(None, "adapter on the teacher")
    teacher_model: str | None = option(
        None, "name of the teacher on its server", default_text="the only one there", group="teacher's server"
    )
    teacher_key: str | None = option(None, "environment variable with the server's key", default_text="no key is sent")
    teacher_top_k: int | None = option(
        help="most likely tokens to ask the server for at each position; all others together are one bin of the"
        " loss. vLLM gives more than 20 with --max-logprobs",
        computed=lambda c: TOP_K if c.teacher_url else None,
        default_text=f"{TOP_K}, with a server",
        at_least=1,
    )
    teacher_concurrency: int | None = option(
        help="concurrent requests to the server",
        computed=lambda c: CONCURRENCY if c.teacher_url else None,
        default_text=f"{CONCURRENCY}, with a server",
        at_least=1,
    )
    same_tokenizer: bool = option(
        False, "the server's tokenizer is the model's, which a server without /tokenize cannot show"
    )
    learning_rate: float = rate_option(LEARNING_RATE, "; 5e-6 to 2e-5 is usual, with LoRA 1e-4 to 5e-4")
    divergence: Literal["forward", "reverse", "jsd"] = option(
        "forward",
        "divergence of the next-token distributions, token by token: forward, KL(teacher || model), covers all that the"
        " teacher may say; reverse, KL(model || teacher), keeps to what it says most; jsd lies between them",
        group="loss",
    )
    jsd_weight: float | None = option(
        help="weight of the teacher in the mixture of --divergence jsd: near 0 it is like forward, near 1 like reverse",
        computed=lambda c: JSD_WEIGHT if c.divergence == "jsd" else None,
        default_text=f"{JSD_WEIGHT}",
        above=0,
        below=1,
    )
    average: Literal["tokens", "rows"] = option(
        "tokens", "tokens: the mean over all trained tokens; rows: the mean over responses of the mean of each"
    )
    on_policy: float = option(
        0.0,
        "fraction of the steps that learn from responses that the model itself draws to the prompts, in place of those"
        " of the data",
        group="sampling",
        at_least=0,
        at_most=1,
    )
    max_new_tokens: int | None = option(
        help="maximum tokens of a sampled response; prompt and response are cut at --max-length",
        computed=lambda c: MAX_NEW_TOKENS if c.on_policy else None,
        default_text=f"{MAX_NEW_TOKENS}",
        at_least=1,
    )

    @property
    def teacher_url(self) -> bool:
        """Whether the teacher is behind a URL."""
        return is_url(self.teacher)

    def check(self) -> None:
        for name in ("teacher_model", "teacher_key", "teacher_top_k", "teacher_concurrency", "same_tokenizer"):
            if getattr(self, name) and not self.teacher_url:
                raise ConfigError(
                    f"{flag(name)} is for a teacher on a server, and --teacher is not a URL: leave it out"
                )
        if self.teacher_url:
            base_url(self.teacher, "--teacher")
            if self.teacher_adapter is not None:
                raise ConfigError("--teacher-adapter: a server has its own adapters: name one with --teacher-model")
        if self.jsd_weight is not None and self.divergence != "jsd":
            raise ConfigError("--jsd-weight is for --divergence jsd: leave one of them out")
        if self.rollout_server is not None and not self.on_policy:
            raise ConfigError("--rollout-server draws responses: give --on-policy, or leave it out")
        if self.max_new_tokens is not None and not self.on_policy:
            raise ConfigError("--max-new-tokens is for responses that are drawn: give --on-policy, or leave it out")
