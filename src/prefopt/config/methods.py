"""The methods that train into an output folder, by the name of their command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.config.option import from_dict
from prefopt.config.ppo import PpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.config.sft import SftConfig

METHODS: Mapping[str, type[Any]] = {"dpo": DpoConfig, "sft": SftConfig, "reward": RewardConfig, "ppo": PpoConfig}


def method_of(config: object) -> str | None:
    """The command that a config belongs to."""
    return next((name for name, kind in METHODS.items() if type(config) is kind), None)


def read_options(method: str, values: Mapping[str, Any]) -> Any:
    """The config that a run's record holds. Raises ``ConfigError`` where this version has other options."""
    return from_dict(METHODS[method], {name: value for name, value in values.items() if value is not None})
