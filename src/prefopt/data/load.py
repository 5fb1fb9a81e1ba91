"""Load data files as groups of token ids; every row is kept or refused with a reason.

``rows read == rows kept + rows refused``, and a run reports all three.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from prefopt.core.terminal import Reporter
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import Reading, open_comparisons, own_folder
from prefopt.data.files.sources import Source, find_sources
from prefopt.data.layouts import code_of_layouts
from prefopt.data.layouts.columns import find_dataset_info
from prefopt.data.pictures import changed_pictures, file_state
from prefopt.data.sampler import Indices, split_by_prompt
from prefopt.data.table import Columns, GroupTable, Part, joined
from prefopt.data.token_cache import Append, Report, TokenCache, Tokenised, TokenKey
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import DataKind, Problem, Warnings, describe, refuse, refused_rows, warning_lines
from prefopt.data.workers import MAX_WORKERS, CannotStart, Chunk, Preparer, Workers, chunks
from prefopt.errors import ConfigError, DataError

log = logging.getLogger(__name__)

OnBadRow = Literal["refuse", "skip"]

# With fewer rows, one process is done before a second one has started.
PARALLEL_ROWS = 4000
# Problems that are not errors: such rows are left out and counted.
NO_FAULT = ("only ties",)
# Nanoseconds by which times of files lag behind the clock.
LAG = 20_000_000
# Tokens with all steps, over those of each response's longest step, above which a note tells of it.
REPEATED = 4
# Kinds of data for which an unread column of responses is an error.
PREFERENCES = ("pairs", "scored", "ranking", "labels")


@dataclass(slots=True)
class GroupSet:
    """Groups of all sources in order, and what became of every row.

    ``template`` is that of :class:`Renderer`. ``cached`` counts the rows whose groups came from the token cache.
    """

    groups: GroupTable = field(default_factory=GroupTable)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    template: str | None = None
    cached: int = 0

    @property
    def kept(self) -> int:
        """Rows that became groups (one each, except texts that were cut into windows)."""
        return self.read - self.refused

    @property
    def refused(self) -> int:
        """Rows without a group; ``problems`` has the reasons."""
        return refused_rows(self.problems)

    @property
    def truncated(self) -> int:
        """Groups whose prompt or response was truncated."""
        return int(self.groups.truncated_G.sum())

    def summary(self) -> list[str]:
        """Lines that a run prints: rows read, kept, refused, cached and truncated, then notes."""
        lines = [f"{self.read} rows read, {self.kept} kept, {self.refused} refused"]
        if self.problems:
            files = {p.file for p in self.problems}  # several files are named row by row
            place = f"{files.pop()}: " if len(files) == 1 < len(self.groups.parts) else ""
            lines.append(f"refused: {place}{describe(self.problems)}")
        if self.cached:
            some = "" if self.cached == self.read else f" of {self.read}"
            lines.append(f"{self.cached}{some} rows from the token cache")
        if truncated := self.truncated:
            prompts = int((self.groups.prompt_cut_G > 0).sum())
            responses = int((self.groups.cut_N > 0).sum())
            lines.append(f"{truncated} of {self.kept} rows truncated ({prompts} prompts, {responses} responses)")
        return lines + self.notes

    def split(self, fraction: float, seed: int, *, least: int = 1) -> tuple[Indices, Indices]:
        """Indices of groups (train, held out), no prompt on both sides; see :func:`split_by_prompt`."""
        return split_by_prompt(self.groups.prompt_key_G, fraction, seed, least=least)


@dataclass(frozen=True, slots=True)
class _GroupLoader:
    """The options of :func:`load_groups` that hold for every source."""

    tokenizer: Tokenizer
    rendering: Rendering
    kind: DataKind
    format: str | None
    columns: Sequence[str] | None
    workers: int | None
    reporter: Reporter
    stop: Callable[[], None]

    def cached(self, source: Source, rendering_digest: str) -> Tokenised:
        """The groups of a source from the token cache, tokenised at first."""
        contents = source.digest()
        # How a file is read also depends on its ending and on a dataset_info.json beside it.
        beside = find_dataset_info(source.path) if self.format is None else None
        how = (self.format, self.columns, source.suffix, code_of_layouts(self.format), beside)
        key = TokenKey(contents, tuple(map(str, how)), self.kind, rendering_digest)

        def make(append: Append) -> Report:
            reading = open_comparisons(source, format=self.format, columns=self.columns, stop=self.stop)
            report = replace(self.tokenise(reading, append), folder=str(own_folder(source).path))
            if source.digest() != contents:
                raise DataError("changed while it was read; run the command again", file=source.name)
            return report

        cache = TokenCache()
        found = cache.get(key, make, file=source.name, source=source.entry, stop=self.stop)
        folder = str(own_folder(source).path)
        if found.cached and found.named_pictures and found.report.folder != folder:
            # The same rows, whose paths lead elsewhere.
            key = replace(key, reading=(*key.reading, folder))
            found = cache.get(key, make, file=source.name, source=source.entry, stop=self.stop)
        if not found.cached:
            return found
        changed = changed_pictures(found.part.picture_files)
        # A picture that was missing or damaged may be there by now.
        mended = any(file_state(path) != state for path, state in found.report.pictures.items())
        if changed or mended:
            if changed:
                log.warning("%s: %d pictures have changed, such as %s", source.name, len(changed), changed[0])
            cache.remove(key)
            found = cache.get(key, make, file=source.name, source=source.entry, stop=self.stop)
        return found

    def tokenise(self, reading: Reading, append: Append) -> Report:
        """Append the columns of all groups, chunk by chunk; the report accounts for the other rows."""
        if reading.lost and self.kind in PREFERENCES:
            raise DataError(reading.lost, file=reading.file)
        problems: list[Problem] = []
        warnings: Warnings = {}
        conversations, done, started = False, 0, time.time_ns()
        reporter = self.reporter if reading.count >= PARALLEL_ROWS else Reporter("none")
        with (
            reporter.bar(f"tokenising {reading.file}", reading.count, "rows") as bar,
            closing(self._prepared(reading)) as prepared,
        ):
            for chunk in prepared:
                append(chunk.columns)
                problems += chunk.problems
                for what, rows in chunk.warnings.items():
                    warnings.setdefault(what, []).extend(rows)
                conversations = conversations or chunk.conversations
                done += chunk.rows
                bar.update(done)
        template = Renderer(self.tokenizer, self.rendering).template if conversations else None
        notes = list(reading.notes)  # complete after the last row only
        states = {path: file_state(path) for p in problems for path in p.pictures}
        pictures = {path: state if max(state, default=0) < started - LAG else [-1] for path, state in states.items()}
        return Report(reading.file, reading.count, problems, notes, warnings, template, pictures)

    def _prepared(self, reading: Reading) -> Generator[Chunk]:
        """The chunks of a source, in order; other processes make them where there are many rows."""
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(self.workers or processors, MAX_WORKERS)
        how = self.tokenizer, self.rendering, self.kind
        if count > 1 and reading.count >= PARALLEL_ROWS:
            try:
                with Workers(*how, count, file=reading.file) as pool:
                    yield from pool.map(chunks(reading), self.stop)
                return
            except CannotStart as why:
                log.warning("%s is tokenised by one process: %s", reading.file, why)
        prepare = Preparer(*how)
        for chunk in chunks(reading):
            self.stop()
            yield prepare(chunk)


def load_groups(
    data: Sequence[str | os.PathLike[str] | Reading],
    tokenizer: Tokenizer,
    rendering: Rendering | None = None,
    *,
    max_length: int | None = None,
    add_eos: bool = True,
    kind: DataKind = "pairs",
    on_bad_row: OnBadRow = "refuse",
    format: str | None = None,
    columns: Sequence[str] | None = None,
    workers: int | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], None] = lambda: None,
) -> GroupSet:
    """Read, check and tokenise ``data``, or take it from the token cache.

    ``data`` holds names (see :func:`find_sources`), or rows in memory (see :func:`parse_comparisons`), which are not
    cached. ``max_length`` and ``add_eos`` make a rendering where there is none. ``kind`` is that of :func:`convert`,
    ``format`` and ``columns`` are those of :func:`open_comparisons`. At most ``workers`` processes tokenise a large
    file, by default one per processor. ``stop`` is called now and then and may raise. ``groups.source_G`` is i for
    ``data[i]``.

    Raises :class:`DataError` for a file that cannot be read, for bad rows under ``on_bad_row="refuse"`` (it names all
    of them), and where no row is left; :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`.
    """
    if not data:
        raise ConfigError("no data file is named; use --data FILE")
    rendering, reporter = rendering or Rendering(max_length, add_eos), reporter or Reporter("none")
    loader = _GroupLoader(tokenizer, rendering, kind, format, columns, workers, reporter, stop)
    found = []
    for number, reading in enumerate(rows for rows in data if isinstance(rows, Reading)):
        made: list[Columns] = []
        report = loader.tokenise(reading, made.append)
        found.append(Tokenised(Part(joined(made), source=number), report))
    sources = find_sources([name for name in data if not isinstance(name, Reading)])
    assert not (found and sources), "files and rows in memory are loaded apart"
    digest = Renderer(tokenizer, rendering).digest() if sources else ""
    notes = [note for source in sources for note in source.notes]
    return _group_set([*found, *(loader.cached(source, digest) for source in sources)], notes, on_bad_row)


def _group_set(found: Sequence[Tokenised], notes: Sequence[str], on_bad_row: OnBadRow) -> GroupSet:
    reports = [f.report for f in found]
    result = GroupSet(
        GroupTable([f.part for f in found]),
        read=sum(r.read for r in reports),
        problems=[p for r in reports for p in r.problems],
        notes=[*notes, *(note for r in reports for note in r.notes)],
        template=next((r.template for r in reports if r.template), None),
        cached=sum(f.report.read for f in found if f.cached),
    )
    result.notes += dict.fromkeys(what for r in reports for what, rows in r.warnings.items() if not rows)
    for r in reports:
        place = f"{r.file}: " if len(reports) > 1 else ""
        about_rows = {what: rows for what, rows in r.warnings.items() if rows}
        result.notes += [place + line for line in warning_lines(about_rows)]
    result.notes += _repeated(result.groups)
    errors = [p for p in result.problems if p.kind not in NO_FAULT]
    if errors and on_bad_row != "skip":
        raise refuse(errors, result.read)
    if not result.kept:
        file = reports[0].file if len(reports) == 1 else None
        raise DataError(f"none of {result.read} rows can be used: {describe(result.problems)}", file=file)
    return result


def _repeated(groups: GroupTable) -> list[str]:
    """A note about rows whose steps repeat most of what they hold."""
    if not len(groups.steps_N) or groups.steps_N.max() == 1:
        return []
    longest_N = np.maximum.reduceat(groups.length_S, np.cumsum(groups.steps_N) - groups.steps_N)
    owner_N = np.repeat(np.arange(len(groups)), groups.responses_G)
    once_G = groups.prefix_G + np.bincount(owner_N, longest_N, len(groups)).astype(np.int64)
    many = groups.tokens_G > REPEATED * once_G
    if not many.any():
        return []
    rows = f"{many.sum()} rows" if many.sum() > 1 else "1 row"
    once, steps = int(once_G[many].sum()), int(groups.tokens_G[many].sum())
    what = f"steps multiply the tokens of {rows} by {steps / once:.1f}, from {once:,} to {steps:,}"
    return [f"{what}: --earlier-turns as-shown trains one sequence for each response"]
