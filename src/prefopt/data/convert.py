"""``prefopt data convert`` and ``prefopt data split``: write rows in another layout, or split them by prompt.

Nothing that a row holds is lost: a row that the output cannot hold is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prefopt.config.tools import DataConvertConfig, DataSplitConfig
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import Reading, open_comparisons
from prefopt.data.files.sources import Source, find_sources, raw_lines
from prefopt.data.files.write import row_files
from prefopt.data.layouts import LAYOUTS, writable_layout
from prefopt.data.layouts.layout import Layout
from prefopt.data.sampler import split_by_prompt
from prefopt.data.table import KEY, KeyArray
from prefopt.data.validate import Problem, describe, refuse, refused_rows
from prefopt.errors import DataError
from prefopt.records import Comparison

CANONICAL = LAYOUTS["canonical"]
# Columns of a layout whose objects have keys of their own.
FREE = ("extra", "tools", "metadata")
# Begins the note on columns that a run does not read; the canonical layout keeps them.
NOT_READ = "columns not read"
CANNOT_WRITE = "cannot be written"


def run_convert(config: DataConvertConfig) -> int:
    """Write the rows in the layout ``--layout`` and return the exit status 0.

    Raises :class:`DataError` where rows are refused or none is left, :class:`ConfigError` for an invalid output or
    layout, :class:`RunError` for an error of the disk.
    """
    layout = writable_layout(config.layout)
    sources = find_sources(config.data)
    paths = [source.path for source in sources if source.path is not None]
    reporter = Reporter()
    problems: list[Problem] = []
    read = 0
    outputs = {"--output": config.output}
    with row_files(outputs, overwrite=config.overwrite, inputs=paths, loose=loose_columns(layout)) as (file,):
        for source in sources:
            reading = open_comparisons(source, format=config.format, columns=config.column_words)
            read += reading.count
            for c in reading:
                row = _written(c, layout)
                if isinstance(row, Problem):
                    problems.append(row)
                else:
                    file.write(row)
            _report_notes(source, reading, reporter, unread=False)
        _settle(problems, read, config.on_bad_row, reporter)
        file.finish()
    reporter.say(f"{read:,} rows read, {file.written:,} written to {config.output} as {layout.name}")
    return 0


def run_split(config: DataSplitConfig) -> int:
    """Write both files, report their rows and prompts, and return the exit status 0.

    Rows of JSON lines in one layout are copied byte for byte to JSON lines; all others are written in the canonical
    layout. Raises :class:`DataError` where rows are refused or all have one prompt, :class:`ConfigError` for invalid
    outputs, :class:`RunError` for an error of the disk.
    """
    sources = find_sources(config.data)
    paths = [source.path for source in sources if source.path is not None]
    outputs = {"--output-train": config.output_train, "--output-eval": config.output_eval}
    reporter = Reporter()
    loose = loose_columns(CANONICAL)
    with row_files(outputs, overwrite=config.overwrite, inputs=paths, loose=loose) as files:
        readings = [open_comparisons(s, format=config.format, columns=config.column_words) for s in sources]
        copied = (
            all(file.path.suffix == ".jsonl" for file in files)
            and not any(reading.joined for reading in readings)
            and len({reading.layout for reading in readings}) == 1
            and len(paths) == len(sources)
            and all(raw_lines(path) is not None for path in paths)
        )
        keys, problems = _prompt_keys(readings, check=not copied)
        _settle(problems, sum(reading.count for reading in readings), config.on_bad_row, reporter)
        _, held = split_by_prompt(keys, config.fraction, config.seed)
        side = np.zeros(len(keys), np.int8)
        side[np.asarray(held)] = 1
        sides = iter(side.tolist())
        for source, reading in zip(sources, readings, strict=True):
            refused = {p.row for p in problems if p.file == reading.file}
            if copied and source.path is not None:
                for number, line in enumerate(raw_lines(source.path) or (), 1):
                    if number not in refused:
                        files[next(sides)].write_line(line.removesuffix(b"\n"))
                continue
            for c in reading:
                if isinstance(c, Comparison) and c.row not in refused:
                    files[next(sides)].write(CANONICAL.write(c))
        for file in files:
            file.finish()
    reporter.say(f"rows {f'as they were, {readings[0].layout}' if copied else 'in the canonical layout'}")
    for number, file in enumerate(files):
        reporter.say(f"{file.path}: {file.written:,} rows, {len(np.unique(keys[side == number])):,} prompts")
    for source, reading in zip(sources, readings, strict=True):
        _report_notes(source, reading, reporter, unread=copied)
    return 0


def _prompt_keys(readings: Sequence[Reading], *, check: bool) -> tuple[KeyArray, list[Problem]]:
    """[rows] prompt keys of usable rows, and the problems of the others; ``check``: the canonical layout holds them."""
    keys, problems = bytearray(), []
    for c in (row for reading in readings for row in reading):
        row = _written(c, CANONICAL) if check else c
        if isinstance(row, Problem):
            problems.append(row)
        elif isinstance(c, Comparison):
            keys += c.prompt_key
    return np.frombuffer(bytes(keys), KEY), problems


def loose_columns(layout: Layout) -> set[str]:
    """Columns in which null means absent, at any depth, because the layout reads them so."""
    return {name for name in layout.known if name not in FREE}


def _written(c: Comparison | Problem, layout: Layout) -> Mapping[str, object] | Problem:
    """The row as ``layout`` writes it, or the problem."""
    if isinstance(c, Problem):
        return c
    try:
        return layout.write(c)
    except DataError as error:
        return Problem(CANNOT_WRITE, c.row, error.what, c.file)


def _settle(problems: Sequence[Problem], read: int, on_bad_row: str, reporter: Reporter) -> None:
    """Refuse the problems, or report the rows that are left out. Raises :class:`DataError`."""
    if problems and on_bad_row == "refuse":
        raise refuse(problems, read)
    if refused_rows(problems) == read:
        raise DataError(f"none of {read} rows can be written: {describe(problems)}")
    if problems:
        reporter.say(f"{refused_rows(problems):,} of {read:,} rows left out: {describe(problems)}")


def _report_notes(source: Source, reading: Reading, reporter: Reporter, *, unread: bool) -> None:
    for note in (*source.notes, *reading.notes):
        if unread or NOT_READ not in note:
            reporter.say(f"note: {note}")
