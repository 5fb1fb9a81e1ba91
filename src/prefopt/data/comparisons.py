"""Read rows of any layout as comparisons, and write them: ``prefopt data convert`` and ``prefopt data split``.

A first pass over all rows recognises their layout (:data:`prefopt.data.layouts.LAYOUTS`) and counts them. Every later
pass reads them again, so memory does not grow with the file.

>>> reading = parse_comparisons([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 22"}, {"prompt": "?"}], "rows")
>>> reading.layout, reading.count
('preference-text', 2)
>>> [type(row).__name__ for row in reading]
['Comparison', 'Problem']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np

from prefopt.config.tools import DataConvertConfig, DataSplitConfig
from prefopt.core.terminal import Reporter
from prefopt.data.files.content import CSV_NAMES
from prefopt.data.files.sources import FileOrigin, MemoryOrigin, Source, find_sources, raw_lines
from prefopt.data.files.write import row_files
from prefopt.data.layouts import LAYOUTS, named_layout, writable_layout
from prefopt.data.layouts.columns import column_map, find_dataset_info, parse_column_options, shared_column
from prefopt.data.layouts.layout import ColumnMap, Layout
from prefopt.data.layouts.recognise import Recognised, listed, recognise
from prefopt.data.layouts.values import BadRow
from prefopt.data.pictures import PictureFolder
from prefopt.data.sampler import split_by_prompt
from prefopt.data.table import KEY
from prefopt.data.validate import Problem, describe, refuse, refused_rows
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison, tiers_of

Rows = Callable[[], Iterator[object]]

# Rows of one prompt that become one comparison, at most; it bounds the memory.
MAX_JOINED_ROWS = 64
CANONICAL = LAYOUTS["canonical"]
# Columns of a layout whose objects have keys of their own.
FREE = ("extra", "tools", "metadata")
# Begins the note on columns that a run does not read; the canonical layout keeps them.
NOT_READ = "columns not read"


class Reading:
    """The rows of one source as comparisons.

    Iterating gives a :class:`Comparison` or :class:`Problem` for each row, in order; each pass reads the source again.
    ``layout`` is the name of the layout, ``count`` the number of rows. ``notes`` names what is not read, such as
    unknown columns; the first full pass adds unknown keys inside columns. ``lost`` describes unread columns that seem
    to hold responses, with the remedy: preference methods refuse them. ``joined``: consecutive rows of one prompt are
    one comparison, and counted as one.
    """

    def __init__(self, file: str, rows: Rows, found: Recognised, columns: ColumnMap, notes: Sequence[str]) -> None:
        self.file, self.layout, self.count = file, found.layout.name, found.count
        self.joined, self.lost = found.layout.joins, found.lost
        self.notes = [f"{self.file}: {note}" for note in notes]
        self._rows, self._found, self._columns, self._unread_noted = rows, found, columns, False
        if self.joined:
            self.count = sum(1 for _ in self)
            what = "consecutive rows of one prompt are compared"
            self.notes.append(f"{self.file}: {found.count} rows are {self.count} prompts: {what}")

    def __iter__(self) -> Iterator[Comparison | Problem]:
        return _join_prompts(self._each()) if self.joined else self._each()

    def _each(self) -> Iterator[Comparison | Problem]:
        number = 0
        for number, row in enumerate(self._rows(), 1):
            if isinstance(row, DataError):
                yield Problem("unreadable", number, row.what, self.file)
                continue
            try:
                yield self._found.layout.parse(row, number, self.file, self._columns)
            except BadRow as bad:
                yield Problem(bad.kind, number, bad.what, self.file, bad.pictures)
        if number != (count := self._found.count):
            raise DataError(f"had {count} rows and now has {number}: it changed while it was read", file=self.file)
        if not self._unread_noted and (unread := self._columns.tags.unread):
            self.notes.append(f"{self.file}: keys inside of columns not read: {listed(sorted(unread))}")
        self._unread_noted = True

    @cached_property
    def _all(self) -> list[Comparison | Problem]:
        return list(self)

    @property
    def comparisons(self) -> list[Comparison]:
        """All comparisons, held in memory."""
        return [c for c in self._all if isinstance(c, Comparison)]

    @property
    def problems(self) -> list[Problem]:
        """All problems, held in memory."""
        return [p for p in self._all if isinstance(p, Problem)]


def read_comparisons(path: str | Path, *, pictures: PictureFolder | None = None) -> Reading:
    """The rows of one file; see :func:`open_comparisons`. ``pictures``: the folder of their pictures, by default the
    file's own."""
    return open_comparisons(Source(str(path), Path(path), FileOrigin(Path(path))), pictures=pictures)


def own_folder(source: Source) -> PictureFolder:
    """The folder that bounds a source's pictures where none is named: that of its file, or the working folder."""
    return PictureFolder((source.path.parent if source.path is not None else Path()).absolute())


def parse_comparisons(
    rows: Iterable[object], file: str, *, format: str | None = None, columns: Sequence[str] | None = None
) -> Reading:
    """Rows in memory; ``file`` is their name in messages. See :func:`open_comparisons`."""
    held = rows if isinstance(rows, Sequence) else list(rows)
    return open_comparisons(Source(file, None, MemoryOrigin(held)), format=format, columns=columns)


