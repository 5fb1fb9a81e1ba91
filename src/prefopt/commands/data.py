"""``prefopt data``: files of rows, looked at and rewritten."""

from __future__ import annotations

from prefopt.config.data_verbs import DataCheckConfig
from prefopt.config.layouts import DataLayoutsConfig
from prefopt.data.check import run_check
from prefopt.data.layouts.show import described, overview
from prefopt.data.recognise import named_layout
from prefopt.screen import tell


def show_layouts(config: DataLayoutsConfig) -> int:
    tell(overview() if config.name is None else described(named_layout(config.name)))
    return 0


def check_data(config: DataCheckConfig) -> int:
    if config.model is None:  # seconds faster, for torch is not imported
        return run_check(config)
    from prefopt.model.load import context_of
    from prefopt.model.named import adapter_line

    if not config.json and (line := adapter_line(config.model)):
        tell(line)
    return run_check(config, context_of(config.model))
