"""Everything that is to be known of files before a run: what they hold, and what is wrong with which row.

A row is an error here exactly where a run refuses it, for both ask the same functions:
:func:`prefopt.data.validate.check`, and with a tokenizer :class:`prefopt.data.workers.Preparer`. Rows are streamed;
what is kept of a good one are some numbers and hashes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.check.duplicates import KINDS, Found, Repeats, row_suspicions
from prefopt.data.check.issues import Ledger, Severity, Tally, stated
from prefopt.data.check.lengths import Lengths, add_columns
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.sources import Source, find_sources
from prefopt.data.load import NO_FAULT, PREFERENCES
from prefopt.data.table import Array
from prefopt.data.tokenizer import end_marks
from prefopt.data.validate import DataKind, Problem, check, convert
from prefopt.data.workers import Chunk, Preparer, Row, chunks
from prefopt.errors import DataError
from prefopt.records import Comparison

if TYPE_CHECKING:
    from prefopt.data.chat.render_options import Rendering
    from prefopt.data.tokenizer import Tokenizer

TRUNCATED = "truncated"
NO_END = "no end of turn"
BROKEN_OFF = "broken off"
CONTRADICTION = "contradiction"


@dataclass(slots=True)
class Audit:
    """What was found in files of one purpose. ``examples`` are some of the rows that can be used, in their order."""

    lengths: Lengths
    files: list[Tally] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    notes: list[str] = field(default_factory=list)
    examples: list[Comparison] = field(default_factory=list)
    repeats: Repeats = field(default_factory=Repeats)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(t.rows for t in self.files)

    @property
    def prompts(self) -> int:
        """How many different prompts there are."""
        return len(np.unique(self.repeats.prompts))

    def place(self, at: int) -> tuple[str, int]:
        """File and row of a place in ``repeats``."""
        return self.files[self.repeats.source[at]].file, self.repeats.row[at]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How rows are looked at. Without ``tokenizer`` and ``rendering`` lengths are in characters."""

    tokenizer: Tokenizer | None = None
    rendering: Rendering | None = None
    kind: DataKind | None = None
    format: str | None = None
    columns: Sequence[str] | None = None
    show: int = 0
    progress: Callable[[str, int, int], None] | None = None


def audit(names: Sequence[str | PathLike[str]], how: How) -> Audit:
    """Look at all rows that ``names`` stand for (see :func:`find_sources`).

    A file that cannot be read, or whose layout is unknown, is an error of the audit. Raises :class:`DataError` for
    names that stand for nothing, and :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`.
    """
    found = Audit(Lengths("characters" if how.tokenizer is None else "tokens"))
    examples = _Sample(how.show)
    for number, source in enumerate(find_sources(names)):
        found.notes += source.notes
        found.files.append(Tally(source.name))
        try:
            _audit_source(source, number, found, how, examples)
        except DataError as error:
            found.ledger.note("error", "unreadable file", source.name, None, error.what)
    found.examples = examples.rows
    purposes = sum((t.stated for t in found.files), Counter[str]())
    if how.kind is None and all(len(t.stated) < len(purposes) for t in found.files):
        _note_purposes(found.ledger, "", purposes)
    _note_repeats(found)
    bias = found.lengths.bias()
    if bias is not None and bias.large:
        what = f"the preferred responses are {bias.ratio:.2f} times as long, and longer in {bias.share:.1%} of cases"
        what += "; a model may learn the length instead of the preference"
        found.ledger.note("warning", "length bias", "", None, what)
    return found


def compare_prompts(train: Audit, held_out: Audit) -> None:
    """Note which rows to evaluate on have a prompt that is trained on, too."""
    said = "its prompt is one that is trained on"
    _note(held_out, held_out.repeats.prompts_of(train.repeats), "prompt in training data", said, train.place)


def _audit_source(source: Source, number: int, found: Audit, how: How, examples: _Sample) -> None:
    reading = open_comparisons(source, format=how.format, columns=how.columns)
    tally, ledger = found.files[number], found.ledger
    tally.layout = reading.layout
    if reading.lost:
        severity: Severity = "error" if how.kind in PREFERENCES else "warning"
        ledger.note(severity, "responses that are not read", tally.file, None, reading.lost)
    checker = _Checker(how, found)
    for rows in chunks(reading):
        tally.rows += len(rows)
        refused, left_out = checker(rows, tally.file)
        tally.refused += len(refused)
        tally.left_out += len(left_out)
        for row in rows:
            if isinstance(row, Problem):
                continue
            tally.add(row)
            found.repeats.add(row, number)
            for kind, place in row_suspicions(row).items():
                ledger.note("warning", kind, tally.file, row.row, KINDS[kind], example=place)
            if against := _against_scores(row):
                ledger.note("warning", "scores against the order", tally.file, row.row, against)
            if row.row not in refused and row.row not in left_out:
                examples.see(row)
        if how.progress is not None:
            how.progress(tally.file, tally.rows, reading.count)
    tally.usable = tally.rows - tally.refused - tally.left_out
    found.notes += [note for note in (*reading.notes, *checker.notes) if note not in found.notes]
    if how.kind is None:
        _note_purposes(ledger, tally.file, tally.stated)


