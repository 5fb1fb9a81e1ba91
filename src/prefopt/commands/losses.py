"""``prefopt losses``."""

from __future__ import annotations

from prefopt.config.losses import LossesConfig
from prefopt.losses.show import described, overview
from prefopt.screen import tell


def show_losses(config: LossesConfig) -> int:
    tell(overview() if config.name is None else described(config.name))
    return 0
