"""Rows into two files by prompt: ``prefopt data split``. The sides are those that ``--eval-fraction`` gives a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from prefopt.config.data_verbs import DataSplitConfig
from prefopt.data.convert import CANNOT_HOLD, READ_OTHERWISE, loose_columns, paths_of, settle
from prefopt.data.formats import Reading, open_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.problem import Problem
from prefopt.data.read import raw_lines
from prefopt.data.sources import Source, find_sources
from prefopt.data.split import split_by_prompt
from prefopt.data.table import KEY, KeyArray
from prefopt.data.write_rows import RowFile, row_files
from prefopt.errors import DataError
from prefopt.progress import Reporter
from prefopt.records import Comparison

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
