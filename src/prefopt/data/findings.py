"""What a person should be told about many rows at once, in a form that worker processes can hand back and add up.

>>> mine, other = {"no BOS": [], "cut": [3]}, {"cut": [9]}
>>> lines(merge([mine, other]))
['no BOS', 'cut: 2 rows (3, 9)']
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prefopt.data.validate import NAMED_ROWS

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
