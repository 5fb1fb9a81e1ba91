"""What is wrong with rows, by kind: an error where a run refuses the row, a warning where a person should look.

>>> ledger = Ledger()
>>> ledger.note("error", "empty response", "rows.jsonl", 3, "the chosen response is empty")
>>> ledger.note("error", "empty response", "rows.jsonl", 9, "the rejected response is empty")
>>> [(e.kind, list(e.rows), e.what) for e in ledger.entries("error")]
[('empty response', [3, 9], 'the chosen response is empty')]
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from prefopt.data.validate import DataKind
from prefopt.records import Comparison

Severity = Literal["error", "warning"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning")
Rows: TypeAlias = "array[int]"
Place = tuple[str, int]


def _rows() -> Rows:
    return array("q")


@dataclass(slots=True)
class Entry:
    """One kind of problem in one file: its ``rows``, and ``what`` it is in words.

    Where that differs from row to row (``varies``), it is said of the first; ``example`` is how it looks there.

    No rows: it is about the file as a whole; no file: about all of them. ``others`` are the rows that each row
    repeats, contradicts or shares its prompt with, file and row.
    """

    severity: Severity
    kind: str
    file: str
    what: str
    example: str = ""
    varies: bool = False
    rows: Rows = field(default_factory=_rows)
    others: list[Place] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """As plain values, with all rows."""
        found: dict[str, object] = {"severity": self.severity, "kind": self.kind, "file": self.file}
        found |= {"what": self.what, "example": self.example, "count": len(self.rows), "rows": list(self.rows)}
        if self.others:
            found["others"] = [{"file": file, "row": row} for file, row in self.others]
        return found


class Ledger:
    """Entries, in the order in which they came up."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], Entry] = {}

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
        """One row has a problem; a row that has the same one twice is counted once. Rows come in order."""
        entry = self._entries.get((severity, kind, file))
        if entry is None:
            entry = self._entries[severity, kind, file] = Entry(severity, kind, file, what, example)
        entry.varies = entry.varies or entry.what != what
        if row is not None and entry.rows[-1:] != array("q", [row]):
            entry.rows.append(row)
            if other is not None:
                entry.others.append(other)

    def entries(self, severity: Severity) -> list[Entry]:
        """All of one severity, those of most rows first within a file."""
        found = [e for e in self._entries.values() if e.severity == severity]
        place: dict[str, int] = {}
        for entry in self._entries.values():
            place.setdefault(entry.file, len(place))
        return sorted(found, key=lambda e: (place[e.file], -len(e.rows)))

    def concerned(self, severity: Severity) -> int:
        """How many rows have one or more entries."""
        files: dict[str, set[int]] = {}
        for entry in self.entries(severity):
            files.setdefault(entry.file, set()).update(entry.rows)
        return sum(map(len, files.values()))


def stated(c: Comparison) -> DataKind:
    """What a row says by itself: what a run could take from it without inventing anything."""
    if not c.responses:
        return "prompts"
    if c.labels is not None and not c.votes and len(c.tiers) < 2:
        return "labels"
    if len(c.responses) > 1 and (c.tiers or c.votes is not None or c.scores is not None):
        return "pairs"
    return "demonstrations"


@dataclass(slots=True)
class Tally:
    """Counts of one file. ``rows`` = ``usable`` + ``refused`` + ``left_out`` (all responses tied: no fault).

    ``responses``: rows by their number of responses; ``stated``: rows by what they say. ``pairs`` and ``ties`` (rows
    with a tie among their responses) count what is said; ``desirable`` and ``undesirable`` are labels.
    """

    file: str
    layout: str = ""
    rows: int = 0
    usable: int = 0
    refused: int = 0
    left_out: int = 0
    responses: Counter[int] = field(default_factory=Counter)
    stated: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    ties: int = 0
    scored: int = 0
    desirable: int = 0
    undesirable: int = 0
    multi_turn: int = 0
    multi_turn_responses: int = 0
    system: int = 0
    tools: int = 0
    reasoning: int = 0
    text: int = 0

    def add(self, c: Comparison) -> None:
        """One row that could be read."""
        self.responses[len(c.responses)] += 1
        self.stated[stated(c)] += 1
        self.pairs += len(c.pairs)
        self.ties += any(len(tier) > 1 for tier in c.tiers)
        self.scored += c.scores is not None
        self.desirable += sum(c.labels or ())
        self.undesirable += len(c.labels or ()) - sum(c.labels or ())
        answers = [m for r in c.responses for m in r.messages]
        self.multi_turn += any(m.role == "assistant" for m in c.prompt)
        self.multi_turn_responses += any(len(r.messages) > 1 for r in c.responses)
        self.system += any(m.role == "system" for m in c.prompt)
        self.tools += bool(c.tools) or any(m.tool_calls or m.role == "tool" for m in (*c.prompt, *answers))
        self.reasoning += any(m.reasoning or "<think>" in m.content for m in answers)
        self.text += c.text

    def to_dict(self) -> dict[str, object]:
        """As plain values."""
        found: dict[str, object] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["responses"] = {str(k): n for k, n in sorted(self.responses.items())}
        return found | {"stated": dict(self.stated)}
