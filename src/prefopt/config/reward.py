"""What ``prefopt reward`` reads.

>>> RewardConfig(model="sft", data="pairs.jsonl", output="out").centre
0.01
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.evaluation import PreferenceOptions
from prefopt.config.training import rate_option
from prefopt.core.options import option

# Full training: InstructGPT's 9e-6 and Llama 2's 5e-6 to 1e-5. LoRA: about ten times as much.
LEARNING_RATE = {False: 1e-5, True: 1e-4}


@dataclass(frozen=True, kw_only=True)
class RewardConfig(PreferenceOptions):
    """One run that trains a reward model. Construction raises ``ConfigError``."""

    model: str = option(
        help="model to start from: a language model, preferably fine-tuned, or a reward model to continue training",
        group="model",
    )
    batch_size: int = option(16, "prompts per optimiser step, each with all its pairs", group="optimiser", at_least=1)
    learning_rate: float = rate_option(LEARNING_RATE, "; 5e-6 to 1e-5 is usual, with LoRA 5e-5 to 2e-4")
    pairs: Literal["all", "best-worst"] = option(
        "all",
        "pairs of three and more responses: all of them, with weights that sum to 1 per prompt, or best and worst only",
        group="loss",
    )
    margin: float | None = option(
        None,
        "margin of reward per point of difference between the data's scores (Llama 2)",
        default_text="no margin",
        above=0,
    )
    centre: float = option(0.01, "weight of the squared sum of a pair's rewards, which keeps them near 0", at_least=0)
    zero: Literal["chosen", "all", "none"] = option(
        "chosen", "responses of the training data whose mean reward is shifted to 0 after training"
    )