class _Checker:
    """Looks at the rows of one file as a run would: those that it refuses are noted, the others measured."""

    def __init__(self, how: How, found: Audit) -> None:
        self.how, self.found = how, found
        self.preparers: dict[DataKind, Preparer] = {}
        self.notes: list[str] = []

    def __call__(self, rows: Sequence[Row], file: str) -> tuple[set[int], set[int]]:
        """The rows that are refused, and those that are left out without being at fault."""
        problems = [row for row in rows if isinstance(row, Problem)]
        wanted: dict[DataKind, list[Comparison]] = {}
        for row in rows:
            if isinstance(row, Comparison):
                wanted.setdefault(self.how.kind or stated(row), []).append(row)
        warnings: list[Problem] = []
        for kind, several in wanted.items():
            bad, doubtful = self._tokens(several, kind, file) if self.how.tokenizer else self._words(several, kind)
            problems += bad
            warnings += doubtful
        left_out = [p for p in problems if p.kind in NO_FAULT]
        faults = [p for p in problems if p.kind not in NO_FAULT]
        noted: tuple[tuple[Severity, list[Problem]], ...] = (("error", faults), ("warning", left_out + warnings))
        for severity, many in noted:
            for p in sorted(many, key=lambda p: p.row):
                self.found.ledger.note(severity, p.kind, file, p.row, p.what)
        refused = {p.row for p in faults}
        return refused, {p.row for p in left_out} - refused

    def _words(self, rows: Sequence[Comparison], kind: DataKind) -> tuple[list[Problem], list[Problem]]:
        problems = []
        for row in rows:
            bad = check(row, kind)
            problems += bad
            if bad:
                continue
            c = convert(row, kind)
            assert isinstance(c, Comparison), "what was checked can be converted"
            prompt = sum(len(m.content) for m in c.prompt)
            self.found.lengths.add(prompt, [len(r.text) for r in c.responses], c.pairs, c.labels)
        return problems, []

    def _tokens(self, rows: Sequence[Comparison], kind: DataKind, file: str) -> tuple[list[Problem], list[Problem]]:
        assert self.how.tokenizer is not None and self.how.rendering is not None
        if kind not in self.preparers:
            self.preparers[kind] = Preparer(self.how.tokenizer, self.how.rendering, kind)
        chunk = self.preparers[kind](rows)
        add_columns(self.found.lengths, chunk.columns)
        self.notes += [said for said, where in chunk.warnings.items() if not where]
        found = [(said, said, where) for said, where in chunk.warnings.items() if where]
        limit = self.how.rendering.max_length
        found.append((TRUNCATED, f"is longer than {limit} tokens", _truncated(chunk)))
        broken = {c.row for c in rows if any(r.cut for r in c.responses)}
        endless = [row for row in self._endless(chunk.columns) if row not in broken]
        found.append((NO_END, "a response does not end with an end-of-turn token", endless))
        found.append(
            (BROKEN_OFF, "a response was broken off at a limit; it is trained to its last word", sorted(broken))
        )
        return chunk.problems, [Problem(kind, row, what, file) for kind, what, where in found for row in where]

    def _endless(self, c: Mapping[str, Array]) -> list[int]:
        """Rows of which a response that was not cut ends with another token than one that ends a turn."""
        tokenizer = self.how.tokenizer
        assert tokenizer is not None
        if not len(c["length_N"]):
            return []
        ends = np.array(tokenizer.convert_tokens_to_ids(list(end_marks(tokenizer))), np.int64)
        many = c["responses_G"]
        last = np.repeat(np.cumsum(c["prefix_G"], dtype=np.int64), many) + np.cumsum(c["length_N"], dtype=np.int64) - 1
        endless = (c["cut_N"] == 0) & ~np.isin(c["ids_T"][last], ends)
        return list(map(int, np.repeat(c["row_G"], many)[endless]))


def _note_purposes(ledger: Ledger, file: str, stated: Counter[str]) -> None:
    if len(stated) > 1:
        what = ", ".join(f"{n:,} {kind}" for kind, n in stated.most_common())
        ledger.note("warning", "rows of several purposes", file, None, f"{what}; name what a run needs by --want")


def _against_scores(c: Comparison) -> str:
    """What is said of an order that puts a response before one with a higher score, or nothing."""
    scores = c.scores or ()
    for tier, below in pairwise(c.tiers if scores else ()):
        worst, best = min(tier, key=scores.__getitem__), max(below, key=scores.__getitem__)
        if scores[worst] < scores[best]:
            better, worse = f"response {worst} with score {scores[worst]:g}", f"{best} with score {scores[best]:g}"
            return f"the order puts {better} before {worse} (counted from 0); is it worst first?"
    return ""


def _truncated(chunk: Chunk) -> list[int]:
    c = chunk.columns
    rows = c["row_G"][c["prompt_cut_G"] > 0].tolist()
    return sorted({*rows, *np.repeat(c["row_G"], c["responses_G"])[c["cut_N"] > 0].tolist()})


def _note_repeats(found: Audit) -> None:
    _note(found, found.repeats.duplicates(), "duplicate", "the same prompt, responses and preference", found.place)
    _note(found, found.repeats.contradictions(), CONTRADICTION, "the opposite is said elsewhere", found.place)


def _note(found: Audit, rows: Found, kind: str, what: str, place: Callable[[int], tuple[str, int]]) -> None:
    for at, other in rows:
        file, row = found.place(at)
        found.ledger.note("warning", kind, file, row, what, other=place(other))


class _Sample:
    """Some rows, drawn evenly from all, the same ones every time: those whose hashes are the least."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heap: list[tuple[int, int, Comparison]] = []
        self._seen = 0

    def see(self, c: Comparison) -> None:
        """A row that may be drawn."""
        if not self.size:
            return
        self._seen += 1
        # A multiplicative hash (Knuth, volume 3, 6.4) of the place, so that no text is hashed again.
        item = (-(self._seen * 0x9E3779B97F4A7C15 % 2**64), -self._seen, c)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, item)
        elif item[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, item)

    @property
    def rows(self) -> list[Comparison]:
        """In the order of the files."""
        return [c for *_, c in sorted(self._heap, key=lambda item: -item[1])]
