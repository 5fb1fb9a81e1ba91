"""Rows from any layout into another: ``prefopt data convert``. Nothing is lost, or the row is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from prefopt.config.tools import DataConvertConfig, DataSplitConfig
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import Reading, open_comparisons
from prefopt.data.files.read import raw_lines
from prefopt.data.files.sources import Source, find_sources
from prefopt.data.files.write import RowFile, row_files
from prefopt.data.layouts import LAYOUTS, writable_layout
from prefopt.data.layouts.layout import Layout
from prefopt.data.problems import Problem, describe, refuse, refused_rows
from prefopt.data.sampler import split_by_prompt
from prefopt.data.table import KEY, KeyArray
from prefopt.errors import DataError
from prefopt.records import Comparison

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
    layout = writable_layout(config.layout)
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


def paths_of(sources: Sequence[Source]) -> list[Path]:
    """The files among the sources."""
    return [source.path for source in sources if source.path is not None]


def loose_columns(layout: Layout) -> set[str]:
    """Columns in which null stands for absent, at any depth, as far as the layout reads them."""
    return {name for name in layout.known if name not in FREE}


CANONICAL = LAYOUTS["canonical"]


def run_split(config: DataSplitConfig) -> int:
    """Write both files, say how many rows each has, and give the exit status 0.

    Rows of JSON lines stay as they are, byte for byte; what comes from other files, or from several layouts, or goes
    into parquet, is written in the canonical layout. Raises :class:`DataError` where rows are refused or all have one
    prompt, :class:`ConfigError` for files that cannot be the output, :class:`RunError` where the disk stands in the
    way.
    """
    sources = find_sources(config.data)
    outputs = {"--output-train": config.output_train, "--output-eval": config.output_eval}
    reporter = Reporter()
    loose = loose_columns(CANONICAL)
    with row_files(outputs, overwrite=config.overwrite, inputs=paths_of(sources), loose=loose) as files:
        readings = [open_comparisons(s, format=config.format, columns=config.column_words) for s in sources]
        as_they_are = (
            all(file.path.suffix == ".jsonl" for file in files)
            and not any(reading.joined for reading in readings)
            and len({reading.layout for reading in readings}) == 1
            and all(source.path is not None and raw_lines(source.path) is not None for source in sources)
        )
        keys, problems = _keys(readings, check=not as_they_are)
        settle(problems, sum(reading.count for reading in readings), config.on_bad_row, reporter)
        _, held = split_by_prompt(keys, config.fraction, config.seed)
        side = np.zeros(len(keys), np.int8)
        side[np.asarray(held)] = 1
        sides = iter(side.tolist())
        for source, reading in zip(sources, readings, strict=True):
            refused = {p.row for p in problems if p.file == reading.file}
            _write(source, reading, refused, sides, files, as_they_are=as_they_are)
        for file in files:
            file.finish()
    reporter.say(f"rows {f'as they were, {readings[0].layout}' if as_they_are else 'in the canonical layout'}")
    for which, file in enumerate(files):
        prompts = len(np.unique(keys[side == which]))
        reporter.say(f"{file.path}: {file.written:,} rows, {prompts:,} prompts")
    for source, reading in zip(sources, readings, strict=True):
        for note in (*source.notes, *reading.notes):
            if as_they_are or READ_OTHERWISE not in note:
                reporter.say(f"note: {note}")
    return 0


def _keys(readings: Sequence[Reading], *, check: bool) -> tuple[KeyArray, list[Problem]]:
    """[rows] names of the prompts of all rows that can be written, and the problems of the others.

    ``check``: they are to be written in the canonical layout.
    """
    keys, problems = bytearray(), []
    for c in (row for reading in readings for row in reading):
        if isinstance(c, Problem):
            problems.append(c)
            continue
        if check:
            try:
                CANONICAL.write(c)
            except DataError as error:
                problems.append(Problem(CANNOT_HOLD, c.row, error.what, c.file))
                continue
        keys += c.prompt_key
    return np.frombuffer(bytes(keys), KEY), problems


def _write(
    source: Source,
    reading: Reading,
    refused: Collection[int],
    sides: Iterator[int],
    files: Sequence[RowFile],
    *,
    as_they_are: bool,
) -> None:
    if as_they_are:
        assert source.path is not None
        for number, line in enumerate(raw_lines(source.path) or (), 1):
            if number not in refused:
                files[next(sides)].write_line(line.removesuffix(b"\n"))
        return
    for c in reading:
        if isinstance(c, Comparison) and c.row not in refused:
            files[next(sides)].write(CANONICAL.write(c))
