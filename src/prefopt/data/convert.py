"""Rows from any layout into another: ``prefopt data convert``. Nothing is lost, or the row is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt.config.data_verbs import DataConvertConfig
from prefopt.config.option import nearest
from prefopt.data.formats import open_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.layout import Layout
from prefopt.data.problem import Problem, describe, refuse, refused_rows
from prefopt.data.sources import Source, find_sources
from prefopt.data.write_rows import RowFile, row_files
from prefopt.errors import ConfigError, DataError
from prefopt.progress import Reporter

# Columns of a layout whose objects are what people put there, key by key.
FREE = ("extra", "tools", "metadata")
CANNOT_HOLD = "cannot be written"
# Begins the note that names columns which a run does not read; here they are written all the same.
READ_OTHERWISE = "columns not read"


def run_convert(config: DataConvertConfig) -> int:
    """Write the rows, say how many, and give the exit status 0.

    Raises :class:`DataError` where rows are refused or none is left, :class:`ConfigError` for a file that cannot be
    the output and for an unknown layout, :class:`RunError` where the disk stands in the way.
    """
    layout = layout_named(config.layout)
    sources = find_sources(config.data)
    reporter = Reporter()
    problems: list[Problem] = []
    read = 0
    outputs = {"--output": config.output}
    with row_files(outputs, overwrite=config.overwrite, inputs=paths_of(sources), loose=loose_columns(layout)) as files:
        for source in sources:
            read += convert_source(source, layout, files[0], config.format, config.column_words, problems, reporter)
        settle(problems, read, config.on_bad_row, reporter)
        files[0].finish()
    reporter.say(f"{read:,} rows read, {files[0].written:,} written to {config.output} as {layout.name}")
    return 0


def convert_source(
    source: Source,
    layout: Layout,
    file: RowFile,
    format: str | None,
    columns: Sequence[str] | None,
    problems: list[Problem],
    reporter: Reporter,
) -> int:
    """Write the rows of one source, and add those that cannot be to ``problems``; how many there were in all."""
    reading = open_comparisons(source, format=format, columns=columns)
    for c in reading:
        if isinstance(c, Problem):
            problems.append(c)
            continue
        try:
            file.write(layout.write(c))
        except DataError as error:
            problems.append(Problem(CANNOT_HOLD, c.row, error.what, c.file))
    for note in (*source.notes, *reading.notes):
        if READ_OTHERWISE not in note:
            reporter.say(f"note: {note}")
    return reading.count


def settle(problems: Sequence[Problem], read: int, on_bad_row: str, reporter: Reporter) -> None:
    """Refuse, or say what is left out. Raises :class:`DataError`."""
    if problems and on_bad_row == "refuse":
        raise refuse(problems, read)
    if refused_rows(problems) == read:
        raise DataError(f"none of {read} rows can be written: {describe(problems)}")
    if problems:
        reporter.say(f"{refused_rows(problems):,} of {read:,} rows left out: {describe(problems)}")


def layout_named(name: str) -> Layout:
    """The layout of ``--layout``. Raises :class:`ConfigError`."""
    plain = name.strip().lower().replace("_", "-")
    if plain not in LAYOUTS:
        guess = nearest(plain, list(LAYOUTS)) or f"; there are {', '.join(LAYOUTS)}"
        raise ConfigError(f"--layout {name!r} is no layout{guess}")
    if not LAYOUTS[plain].written:
        raise ConfigError(f"--layout {plain}: such rows are read, not written; --layout canonical holds all they say")
    return LAYOUTS[plain]


def paths_of(sources: Sequence[Source]) -> list[Path]:
    """The files among the sources."""
    return [source.path for source in sources if source.path is not None]


def loose_columns(layout: Layout) -> set[str]:
    """Columns in which null stands for absent, at any depth, as far as the layout reads them."""
    return {name for name in layout.known if name not in FREE}
