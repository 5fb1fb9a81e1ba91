# Written by docs/make_stubs.py; tests/test_stubs.py keeps it current.
"""Files of any layout, as tables of token ids. ``prefopt.data.check``, ``convert`` and ``split`` are the commands of
``prefopt data`` as functions."""

from pathlib import Path
from prefopt.api.types import Name, Names
from prefopt.data.audit import DataReport
from typing import Literal

def check(
    data: Names,
    *,
    model: Name | None = None,
    format: Name | None = None,
    columns: Names | None = None,
    label_means: Names | None = None,
    ignore_columns: Names | None = None,
    header: Literal['first-line', 'none'] = 'first-line',
    picture_folder: Name | None = None,
    chat_template: Name | None = None,
    template_variables: Names | None = None,
    max_length: int | None = None,
    reasoning: Literal['keep', 'strip'] = 'keep',
    earlier_turns: Literal['auto', 'as-generated', 'as-shown'] = 'auto',
    compare: Literal['responses', 'steps'] = 'responses',
    eval_data: Names | None = None,
    want: Literal['pairs', 'scored', 'ranking', 'labels', 'demonstrations', 'prompts'] | None = None,
    show: int = 0,
) -> DataReport:
    """Count rows and find every problem, as ``prefopt data check`` does. The result prints as that report. ``help(prefopt.data.check)`` lists all options."""
    ...

def convert(
    data: Names,
    output: Name,
    *,
    format: Name | None = None,
    columns: Names | None = None,
    label_means: Names | None = None,
    ignore_columns: Names | None = None,
    header: Literal['first-line', 'none'] = 'first-line',
    picture_folder: Name | None = None,
    on_bad_row: Literal['refuse', 'skip'] = 'refuse',
    overwrite: bool = False,
    layout: Name = 'canonical',
) -> Path:
    """Write rows in another layout, or as parquet, as ``prefopt data convert`` does; returns the file. ``help(prefopt.data.convert)`` lists all options."""
    ...

def split(
    data: Names,
    output_train: Name,
    output_eval: Name,
    *,
    format: Name | None = None,
    columns: Names | None = None,
    label_means: Names | None = None,
    ignore_columns: Names | None = None,
    header: Literal['first-line', 'none'] = 'first-line',
    picture_folder: Name | None = None,
    on_bad_row: Literal['refuse', 'skip'] = 'refuse',
    fraction: float,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Split rows by prompt into two files, as ``prefopt data split`` does; returns them. ``help(prefopt.data.split)`` lists all options."""
    ...
