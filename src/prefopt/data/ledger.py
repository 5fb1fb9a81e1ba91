"""What is wrong with rows, by kind: an error where a run refuses the row, a warning where a person should look.

>>> ledger = Ledger()
>>> ledger.note("error", "empty response", "rows.jsonl", 3, "the chosen response is empty")
>>> ledger.note("error", "empty response", "rows.jsonl", 9, "the rejected response is empty")
>>> [(e.kind, list(e.rows), e.what) for e in ledger.entries("error")]
[('empty response', [3, 9], 'the chosen response is empty')]
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

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
