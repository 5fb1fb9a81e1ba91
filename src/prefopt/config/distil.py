"""What ``prefopt distil`` reads. The command line, a YAML file and ``prefopt.distil(...)`` fill it.

>>> DistilConfig(model="small", teacher="large", data="chats.jsonl", output="out", on_policy=0.5).max_new_tokens
128
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.evaluation import SampleOptions
from prefopt.config.sft import LEARNING_RATE
from prefopt.config.training import ModelOptions, rate_option
from prefopt.core.options import option
from prefopt.errors import ConfigError

JSD_WEIGHT = 0.5
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class DistilConfig(SampleOptions, ModelOptions):
    """One run of distillation. Construction raises ``ConfigError``."""

    model: str = option(help="model to train: a folder, or the name of one on the Hugging Face Hub", group="model")
    teacher: str = option(help="model to learn from, of the same tokenizer: a folder, or a name on the Hub")
    teacher_adapter: str | None = option(None, "adapter on the teacher")
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
        help="most tokens of a response that is drawn; prompt and response are cut at --max-length",
        computed=lambda c: MAX_NEW_TOKENS if c.on_policy else None,
        default_text=f"{MAX_NEW_TOKENS}",
        at_least=1,
    )

    def check(self) -> None:
        if self.jsd_weight is not None and self.divergence != "jsd":
            raise ConfigError("--jsd-weight is for --divergence jsd: leave one of them out")
        if self.max_new_tokens is not None and not self.on_policy:
            raise ConfigError("--max-new-tokens is for responses that are drawn: give --on-policy, or leave it out")
