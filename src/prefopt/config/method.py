"""What every method that trains on a file of data reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from prefopt.config import option as _options
from prefopt.config.data import DataOptions
from prefopt.config.model import LoraOptions
from prefopt.config.training import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class MethodOptions(TrainingOptions, DataOptions, LoraOptions):
    """Model, data, optimiser, output and machine of one run.

    Defaults that depend on other options are filled in on construction, so that what is read here, and what
    ``to_dict`` writes, is what the run does.
    """

    def fill(self, learning_rate: Mapping[bool, float]) -> None:
        """Check what all methods share, and fill in defaults; ``learning_rate`` by whether an adapter is trained.

        Raises ``ConfigError``.
        """
        _options.check_all(self)
        self.check_data()
        self.check_adapter()
        self.check_training(evaluates=self.evaluates)
        self.fill_adapter()
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", learning_rate[self.lora])

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML."""
        return _options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> Self:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return _options.from_dict(cls, values, place)
