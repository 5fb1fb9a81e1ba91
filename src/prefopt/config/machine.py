"""Options that say where a verb computes, and how precisely."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from prefopt.config.option import nearest, option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Part of the config of every verb that runs a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto",
        "precision of computation (trained weights stay float32 under bfloat16); auto: bfloat16 where the device"
        " has it natively, else float32",
        group="machine",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps", group="machine", default_text="cuda, then mps, where there is one, else cpu"
    )
    threads: int | None = option(None, "processor threads", group="machine", default_text="torch's choice", at_least=1)

    def check_machine(self) -> None:
        """Refuse what no machine has. Raises ``ConfigError``."""
        if self.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            near = nearest(self.device, ["cpu", "cuda", "mps"])
            raise ConfigError(f"--device is {self.device!r}; it must be cpu, cuda, cuda:N or mps{near}")
        if self.device == "mps" and self.dtype == "float64":
            raise ConfigError("--device mps has no float64: take --device cpu, or --dtype float32")
