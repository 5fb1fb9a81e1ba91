"""What gives responses a score: a rule, a function, a reward model or the implicit reward of a policy."""

from __future__ import annotations

from dataclasses import dataclass, fields

from prefopt.config.data import RenderOptions
from prefopt.config.training import MachineOptions, Quantise, quantise_option
from prefopt.core.files import SHIPPED, expanded
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import flag, option
from prefopt.errors import ConfigError

IMPLICIT = "implicit"
BETA = 0.1
RULES = ("vader", "length")


@dataclass(frozen=True, kw_only=True)
class ScorerOptions(MachineOptions, RenderOptions):
    """Part of the config of commands that score responses."""

    reward: str = option(
        help="score of a response: a rule (vader: sentiment; length: words), MODULE:FUNCTION of prompts and responses"
        " (two lists of text), the folder or Hub name of a reward model, or implicit",
        group="reward",
    )
    model: str | None = option(None, "of --reward implicit: the model that was aligned")
    adapter: str | None = option(None, "of --reward implicit: LoRA adapter on the model")
    reference: str | None = option(
        None,
        "of --reward implicit: the model it was aligned from",
        default_text="with an adapter, the model without it",
    )
    quantise: Quantise = quantise_option("load the reward model, or --model and --reference, in")
    beta: float | None = option(
        help="of --reward implicit: factor of the log-ratio, as in training",
        computed=lambda c: BETA if c.reward == IMPLICIT else None,
        default_text=f"{BETA}",
        above=0,
    )

    def check(self) -> None:
        if self.reward == IMPLICIT:
            if self.model is None:
                raise ConfigError("--reward implicit compares two models: give --model and --reference")
            if self.reference is None and self.adapter is None and not is_adapter(self.model):
                raise ConfigError("--reward implicit: --model has no reference; give --reference")
            return
        of_models = [f.name for f in (*fields(MachineOptions), *fields(RenderOptions))] + ["quantise"]
        if not self.by_model and (given := [name for name in of_models if self.is_given(name)]):
            raise ConfigError(
                f"{flag(given[0])} is for rewards that are models, and {self.reward} is not: leave it out"
            )
        for name in ("model", "adapter", "reference", "beta"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{flag(name)} is read with --reward implicit alone; leave it out")

    @property
    def by_model(self) -> bool:
        """Whether a model gives the scores: ``implicit``, a folder, or a name on the Hub."""
        return self.reward == IMPLICIT or is_model_reward(self.reward)


def is_model_reward(name: str) -> bool:
    """Whether a reward is named like a model: ``owner/name``, a path, an existing folder, or ``prefopt:FOLDER``, which
    ships with prefopt."""
    if name.startswith(SHIPPED):
        return True
    return name not in RULES and ":" not in name and ("/" in name or expanded(name).is_dir())
