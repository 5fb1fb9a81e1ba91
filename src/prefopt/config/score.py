"""What ``prefopt score`` reads; it checks itself.

>>> ScoreConfig(files=["samples.jsonl"], reward="length", output="scored.jsonl").reward
'length'
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from prefopt.config.data import ReadOptions, RenderOptions
from prefopt.config.machine import MachineOptions
from prefopt.config.option import check_all, flag, option
from prefopt.disk.adapter_folder import is_adapter
from prefopt.errors import ConfigError

IMPLICIT = "implicit"
BETA = 0.1
RULES = ("vader", "length")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(MachineOptions, RenderOptions, ReadOptions):
    """Giving every response of some files a number.

    ``beta`` is filled in for the implicit reward.
    """

    files: list[str] = option(
        help="files, folders, globs or Hub data sets with responses, in any layout", group="data", positional=True
    )
    reward: str = option(
        help="what gives the number: a rule (vader: sentiment; length: words), MODULE:FUNCTION of prompts and"
        " responses, two lists of text, the folder or Hub name of a reward model, or implicit",
        group="reward",
    )
    model: str | None = option(None, "of --reward implicit: the model that was aligned", group="reward")
    adapter: str | None = option(None, "of --reward implicit: LoRA adapter on the model", group="reward")
    reference: str | None = option(
        None,
        "of --reward implicit: what it was aligned from",
        group="reward",
        default_text="with an adapter the model without it",
    )
    beta: float = option(
        None,
        "of --reward implicit: what the log-ratio is multiplied by, as in training",
        group="reward",
        default_text=f"{BETA}",
        above=0,
    )
    output: str = option(help="file to write, JSON lines: the same rows with their scores", group="output")
    overwrite: bool = option(False, "replace the output file where it is there", group="output")

    def __post_init__(self) -> None:
        check_all(self)
        self.check_machine()
        if self.reward == IMPLICIT:
            if self.model is None:
                raise ConfigError("--reward implicit compares two models: give --model and --reference")
            if self.reference is None and self.adapter is None and not is_adapter(self.model):
                raise ConfigError("--reward implicit: --model is compared with nothing; give --reference")
            if self.beta is None:
                object.__setattr__(self, "beta", BETA)
            return
        if not self.by_model:
            for f in (*fields(MachineOptions), *fields(RenderOptions)):
                if getattr(self, f.name) != f.default:
                    what = "is for rewards that are models"
                    raise ConfigError(f"{flag(f.name)} {what}, and {self.reward} is not: leave it out")
        for name in ("model", "adapter", "reference", "beta"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{flag(name)} is read with --reward implicit alone; leave it out")

    @property
    def by_model(self) -> bool:
        """Whether a model gives the numbers: ``implicit``, a folder, or a name on the Hub."""
        return self.reward == IMPLICIT or is_model_reward(self.reward)


def is_model_reward(name: str) -> bool:
    """Whether a reward is named as models are: ``owner/name``, a path, or a folder that is there; a rule is none."""
    return name not in RULES and ":" not in name and ("/" in name or Path(name).expanduser().is_dir())
