"""`prefopt data check`: reads files as a run would, measures their rows and collects what is wrong with which row.

A row is an error here exactly where a run refuses it, since both call the same functions:
:func:`prefopt.data.validate.validate`, and with a tokenizer :class:`prefopt.data.workers.Preparer`. Rows are streamed;
what is kept of a good one are numbers and hashes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from prefopt.core.terminal import Reporter
from prefopt.data.audit.pictures import PictureCounts
from prefopt.data.audit.statistics import SUSPICIONS, Duplicates, Found, Lengths, row_suspicions
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.sources import Source, find_sources
from prefopt.data.load import NO_FAULT, PREFERENCES
from prefopt.data.table import Array
from prefopt.data.tokenizer import end_marks
from prefopt.data.validate import DataKind, Problem, validate
from prefopt.data.workers import ParsedRow, Preparer, chunks
from prefopt.errors import DataError
from prefopt.records import Comparison

if TYPE_CHECKING:
    from prefopt.data.chat.template import Rendering
    from prefopt.data.tokenizer import Tokenizer

Severity = Literal["error", "warning"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning")
Place = tuple[str, int]
"""File and row."""
Rows: TypeAlias = "array[int]"
CONTRADICTION = "contradiction"
BAR_ROWS = 5000  # smaller files need no progress bar


@dataclass(slots=True)
class Issue:
    """One kind of issue in one file: an error where a run refuses its ``rows``, a warning where the user should look.

    ``what`` describes it, for the first row where that ``varies``; ``example`` shows it there. Without rows it concerns
    the whole file, without a file all of them. ``others`` are the rows that each row repeats, contradicts or shares its
    prompt with.
    """

    severity: Severity
    kind: str
    file: str
    what: str
    example: str = ""
    varies: bool = False
    rows: Rows = field(default_factory=lambda: array("q"))
    others: list[Place] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        found: dict[str, object] = {"severity": self.severity, "kind": self.kind, "file": self.file}
        found |= {"what": self.what, "example": self.example, "count": len(self.rows), "rows": list(self.rows)}
        others = [{"file": file, "row": row} for file, row in self.others]
        return found | ({"others": others} if others else {})


def purpose(c: Comparison) -> DataKind:
    """The data that a run could take from a row without inventing any."""
    if not c.responses:
        return "prompts"
    if c.labels is not None and not c.votes and len(c.tiers) < 2:
        return "labels"
    if len(c.responses) > 1 and (c.tiers or c.votes is not None or c.scores is not None):
        return "pairs"
    return "demonstrations"


COUNTS = (
    *("pairs", "ties", "scored", "desirable", "undesirable"),
    *("multi_turn", "multi_turn_responses", "system", "tools", "reasoning", "text"),
)


@dataclass(slots=True)
class FileCounts:
    """Counts of one file. ``rows`` = ``usable`` + ``refused`` + ``left_out`` (all responses tied: not an error).

    ``responses``: rows by their number of responses; ``stated``: rows by :func:`purpose`. ``counts`` [:data:`COUNTS`]:
    pairs, rows with a tie, scores, labels of either kind, and rows with further things.
    """

    file: str
    layout: str = ""
    rows: int = 0
    usable: int = 0
    refused: int = 0
    left_out: int = 0
    responses: Counter[int] = field(default_factory=Counter)
    stated: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))

    def add(self, c: Comparison) -> None:
        self.responses[len(c.responses)] += 1
        self.stated[purpose(c)] += 1
        labels, answers = c.labels or (), [m for r in c.responses for m in r.messages]
        self.counts.update(
            pairs=len(c.pairs),
            ties=any(len(tier) > 1 for tier in c.tiers),
            scored=c.scores is not None,
            desirable=sum(labels),
            undesirable=len(labels) - sum(labels),
            multi_turn=any(m.role == "assistant" for m in c.prompt),
            multi_turn_responses=any(len(r.messages) > 1 for r in c.responses),
            system=any(m.role == "system" for m in c.prompt),
            tools=bool(c.tools) or any(m.tool_calls or m.role == "tool" for m in (*c.prompt, *answers)),
            reasoning=any(m.reasoning or "<think>" in m.content for m in answers),
            text=c.text,
        )

    def to_dict(self) -> dict[str, object]:
        names = ("file", "layout", "rows", "usable", "refused", "left_out")
        responses = {str(k): n for k, n in sorted(self.responses.items())}
        found = {name: getattr(self, name) for name in names}
        return {**found, "responses": responses, "stated": dict(self.stated), **self.counts}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """Options of an audit. Without ``tokenizer`` and ``rendering`` lengths are in characters."""

    tokenizer: Tokenizer | None = None
    rendering: Rendering | None = None
    want: DataKind | None = None
    format: str | None = None
    columns: Sequence[str] | None = None
    show: int = 0
    reporter: Reporter = field(default_factory=lambda: Reporter("none"))


class Audit:
    """What was found in files of one purpose. ``examples`` are some of the usable rows, in their order."""

    def __init__(self, options: AuditOptions) -> None:
        self.lengths = Lengths("characters" if options.tokenizer is None else "tokens")
        self.duplicates = Duplicates()
        self.pictures = PictureCounts()
        self.files: list[FileCounts] = []
        self.notes: list[str] = []
        self._issues: dict[tuple[str, str, str], Issue] = {}
        self._examples: list[tuple[int, int, Comparison]] = []
        self._options, self._seen = options, 0

    @property
    def prompts(self) -> int:
        return len(np.unique(self.duplicates.prompts))

    @property
    def examples(self) -> list[Comparison]:
        """Up to ``show`` usable rows."""
        return [c for _, _, c in sorted(self._examples, key=lambda x: x[1])]

    def add_example(self, c: Comparison) -> None:
        """A row that may be an example: drawn evenly from all, and the same ones every time."""
        self._seen += 1
        # A multiplicative hash (Knuth, volume 3, 6.4) of the place; the least ones stay.
        self._examples.append((self._seen * 0x9E3779B97F4A7C15 % 2**64, self._seen, c))
        self._examples = sorted(self._examples, key=lambda x: x[:2])[: self._options.show]

    def place(self, at: int) -> Place:
        return self.files[self.duplicates.source[at]].file, self.duplicates.row[at]

    def note(
        self,
        severity: Severity,
        kind: str,
        file: str,
        row: int | None,
        what: str,
        *,
        example: str = "",
        other: Place | None = None,
    ) -> None:
        """Add an issue of one row, in the order of the rows; a row that has it twice is counted once."""
        issue = self._issues.setdefault((severity, kind, file), Issue(severity, kind, file, what, example))
        issue.varies = issue.varies or issue.what != what
        if row is not None and issue.rows[-1:] != array("q", [row]):
            issue.rows.append(row)
            if other is not None:
                issue.others.append(other)

    def note_repeats(self, found: Found, kind: str, what: str, place: Callable[[int], Place] | None = None) -> None:
        for at, other in found:
            self.note("warning", kind, *self.place(at), what, other=(place or self.place)(other))

    def note_purposes(self, file: str, stated: Counter[str]) -> None:
        """Add a warning where rows have several purposes."""
        if self._options.want is None and len(stated) > 1:
            what = ", ".join(f"{n:,} {kind}" for kind, n in stated.most_common())
            self.note("warning", "rows of several purposes", file, None, f"{what}; name what a run needs by --want")

    def issues(self, severity: Severity) -> list[Issue]:
        """Issues of one severity by file, those of most rows first."""
        files = {file: i for i, file in enumerate(dict.fromkeys(issue.file for issue in self._issues.values()))}
        found = [issue for issue in self._issues.values() if issue.severity == severity]
        return sorted(found, key=lambda issue: (files[issue.file], -len(issue.rows)))

    def rows_with(self, severity: Severity) -> int:
        return len({(issue.file, row) for issue in self.issues(severity) for row in issue.rows})


def audit(names: Sequence[str | PathLike[str]], options: AuditOptions) -> Audit:
    """Audit all rows of the files, folders or data sets ``names`` (see :func:`find_sources`).

    A file that cannot be read, or whose layout is unknown, is an error of the audit. Raises :class:`DataError` for
    names without any file, and :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`.
    """
    found = Audit(options)
    for number, source in enumerate(find_sources(names)):
        found.notes += source.notes
        found.files.append(FileCounts(source.name))
        try:
            _audit_source(source, number, found, options)
        except DataError as error:
            found.note("error", "unreadable file", source.name, None, error.what)
    purposes = sum((f.stated for f in found.files), Counter[str]())
    if all(len(f.stated) < len(purposes) for f in found.files):
        found.note_purposes("", purposes)
    found.note_repeats(found.duplicates.duplicates(), "duplicate", "the same prompt, responses and preference")
    found.note_repeats(found.duplicates.contradictions(), CONTRADICTION, "another row states the opposite")
    bias = found.lengths.bias()
    if bias is not None and bias.large:
        what = f"{bias.describe(found.lengths.unit)}; a model may learn the length instead of the preference"
        found.note("warning", "length bias", "", None, what)
    return found


def compare_prompts(train: Audit, held_out: Audit) -> None:
    """Add a warning for rows of the evaluation data whose prompt is in the training data, too."""
    shared = held_out.duplicates.prompts_of(train.duplicates)
    held_out.note_repeats(shared, "prompt in training data", "its prompt is trained on", train.place)


def _audit_source(source: Source, number: int, found: Audit, options: AuditOptions) -> None:
    reading = open_comparisons(source, format=options.format, columns=options.columns)
    counts = found.files[number]
    counts.layout = reading.layout
    if reading.lost:
        severity: Severity = "error" if options.want in PREFERENCES else "warning"
        found.note(severity, "responses that are not read", counts.file, None, reading.lost)
    checker = _Checker(options, found)
    reporter = options.reporter if reading.count >= BAR_ROWS else Reporter("none")
    with reporter.bar(counts.file, reading.count, "rows") as bar:
        for rows in chunks(reading):
            counts.rows += len(rows)
            refused, left_out = checker(rows, counts.file)
            counts.refused += len(refused)
            counts.left_out += len(left_out)
            for row in rows:
                if isinstance(row, Problem):
                    continue
                counts.add(row)
                found.duplicates.add(row, number)
                found.pictures.add(row.pictures)
                for kind, place in row_suspicions(row).items():
                    found.note("warning", kind, counts.file, row.row, SUSPICIONS[kind][0], example=place)
                if what := _against_scores(row):
                    found.note("warning", "scores against the order", counts.file, row.row, what)
                if options.show and row.row not in refused and row.row not in left_out:
                    found.add_example(row)
            bar.update(counts.rows)
    counts.usable = counts.rows - counts.refused - counts.left_out
    found.notes += [note for note in (*reading.notes, *checker.notes) if note not in found.notes]
    found.note_purposes(counts.file, counts.stated)


class _Checker:
    """Checks the rows of one file as a run would: those that it refuses are noted, the others measured."""

    def __init__(self, options: AuditOptions, found: Audit) -> None:
        self.options, self.found = options, found
        self.preparers: dict[DataKind, Preparer] = {}
        self.notes: list[str] = []

    def __call__(self, rows: Sequence[ParsedRow], file: str) -> tuple[set[int], set[int]]:
        """The rows that are refused, and those that are left out without an error."""
        problems = [row for row in rows if isinstance(row, Problem)]
        by_purpose: dict[DataKind, list[Comparison]] = {}
        for row in rows:
            if isinstance(row, Comparison):
                by_purpose.setdefault(self.options.want or purpose(row), []).append(row)
        warnings: list[Problem] = []
        for want, several in by_purpose.items():
            if self.options.tokenizer is None:
                problems += self._measure_words(several, want)
            else:
                problems += self._measure_tokens(several, want, file, warnings)
        problems.sort(key=lambda p: p.row)
        for p in problems:
            self.found.note("warning" if p.kind in NO_FAULT else "error", p.kind, file, p.row, p.what)
        for p in sorted(warnings, key=lambda p: p.row):
            self.found.note("warning", p.kind, file, p.row, p.what)
        refused = {p.row for p in problems if p.kind not in NO_FAULT}
        return refused, {p.row for p in problems} - refused

    def _measure_words(self, rows: Sequence[Comparison], want: DataKind) -> list[Problem]:
        problems = []
        for row in rows:
            c = validate(row, want)
            if isinstance(c, list):
                problems += c
                continue
            prompt = sum(len(m.content) for m in c.prompt)
            self.found.lengths.add(prompt, [len(r.text) for r in c.responses], c.pairs, c.labels)
        return problems

    def _measure_tokens(
        self, rows: Sequence[Comparison], want: DataKind, file: str, warnings: list[Problem]
    ) -> list[Problem]:
        tokenizer, rendering = self.options.tokenizer, self.options.rendering
        assert tokenizer is not None and rendering is not None
        if want not in self.preparers:
            self.preparers[want] = Preparer(tokenizer, rendering, want)
        chunk = self.preparers[want](rows)
        c = chunk.columns
        self.found.lengths.add_columns(c)
        self.found.pictures.add_columns(c)
        truncated = {*c["row_G"][c["prompt_cut_G"] > 0].tolist()}
        truncated |= {*np.repeat(c["row_G"], c["responses_G"])[c["cut_N"] > 0].tolist()}
        self.notes += [finding for finding, where in chunk.warnings.items() if not where]
        cut_off = {row.row for row in rows if any(r.cut for r in row.responses)}
        endless = [row for row in _without_end(c, tokenizer) if row not in cut_off]
        found = [
            *((finding, finding, where) for finding, where in chunk.warnings.items() if where),
            ("truncated", f"is longer than {rendering.max_length} tokens", sorted(truncated)),
            ("no end of turn", "a response does not end with an end-of-turn token", endless),
            ("broken off", "a response was cut off at a length limit; it is trained to its last word", sorted(cut_off)),
        ]
        warnings += [Problem(kind, row, what, file) for kind, what, where in found for row in where]
        return chunk.problems


def _without_end(c: Mapping[str, Array], tokenizer: Tokenizer) -> list[int]:
    """Rows with a response that was not truncated and does not end with an end-of-turn token."""
    if not len(c["length_N"]):
        return []
    ends = np.array(tokenizer.convert_tokens_to_ids(list(end_marks(tokenizer))), np.int64)
    many = c["responses_G"]
    last = np.repeat(np.cumsum(c["prefix_G"], dtype=np.int64), many) + np.cumsum(c["length_N"], dtype=np.int64) - 1
    endless = (c["cut_N"] == 0) & ~np.isin(c["ids_T"][last], ends)
    return list(map(int, np.repeat(c["row_G"], many)[endless]))


def _against_scores(c: Comparison) -> str:
    """A description of an order that puts a response before one with a higher score; empty where it does not."""
    scores = c.scores or ()
    for tier, below in pairwise(c.tiers if scores else ()):
        worst, best = min(tier, key=scores.__getitem__), max(below, key=scores.__getitem__)
        if scores[worst] < scores[best]:
            better, worse = f"response {worst} with score {scores[worst]:g}", f"{best} with score {scores[best]:g}"
            return f"the order puts {better} before {worse} (counted from 0); is it worst first?"
    return ""
