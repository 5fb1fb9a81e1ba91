"""What ``prefopt data layouts`` reads."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.option import check_all, option


@dataclass(frozen=True, kw_only=True)
class DataLayoutsConfig:
    """The list of layouts, or one of them."""

    name: str | None = option(
        None, "layout to tell everything of", group="layout", default_text="a list of all", positional=True
    )

    def __post_init__(self) -> None:
        check_all(self)
