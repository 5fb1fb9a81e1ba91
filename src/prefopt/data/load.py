"""From files to groups, with every row accounted for: what a method calls.

``rows read == rows kept + rows refused``, and a run says all three.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

from prefopt.core.terminal import Reporter
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.render_options import Rendering
from prefopt.data.comparisons import Reading, open_comparisons
from prefopt.data.files.content import layout_name
from prefopt.data.files.sources import Origin, Source, find_sources
from prefopt.data.kinds import Problem, Want, describe, refuse, refused_rows
from prefopt.data.layouts import code_of_layouts
from prefopt.data.layouts.columns import find_dataset_info
from prefopt.data.problems import Findings, lines, merge
from prefopt.data.sampler import Indices, split_by_prompt
from prefopt.data.table import Columns, GroupTable, Part, joined
from prefopt.data.token_cache import Append, Report, TokenCache, Tokenised, TokenKey
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.workers import MOST, CannotStart, Chunk, Preparer, Workers, chunks
from prefopt.errors import ConfigError, DataError

log = logging.getLogger(__name__)

OnBadRow = Literal["refuse", "skip"]

# A pass over a file of this size takes some seconds.
LARGE = 100_000_000
# Fewer rows are done before a second process has started.
PARALLEL_ROWS = 4000
# What is nothing wrong with a row: it says something, only not what is wanted. Such rows are left out and counted.
NO_FAULT = ("only ties",)
# What needs more of a row than a prompt or one response: a column of responses that is not read is missed there.
PREFERENCES = ("pairs", "scored", "ranking", "labels")


@dataclass(slots=True)
class GroupSet:
    """Groups of all sources in order, and what became of every row.

    ``template`` is the chat template that a model trained on these groups should carry, where its tokenizer has another
    or none. ``cached`` counts the rows whose groups came from the token cache.
    """

    groups: GroupTable = field(default_factory=GroupTable)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    template: str | None = None
    cached: int = 0

    @property
    def kept(self) -> int:
        """Rows that became groups (one each, but of texts that were cut into windows)."""
        return self.read - self.refused

    @property
    def refused(self) -> int:
        """Rows that did not; ``problems`` says why."""
        return refused_rows(self.problems)

    @property
    def truncated(self) -> int:
        """Groups that lost tokens of their prompt or of a response."""
        return int(self.groups.truncated_G.sum())

    def summary(self) -> list[str]:
        """Lines that a run prints: rows read, kept, refused, from the cache and truncated, notes."""
        said = [f"{self.read} rows read, {self.kept} kept, {self.refused} refused"]
        if self.problems:
            files = {p.file for p in self.problems}  # several are told apart row by row
            place = f"{files.pop()}: " if len(files) == 1 < len(self.groups.parts) else ""
            said.append(f"refused: {place}{describe(self.problems)}")
        if self.cached:
            some = "" if self.cached == self.read else f" of {self.read}"
            said.append(f"{self.cached}{some} rows from the token cache")
        if truncated := self.truncated:
            prompts = int((self.groups.column("prompt_cut_G") > 0).sum())
            responses = int((self.groups.column("cut_N") > 0).sum())
            said.append(f"{truncated} of {self.kept} rows truncated ({prompts} prompts, {responses} responses)")
        return said + self.notes

    def split(self, fraction: float, seed: int) -> tuple[Indices, Indices]:
        """Indices of groups (train, held out), no prompt on both sides; see :func:`split_by_prompt`."""
        return split_by_prompt(self.groups.prompt_key_G, fraction, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What :func:`load_groups` was asked for, whatever the source."""

    tokenizer: Tokenizer
    rendering: Rendering
    want: Want
    on_bad_row: OnBadRow
    format: str | None = None
    columns: Sequence[str] | None = None
    workers: int | None = None
    reporter: Reporter
    stop: Callable[[], None] | None

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("refuse", "skip"):
            raise ConfigError(f"--on-bad-row {self.on_bad_row} should be refuse or skip")


def load_groups(
    names: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    rendering: Rendering | None = None,
    *,
    max_length: int | None = None,
    add_eos: bool = True,
    want: Want = "pairs",
    on_bad_row: OnBadRow = "refuse",
    format: str | None = None,
    columns: Sequence[str] | None = None,
    workers: int | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], None] | None = None,
) -> GroupSet:
    """Read, check and render what ``names`` stand for (see :func:`find_sources`), or take it from the token cache.

    ``max_length`` and ``add_eos`` stand for a rendering of their own. ``want`` is what is made of a row (see
    :func:`prefopt.data.kinds.convert`); ``format`` and ``columns`` are those of :func:`open_comparisons`. ``workers``:
    processes at most that tokenise a large file, one for each processor where it is not given. ``stop`` is called now
    and then and may raise. The groups that ``names[i]`` gave have the number i in ``groups.source_G``.

    Raises :class:`DataError` for a file that cannot be read, for bad rows under ``on_bad_row="refuse"`` (all of them
    are named at once), and where no row is left; :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`.
    """
    if not names:
        raise ConfigError("no data file is named; use --data FILE")
    how = _How(
        tokenizer=tokenizer,
        rendering=rendering or Rendering(max_length, add_eos),
        want=want,
        on_bad_row=on_bad_row,
        format=format,
        columns=columns,
        workers=workers,
        reporter=reporter or Reporter("none"),
        stop=stop,
    )
    sources = find_sources(names)
    digest = Renderer(tokenizer, how.rendering).digest()
    found = [_cached(source, digest, how) for source in sources]
    return _put_together(found, [note for source in sources for note in source.notes], on_bad_row)


