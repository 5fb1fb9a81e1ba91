"""What is wrong with rows, counted by kind and said with row numbers."""

from __future__ import annotations

from collections.abc import Sequence
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
    """One line: each kind with its count and its first rows.

    >>> describe([Problem("empty response", 3, "it is empty"), Problem("empty response", 9, "it is empty")])
    'empty response: 2 (rows 3, 9)'
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    files = {p.file for p in problems}
    parts = []
    for kind, found in kinds.items():
        rows = [f"{p.file}:{p.row}" if len(files) > 1 else str(p.row) for p in found]
        more = ", ..." if len(rows) > NAMED_ROWS else ""
        only = f"; {found[0].what}" if len(found) == 1 and found[0].what else ""
        parts.append(
            f"{kind}: {len(rows)} (row{'s' if len(rows) > 1 else ''} {', '.join(rows[:NAMED_ROWS])}{more}{only})"
        )
    return "; ".join(parts)


def refuse(problems: Sequence[Problem], read: int) -> DataError:
    """The error for rows that cannot be used, naming rows and count."""
    files = {p.file for p in problems}
    count = refused_rows(problems)
    remedy = "put them right, or leave them out with --on-bad-row skip"
    what = f"{count} of {read} rows cannot be used: {describe(problems)}; {remedy}"
    row = problems[0].row if count == 1 else None
    return DataError(what, file=files.pop() if len(files) == 1 else None, row=row)
