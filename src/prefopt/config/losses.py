"""What ``prefopt losses`` reads."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.option import check_all, option


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """The list of losses, or one of them."""

    name: str | None = option(
        None, "loss to tell everything of", group="loss", default_text="a list of all", positional=True
    )

    def __post_init__(self) -> None:
        check_all(self)
