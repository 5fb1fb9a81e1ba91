"""What is wrong with rows that could be read: every problem is named, none is passed over.

>>> from prefopt.records import Message
>>> row = Comparison.pair([Message("user", "2 + 2?")], chosen="4", rejected="4", row=7)
>>> kept, problems = validate([row])
>>> len(kept), problems[0].row, problems[0].kind
(0, 7, 'identical responses')
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefopt.errors import DataError
from prefopt.records import Comparison

NAMED_ROWS = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why one row cannot be used; ``kind`` is what rows are counted by, ``what`` says it for this row."""

    kind: str
    row: int
    what: str
    file: str = ""


def validate(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Problem]]:
    """Part rows into those that can be used and the problems of those that cannot (a row may have several)."""
    kept, problems = [], []
    for comparison in comparisons:
        found = [Problem(kind, comparison.row, what, comparison.file) for kind, what in _check(comparison)]
        problems += found
        if not found:
            kept.append(comparison)
    return kept, problems


def _check(c: Comparison) -> Iterator[tuple[str, str]]:
    messages = [*c.prompt, *(m for r in c.responses for m in r.messages)]
    if any(_lone_surrogate(m.content) for m in messages):
        yield "broken text", "holds half of a surrogate pair, which is no character"
    if not c.text:
        yield from _check_turns(c)
    for k, response in enumerate(c.responses):
        if not response.messages or response.messages[-1].role != "assistant":
            yield "response without an answer", f"the {_name(c, k)} response does not end with the assistant's turn"
        elif any(not m.content.strip() for m in response.messages if m.role == "assistant"):
            yield "empty response", f"the {_name(c, k)} response is empty"
    if not c.pairs:
        yield "no preference", "no response is preferred to another"
    elif any(c.responses[w] == c.responses[loser] for w, loser in c.pairs):
        yield "identical responses", "the preferred response and the other are the same"


def _check_turns(c: Comparison) -> Iterator[tuple[str, str]]:
    if not any(m.content.strip() for m in c.prompt if m.role != "system"):
        yield "empty prompt", "the prompt is empty"
    elif c.prompt[-1].role == "assistant":
        yield "prompt ends with an answer", "the prompt ends with the assistant's turn, so no answer is asked for"


def _name(c: Comparison, k: int) -> str:
    return ("chosen", "rejected")[k] if c.tiers == ((0,), (1,)) else f"{k + 1}."


def _lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


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
