"""What ``prefopt sft`` reads.

>>> SftConfig(model="m", data="chats.jsonl", output="out", lora=True).learning_rate
0.0002
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.training import BalanceOptions, MethodOptions, ModelOptions
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import flag, option
from prefopt.errors import ConfigError

# Full: what LLaMA-Factory, Tulu 3 and TRL take for models of 1 to 8 billion weights. LoRA wants about ten times as
# much (Schulman and Thinking Machines 2025). A model that begins at random wants much larger steps.
LEARNING_RATE = {False: 1e-5, True: 2e-4}
FROM_SCRATCH = 1e-3


@dataclass(frozen=True, kw_only=True)
class SftConfig(BalanceOptions, MethodOptions, ModelOptions):
    """One run of supervised fine-tuning, or of training from scratch."""

    model: str = option(
        help="model to fine-tune: a folder, or the name of one on the Hugging Face Hub; with --from-scratch a folder"
        " whose config.json says what to build",
        group="model",
    )
    adapter: str | None = option(None, "LoRA adapter on the model to go on training", group="model")
    from_scratch: bool = option(False, "begin with random weights instead of those of the model", group="model")
    train_tokenizer: int | None = option(
        None,
        "with --from-scratch: make a tokenizer of so many tokens from the data (byte-level BPE)",
        group="model",
        default_text="the model's own",
        at_least=260,
    )
    batch_size: int = option(
        16, "rows per optimiser step, whatever fits into memory at once", group="optimiser", at_least=1
    )
    learning_rate: float = option(
        None,
        "peak learning rate; 5e-6 to 2e-5 is usual, with LoRA 1e-4 to 5e-4",
        group="optimiser",
        default_text=f"{LEARNING_RATE[False]:g}, with LoRA {LEARNING_RATE[True]:g}, from scratch {FROM_SCRATCH:g}",
        above=0,
    )
    train_on: Literal["responses", "all"] = option(
        "responses", "what is learned of a row: its responses, or all of its text", group="loss"
    )
    average: Literal["tokens", "rows"] = option(
        "tokens",
        "what the loss is the mean over: every trained token weighs the same, or every response does, however long",
        group="loss",
    )

    def __post_init__(self) -> None:
        if self.from_scratch is True and isinstance(self.model, str) and is_adapter(self.model):
            raise ConfigError(f"--from-scratch: --model {self.model} is an adapter; name a folder with a config.json")
        if self.learning_rate is None and self.from_scratch is True:
            object.__setattr__(self, "learning_rate", FROM_SCRATCH)
        self.fill(LEARNING_RATE)
        for name in ("lora", "adapter"):
            if self.from_scratch and getattr(self, name):
                raise ConfigError(f"{flag(name)}: --from-scratch trains all weights; leave one of them out")
        if self.train_tokenizer is not None and not self.from_scratch:
            raise ConfigError(
                "--train-tokenizer: a trained model has its tokenizer; add --from-scratch, or leave it out"
            )
