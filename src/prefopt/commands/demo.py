"""``prefopt demo``."""

from __future__ import annotations

from prefopt.config.demo import DemoConfig
from prefopt.demo.run import run_demo


def show_demo(config: DemoConfig) -> int:
    """The demonstration prints as it goes."""
    run_demo(config.output, config.seed)
    return 0
