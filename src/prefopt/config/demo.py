"""What ``prefopt demo`` reads."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.option import check_all, option


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demonstration decides everything but where its results go and the seed."""

    output: str = option("runs/demo", "folder to write the results to", group="output")
    seed: int = option(0, "seed of prompts, samples and training", group="machine", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        check_all(self)