def open_comparisons(
    source: Source,
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    pictures: PictureFolder | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Reading:
    """The rows of a source as comparisons.

    The layout is the one named by ``format``; or by a ``dataset_info.json`` beside the file that lists it; or it is
    recognised from all rows. ``columns`` (``NAME=COLUMN``) renames columns and has precedence over
    ``dataset_info.json``. ``pictures`` is the folder of pictures; by default the one in ``columns``, or
    :func:`own_folder`. ``stop`` is called before each row and may raise.

    Raises :class:`DataError` where there is no row, no row has a known layout, layouts are mixed, or a column of
    ``columns`` does not exist; :class:`ConfigError` for an unknown layout or NAME. A bad row (a missing field, an
    unknown role) is a :class:`Problem` instead.
    """
    named = named_layout(format) if format is not None else None
    options = parse_column_options(columns)
    given = options.pairs
    entry = find_dataset_info(source.path) if named is None else None
    cells = source.suffix in CSV_NAMES
    pairs, refused = ({**entry.pairs, **given}, entry.media) if entry else (given, ())
    if entry and (clash := shared_column(pairs)):
        who = "dataset_info.json beside it, with --columns," if given else "dataset_info.json beside it"
        raise DataError(f"{who} gives {clash} (entry {entry.name}); correct it", file=source.name)
    means = {**(entry.means if entry else {}), **options.means}
    folder = pictures or options.pictures or own_folder(source)
    understood = column_map(pairs, refused=refused, cells=cells, means=means, ignored=options.ignored, folder=folder)
    if options.headless:
        if source.path is None or not cells:
            raise ConfigError(f"--header none is for .csv and .tsv files; {source.name} is neither")
        source = replace(source, origin=FileOrigin(source.path, header=False))
    named = LAYOUTS[entry.layout] if entry else named

    def rows() -> Iterator[object]:
        for row in source.rows(keep_going=True):
            stop()
            if cells and isinstance(row, dict):  # empty cells are null
                row = {k: None if v == "" else v for k, v in row.items()}
            yield row

    found = recognise(rows(), source.name, named, understood, asked=given, why=entry.note if entry else "")
    return Reading(source.name, rows, found, understood, [entry.note, *found.notes] if entry else found.notes)


def _join_prompts(rows: Iterable[Comparison | Problem]) -> Iterator[Comparison | Problem]:
    """One comparison for consecutive rows of one prompt, with the number of the first row."""
    for _, group in groupby(rows, lambda row: row.prompt if isinstance(row, Comparison) else None):
        while held := list(islice(group, MAX_JOINED_ROWS)):
            found = [c for c in held if isinstance(c, Comparison)]
            yield from [_joined(found)] if found else held


def _joined(rows: list[Comparison]) -> Comparison:
    first = rows[0]
    if len(rows) == 1:
        return first
    scores = tuple(score for row in rows for score in row.scores or ())
    responses = tuple(response for row in rows for response in row.responses)
    extra: dict[str, object] = {name: [row.extra.get(name) for row in rows] for name in first.extra}
    return replace(first, responses=responses, scores=scores, tiers=tiers_of(scores), extra=extra)


def run_convert(config: DataConvertConfig) -> int:
    """``prefopt data convert``: write the rows in the layout ``--layout`` and return the exit status 0.

    Raises :class:`DataError` where rows are refused (one that the layout cannot hold, too) or none is left,
    :class:`ConfigError` for an invalid output or layout, :class:`RunError` for an error of the disk.
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
    """``prefopt data split``: write both files, report their rows and prompts, and return the exit status 0.

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
        if copied and {p.resolve().parent for p in paths} != {file.path.resolve().parent for file in files}:
            # Relative paths of pictures would lead nowhere: such rows are written again, with whole ones.
            copied = not any(c.pictures for c in chain.from_iterable(readings) if isinstance(c, Comparison))
        known, problems = bytearray(), []
        for c in chain.from_iterable(readings):
            row = c if copied else _written(c, CANONICAL)
            if isinstance(row, Problem):
                problems.append(row)
            elif isinstance(c, Comparison):
                known += c.prompt_key
        keys = np.frombuffer(bytes(known), KEY)
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
    reporter.say(f"rows copied as {readings[0].layout}" if copied else "rows written in the canonical layout")
    for number, file in enumerate(files):
        reporter.say(f"{file.path}: {file.written:,} rows, {len(np.unique(keys[side == number])):,} prompts")
    for source, reading in zip(sources, readings, strict=True):
        _report_notes(source, reading, reporter, unread=copied)
    return 0


def loose_columns(layout: Layout) -> set[str]:
    """Columns in which null means absent, at any depth, because the layout reads them so."""
    return {name for name in layout.known if name not in FREE}


def _written(c: Comparison | Problem, layout: Layout) -> Mapping[str, object] | Problem:
    if isinstance(c, Problem):
        return c
    try:
        return layout.write(c)
    except DataError as error:
        return Problem("cannot be written", c.row, error.what, c.file)


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
