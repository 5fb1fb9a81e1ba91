"""What ``prefopt methods`` reads.

>>> config = MethodsConfig(model="m", prompts="p.txt", reward="vader", output="out", rate_factors=["0.5", "2"])
>>> config.factors
[0.5, 2.0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config.given import parse_given
from prefopt.config.option import option
from prefopt.config.sweep import GIVEN, AnyConfig, SweepOptions
from prefopt.errors import ConfigError

FACTORS = ("0.5", "1", "2")
STAGES = {"dpo": ("sft", "dpo"), "ppo": ("sft", "reward", "ppo")}
"""A road by its last stage, and all its stages."""


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(SweepOptions):
    """DPO against reward model and PPO: what each costs, and what it gives. Construction raises ``ConfigError``."""

    seeds: int = option(3, "trainings of every stage, seed after seed", group="stages", at_least=1)
    rate_factors: list[str] | None = option(
        None,
        "DPO and PPO are trained at their learning rate times each of these: how much their end depends on it",
        group="stages",
        default_text=" ".join(FACTORS),
    )
    perplexity: list[str] | None = option(
        None,
        "data whose best responses the perplexity before and after is measured on (the alignment tax)",
        group="data",
        default_text="it is not measured",
    )
    isolate: bool = option(
        True,
        "each training in a process of its own, so that its peak memory is its own; false: all in this one, and peak"
        " memory is not told",
        group="machine",
    )

    def __post_init__(self) -> None:
        self.check_sweep()
        if self.rate_factors is None:
            object.__setattr__(self, "rate_factors", list(FACTORS))
        if len(set(self.factors)) < len(self.factors):
            raise ConfigError("--rate-factors: one stands there twice")
        if parse_given("sft", self.sft or ()).get("lora"):
            raise ConfigError("--sft lora: the stages after it begin at a whole model; leave it out")
        for stage in ("sft", "reward", "dpo", "ppo"):  # a mistake in the last one is told before the first has run
            self.stage(stage, self.seed, self.factors[-1], data=["data"], prompts="prompts", each=2.0)

    @property
    def factors(self) -> list[float]:
        """``rate_factors`` as numbers. Raises ``ConfigError``."""
        return [_factor(text) for text in self.rate_factors or ()]

    def stage(self, stage: str, seed: int, factor: float, *, data: list[str], prompts: str, each: float) -> AnyConfig:
        """The config of one training; ``factor`` is of ``dpo`` and ``ppo`` alone. Raises ``ConfigError``."""
        given: dict[str, Any] = {"model": self.model if stage == "sft" else str(self.folder("sft", seed))}
        given |= {"prompts": [prompts]} if stage == "ppo" else {"data": data}
        if stage == "ppo":
            given["reward"] = str(self.folder("reward", seed))
        rows = 1.0 if stage == "sft" else each
        folder = self.folder(stage, seed, factor if stage in STAGES else None)
        found = self.training(stage, folder, given, each=rows, seed=seed)
        if stage not in STAGES:
            return found
        assert found.learning_rate is not None
        rates = {name: getattr(found, name, None) for name in ("learning_rate", "critic_learning_rate")}
        moved = {name: rate * factor for name, rate in rates.items() if rate is not None}
        return type(found).from_dict(found.to_dict() | moved, f"--{GIVEN[stage]}")

    def folder(self, stage: str, seed: int, factor: float | None = None) -> Path:
        """Where a training is."""
        rate = "" if factor is None else f"-rate{factor:g}"
        return Path(self.output) / stage / f"seed{seed}{rate}"


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ConfigError(f"--rate-factors {text}: it must be a number above 0, such as 0.5")
    return factor
