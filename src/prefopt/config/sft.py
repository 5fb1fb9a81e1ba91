"""What ``prefopt sft`` reads. The command line, a YAML file and ``prefopt.sft(...)`` fill it.

>>> SftConfig(model="m", data="chats.jsonl", output="out", lora=True).learning_rate
0.0002
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.evaluation import SampleOptions
from prefopt.config.training import ModelOptions
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import flag, option
from prefopt.errors import ConfigError

# Full training: what LLaMA-Factory, Tulu 3 and TRL use for models of 1 to 8 billion weights. LoRA wants about ten times
# as much (Schulman and Thinking Machines 2025), random weights much larger steps.
LEARNING_RATE = {False: 1e-5, True: 2e-4}
FROM_SCRATCH = 1e-3


@dataclass(frozen=True, kw_only=True)
class SftConfig(SampleOptions, ModelOptions):
    """One run of supervised fine-tuning, or of training from scratch. Construction raises ``ConfigError``."""

    model: str = option(
        help="model to fine-tune: a folder, or the name of one on the Hugging Face Hub; with --from-scratch a folder"
        " whose config.json describes the model to build",
        group="model",
    )
    adapter: str | None = option(None, "existing LoRA adapter on the model to continue training")
    from_scratch: bool = option(False, "start from random weights instead of those of the model")
    train_tokenizer: int | None = option(
        None,
        "with --from-scratch: train a tokenizer with this many tokens on the data (byte-level BPE)",
        default_text="the model's own",
        needs="from_scratch",
        at_least=260,
    )
    learning_rate: float = option(
        help="peak learning rate; 5e-6 to 2e-5 is usual, with LoRA 1e-4 to 5e-4",
        group="optimiser",
        computed=lambda c: FROM_SCRATCH if c.from_scratch else LEARNING_RATE[c.lora or c.named_adapter is not None],
        default_text=f"{LEARNING_RATE[False]:g}, with LoRA {LEARNING_RATE[True]:g}, from scratch {FROM_SCRATCH:g}",
        above=0,
    )
    train_on: Literal["responses", "all"] = option(
        "responses", "tokens of a row to train on: its responses, or all of its text", group="loss"
    )
    average: Literal["tokens", "rows"] = option(
        "tokens", "tokens: the mean over all trained tokens; rows: the mean over responses of the mean of each"
    )

    def check(self) -> None:
        if self.from_scratch and is_adapter(self.model):
            raise ConfigError(f"--from-scratch: --model {self.model} is an adapter; name a folder with a config.json")
        for name in ("lora", "adapter"):
            if self.from_scratch and getattr(self, name):
                raise ConfigError(f"{flag(name)}: --from-scratch trains all weights; leave one of them out")
