"""What ``prefopt reward`` reads.

>>> RewardConfig(model="sft", data="pairs.jsonl", output="out").centre
0.01
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.training import MethodOptions
from prefopt.core.options import option

# InstructGPT's 9e-6 and Llama 2's 5e-6 to 1e-5 for full training; LoRA about ten times as much.
LEARNING_RATE = {False: 1e-5, True: 1e-4}


@dataclass(frozen=True, kw_only=True)
class RewardConfig(MethodOptions):
    """One run that trains a reward model."""

    model: str = option(
        help="model to begin with: a language model, best the fine-tuned one, or a reward model to go on training",
        group="model",
    )
    batch_size: int = option(16, "prompts per optimiser step, each with all its pairs", group="optimiser", at_least=1)
    learning_rate: float = option(
        None,
        "peak learning rate; 5e-6 to 1e-5 is usual, with LoRA 5e-5 to 2e-4",
        group="optimiser",
        default_text=f"{LEARNING_RATE[False]:g}, with LoRA {LEARNING_RATE[True]:g}",
        above=0,
    )
    pairs: Literal["all", "best-worst"] = option(
        "all",
        "of more than two responses: every pair, those of a prompt weighing 1 together, or the best against the worst",
        group="loss",
    )
    margin: float | None = option(
        None,
        "how much further apart rewards must be for each point between the data's scores (Llama 2)",
        group="loss",
        default_text="no margins",
        above=0,
    )
    centre: float = option(
        0.01, "weight of the squared sum of a pair's rewards, which holds them near 0", group="loss", at_least=0
    )
    zero: Literal["chosen", "all", "none"] = option(
        "chosen",
        "which responses of the training data have a mean reward of 0, by a shift that is set after training",
        group="loss",
    )

    def __post_init__(self) -> None:
        self.fill(LEARNING_RATE)
