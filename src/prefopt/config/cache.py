"""What ``prefopt cache list``, ``verify`` and ``clear`` read."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.option import check_all, option


@dataclass(frozen=True, kw_only=True)
class CacheListConfig:
    """Listing takes no option: the folder is ``PREFOPT_CACHE``."""


@dataclass(frozen=True, kw_only=True)
class CacheVerifyConfig:
    """Checking every stored file against its checksum."""

    repair: bool = option(
        False, "take damaged files out of use, so that what they held is made again when needed", group="cache"
    )

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class CacheClearConfig:
    """Removing entries. Both conditions together remove what meets both."""

    space: list[str] | None = option(
        None, "ids of what to remove, as prefopt cache list shows them", group="cache", default_text="all"
    )
    older_than: float | None = option(
        None, "remove only what was not used for this many days", group="cache", default_text="any age", at_least=0
    )

    def __post_init__(self) -> None:
        check_all(self)
