"""What ``prefopt env`` reads."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.option import check_all, option


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """How the state of this installation is printed."""

    json: bool = option(False, "print JSON, for programs", group="env")

    def __post_init__(self) -> None:
        check_all(self)
