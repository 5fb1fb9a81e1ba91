"""``prefopt.data.check``, ``convert`` and ``split``: the commands of ``prefopt data`` as functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.api.functions import Command, command_function
from prefopt.config.tools import DataCheckConfig, DataConvertConfig, DataSplitConfig

if TYPE_CHECKING:
    from prefopt.data.audit import DataReport


def _check(config: DataCheckConfig) -> DataReport:
    from prefopt.data.audit import checked

    if config.model is None:
        return checked(config)
    from prefopt.model.load import context_of

    return checked(config, context_of(config.model))


def _convert(config: DataConvertConfig) -> Path:
    from prefopt.data.comparisons import run_convert

    run_convert(config)
    return Path(config.output)


def _split(config: DataSplitConfig) -> tuple[Path, Path]:
    from prefopt.data.comparisons import run_split

    run_split(config)
    return Path(config.output_train), Path(config.output_eval)


COMMANDS = {
    "check": Command(
        DataCheckConfig,
        _check,
        "DataReport",
        "Count rows and find every problem, as ``prefopt data check`` does. The result prints as that report.",
        ("json",),
    ),
    "convert": Command(
        DataConvertConfig,
        _convert,
        "Path",
        "Write rows in another layout, or as parquet, as ``prefopt data convert`` does; returns the file.",
    ),
    "split": Command(
        DataSplitConfig,
        _split,
        "tuple[Path, Path]",
        "Split rows by prompt into two files, as ``prefopt data split`` does; returns them.",
    ),
}
check, convert, split = (command_function(name, __name__, command) for name, command in COMMANDS.items())
