"""What is wrong with rows, counted by kind and said with row numbers.

>>> mine, other = {"no BOS": [], "cut": [3]}, {"cut": [9]}
>>> lines(merge([mine, other]))
['no BOS', 'cut: 2 rows (3, 9)']
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefopt.errors import DataError

NAMED_ROWS = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why one row cannot be used; ``kind`` is what rows are counted by, ``what`` says it for this row."""

    kind: str
    row: int
    what: str
    file: str = ""


def refused_rows(problems: Sequence[Problem]) -> int:
    """How many rows the problems concern: a row with two problems is one row."""
    return len({(p.file, p.row) for p in problems})


def describe(problems: Sequence[Problem]) -> str:
    """One line: each kind with its count, its first rows, and what is wrong: of the first, where that differs.

    >>> describe([Problem("empty response", 3, "it is empty"), Problem("empty response", 9, "it is empty")])
    'empty response: 2 (rows 3, 9; it is empty)'
    >>> describe([Problem("missing field", 3, "lacks chosen"), Problem("missing field", 9, "lacks prompt")])
    'missing field: 2 (rows 3, 9; row 3: lacks chosen)'
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    several = len({p.file for p in problems}) > 1
    return "; ".join(f"{kind}: {len(found)} ({_places(found, several)})" for kind, found in kinds.items())


def _places(found: Sequence[Problem], several: bool) -> str:
    """The first rows of one kind, and what is wrong with them; ``several``: the problems are those of several files."""
    rows = [f"{p.file}:{p.row}" if several else str(p.row) for p in found]
    more = ", ..." if len(rows) > NAMED_ROWS else ""
    places = f"row{'s' * (len(rows) > 1)} {', '.join(rows[:NAMED_ROWS])}{more}"
    what = found[0].what
    if any(p.what != what for p in found):
        what = f"{'' if several else 'row '}{rows[0]}: {what}"
    return f"{places}; {what}" if what else places


def refuse(problems: Sequence[Problem], read: int) -> DataError:
    """The error for rows that cannot be used, naming rows and count."""
    files = {p.file for p in problems}
    count = refused_rows(problems)
    remedy = "; put them right, or leave them out with --on-bad-row skip" if count < read else ""
    what = f"{count} of {read} rows cannot be used: {describe(problems)}{remedy}"
    row = problems[0].row if count == 1 else None
    return DataError(what, file=files.pop() if len(files) == 1 else None, row=row)


Findings = dict[str, list[int]]


def merge(findings: Iterable[Mapping[str, Sequence[int]]]) -> Findings:
    """One from many: what is said once stays so, rows add up, in order."""
    merged: Findings = {}
    for found in findings:
        for what, rows in found.items():
            merged.setdefault(what, []).extend(rows)
    return {what: sorted(rows) for what, rows in merged.items()}


def lines(findings: Mapping[str, Sequence[int]]) -> list[str]:
    """Each finding with the number of rows it concerns and the first of them; without rows, the finding alone."""
    said = []
    for what, rows in findings.items():
        first = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
        said.append(f"{what}: {len(rows)} row{'s' if len(rows) > 1 else ''} ({first})" if rows else what)
    return said