def build_groups(
    rows: Sequence[Reading],
    tokenizer: Tokenizer,
    rendering: Rendering | None = None,
    *,
    max_length: int | None = None,
    add_eos: bool = True,
    want: Want = "pairs",
    on_bad_row: OnBadRow = "refuse",
    workers: int | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], None] | None = None,
) -> GroupSet:
    """As :func:`load_groups`, from rows that are in memory already (see :func:`parse_comparisons`): nothing is kept."""
    how = _How(
        tokenizer=tokenizer,
        rendering=rendering or Rendering(max_length, add_eos),
        want=want,
        on_bad_row=on_bad_row,
        workers=workers,
        reporter=reporter or Reporter("none"),
        stop=stop,
    )
    found = []
    for number, reading in enumerate(rows):
        made: list[Columns] = []
        report = _tokenise(reading, how, made.append)
        found.append(Tokenised(Part(joined(made), source=number), report))
    return _put_together(found, [], on_bad_row)


def _put_together(found: Sequence[Tokenised], notes: Sequence[str], on_bad_row: OnBadRow) -> GroupSet:
    reports = [f.report for f in found]
    result = GroupSet(
        GroupTable([f.part for f in found]),
        read=sum(r.read for r in reports),
        problems=[p for r in reports for p in r.problems],
        notes=[*notes, *(note for r in reports for note in r.notes)],
        template=next((r.template for r in reports if r.template), None),
        cached=sum(f.report.read for f in found if f.cached),
    )
    for said in dict.fromkeys(what for r in reports for what, rows in r.findings.items() if not rows):
        result.notes.append(said)
    for r in reports:
        place = f"{r.file}: " if len(reports) > 1 else ""
        result.notes += [place + line for line in lines({what: rows for what, rows in r.findings.items() if rows})]
    faults = [p for p in result.problems if p.kind not in NO_FAULT]
    if faults and on_bad_row == "refuse":
        raise refuse(faults, result.read)
    if not result.kept:
        file = reports[0].file if len(reports) == 1 else None
        raise DataError(f"none of {result.read} rows can be used: {describe(result.problems)}", file=file)
    return result


def _cached(source: Source, digest: str, how: _How) -> Tokenised:
    contents = source.digest()
    # What is not in a file and yet decides how it is read: its ending, and what lies beside it.
    name = str(source.path and layout_name(source.path))
    reading = (str(how.format), str(how.columns), name, code_of_layouts(how.format))
    beside = find_dataset_info(source.path) if how.format is None else None
    key = TokenKey(contents, (*reading, str(beside)), how.want, digest)
    source = replace(source, origin=_Watched(source.origin, how.stop))

    def make(append: Append) -> Report:
        if source.path and source.path.stat().st_size >= LARGE:
            how.reporter.say(f"data: {source.name}: looking at all rows to tell their layout")
        report = _tokenise(open_comparisons(source, format=how.format, columns=how.columns), how, append)
        if source.digest() != contents:
            raise DataError("changed while it was read; run the command again", file=source.name)
        return report

    return TokenCache().get(key, make, file=source.name, source=source.entry, stop=how.stop)


@dataclass(frozen=True, slots=True)
class _Watched:
    """An origin of rows that can be stopped between any two of them, whoever reads it."""

    origin: Origin
    stop: Callable[[], None] | None

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        for row in self.origin.rows(name, keep_going):
            if self.stop is not None:
                self.stop()
            yield row

    def digest(self) -> str:
        return self.origin.digest()


def _tokenise(reading: Reading, how: _How, append: Append) -> Report:
    """Hand over the columns of all groups; what became of the other rows is given back."""
    problems: list[Problem] = []
    findings: Findings = {}
    conversations, done = False, 0
    if reading.lost and how.want in PREFERENCES:
        raise DataError(reading.lost, file=reading.file)
    with ExitStack() as stack:
        bar = None
        if reading.count >= PARALLEL_ROWS:
            bar = stack.enter_context(how.reporter.bar(f"tokenising {reading.file}", reading.count, "rows"))
        for chunk in _prepared(reading, how, stack):
            append(chunk.columns)
            problems += chunk.problems
            for what, rows in chunk.findings.items():
                findings.setdefault(what, []).extend(rows)
            conversations = conversations or chunk.conversations
            done += chunk.rows
            if bar is not None:
                bar.update(done)
    template = Renderer(how.tokenizer, how.rendering).template if conversations else None
    return Report(reading.file, reading.count, problems, list(reading.notes), merge([findings]), template)


def _prepared(reading: Reading, how: _How, stack: ExitStack) -> Iterator[Chunk]:
    """The chunks of a source, in order: made here, or by other processes where there is enough to do."""
    count = min(how.workers or _processors(), MOST)
    if count > 1 and reading.count >= PARALLEL_ROWS:
        try:
            workers = stack.enter_context(Workers(how.tokenizer, how.rendering, how.want, count, file=reading.file))
        except CannotStart as why:
            log.warning("%s is tokenised by one process: %s", reading.file, why)
        else:
            yield from workers.map(chunks(reading), how.stop)
            return
    prepare = Preparer(how.tokenizer, how.rendering, how.want)
    for chunk in chunks(reading):
        if how.stop is not None:
            how.stop()
        yield prepare(chunk)


def _processors() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
