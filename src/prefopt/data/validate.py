"""Convert a parsed row to the data a method needs, and report every row that cannot be used.

>>> from prefopt.records import Message
>>> row = Comparison.scored([Message("user", "2 + 2?")], ["22", "4"], scores=[0, 9], row=1)
>>> convert(row, "demonstrations").responses[0].text, convert(row, "labels").labels
('4', (False, True))
>>> row = Comparison.pair([Message("user", "2 + 2?")], chosen="4", rejected="4", row=7)
>>> [(problem.row, problem.kind) for problem in check(row, "pairs")]
[(7, 'identical responses')]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prefopt.errors import DataError
from prefopt.records import Comparison, Message, Tiers, tiers_of, tiers_of_signs

DataKind = Literal["pairs", "scored", "ranking", "labels", "demonstrations", "prompts"]
NAMED_ROWS = 10  # rows with one problem that a message names


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a row cannot be used: rows are counted by ``kind``, ``what`` describes it for this row. Where it
    may be in files of pictures, ``pictures`` are their paths."""

    kind: str
    row: int
    what: str
    file: str = ""
    pictures: tuple[str, ...] = ()


class _Impossible(Exception):
    def __init__(self, kind: str, what: str) -> None:
        self.kind, self.what = kind, what


def convert(c: Comparison, kind: DataKind) -> Comparison | Problem:
    """Convert a row to demonstrations, labels, pairs or rankings.

    - ``pairs``: votes, or at least two tiers (from an order, scores, or the labels of several responses)
    - ``scored``: pairs with a score for every response
    - ``ranking``: at least two tiers; votes are converted where they agree with an order
    - ``labels``: labels; of two tiers, the better one is desirable and the other is not
    - ``demonstrations``: the best response (the first of equally good ones); all responses where there is no preference
    - ``prompts``: no responses

    Returns a :class:`Problem` where that is not possible, ``only ties`` where all responses are equally good.
    """
    try:
        return _CONVERTERS[kind](c)
    except _Impossible as why:
        return Problem(why.kind, c.row, why.what, c.file)


def tiers_from_votes(c: Comparison) -> Tiers:
    """The order that the weights of the votes agree with; empty where there is none, as in :func:`tiers_of_signs`."""
    margin = _margins(c)
    pairs = ((min(vote[:2]), max(vote[:2])) for vote in c.votes or ())
    return tiers_of_signs({(i, j): (margin[i][j] > 0) - (margin[i][j] < 0) for i, j in pairs}, len(c.responses))


def _margins(c: Comparison) -> list[list[float]]:
    """[K][K] weight of the votes for the first response over the second, minus that of the opposite votes."""
    margin = [[0.0] * len(c.responses) for _ in c.responses]
    for best, worse, weight in c.votes or ():
        margin[best][worse] += weight
        margin[worse][best] -= weight
    return margin


def _by_label(labels: Sequence[bool]) -> Tiers:
    """Desirable responses, then undesirable ones."""
    return tuple(tuple(k for k, label in enumerate(labels) if label is good) for good in (True, False))


def _tiers(c: Comparison) -> Tiers:
    """At least two tiers, from an order, scores or labels."""
    if not c.responses:
        what = "holds a prompt alone, without responses to compare; prefopt sample draws some"
        raise _Impossible("no response", what)
    if len(c.responses) < 2:
        what = "has one response; a preference needs two; demonstrations are for prefopt sft"
        if c.labels is not None:
            what = "has one response and a label; unpaired labels are for prefopt dpo --loss kto"
        raise _Impossible("too few responses", what)
    tiers = c.tiers or tiers_of(c.scores or ())
    if not tiers and c.labels is not None:
        tiers = tuple(filter(None, _by_label(c.labels)))
    if not tiers:
        raise _Impossible("no preference", "no response is preferred to another")
    if len(tiers) < 2:
        raise _Impossible("only ties", "all responses are equally good, so none is preferred")
    return tiers


def _to_pairs(c: Comparison) -> Comparison:
    return c if c.votes else replace(c, tiers=_tiers(c), votes=None)


def _to_scored(c: Comparison) -> Comparison:
    if c.scores is None:
        raise _Impossible("no scores", "has no scores; the loss is on how far they lie apart")
    return _to_pairs(c)


def _to_ranking(c: Comparison) -> Comparison:
    if c.votes and not c.tiers:
        c = replace(c, tiers=tiers_from_votes(c))
        if not c.tiers:
            raise _Impossible("no order", "its votes form no order (a cycle, a missing pair, or ties among unequals)")
    return replace(c, tiers=_tiers(c), votes=None)


def _to_labels(c: Comparison) -> Comparison:
    if c.labels is not None:
        return c
    tiers = _to_ranking(c).tiers
    if len(tiers) > 2:
        raise _Impossible("no label", f"has {len(tiers)} ranks; which of them are desirable is unknown")
    return replace(c, labels=tuple(k in tiers[0] for k in range(len(c.responses))))


def _to_demonstrations(c: Comparison) -> Comparison:
    if not c.responses:
        raise _Impossible("no response", "holds a prompt alone, without a response to learn from")
    best: int | None = None
    if c.tiers:
        best = min(c.tiers[0])
    elif c.labels is not None:
        best = next((k for k, desirable in enumerate(c.labels) if desirable), None)
        if best is None:
            raise _Impossible("no desirable response", "every response is labelled undesirable")
    elif c.votes:
        best = next((k for k, margin in enumerate(_margins(c)) if max(margin) > 0 and min(margin) >= 0), None)
        if best is None:
            raise _Impossible("no best response", "no response wins against another without losing to a third")
    return replace(_to_prompt(c), responses=c.responses if best is None else (c.responses[best],))


def _to_prompt(c: Comparison) -> Comparison:
    return replace(c, responses=(), tiers=(), scores=None, labels=None, votes=None)


_CONVERTERS = {
    "pairs": _to_pairs,
    "scored": _to_scored,
    "ranking": _to_ranking,
    "labels": _to_labels,
    "demonstrations": _to_demonstrations,
    "prompts": _to_prompt,
}


def check(c: Comparison, kind: DataKind) -> list[Problem]:
    """All problems that keep a row from being used as ``kind``."""
    return found if isinstance(found := validate(c, kind), list) else []


def validate(c: Comparison, kind: DataKind) -> Comparison | list[Problem]:
    """The row converted to ``kind``, or all of its problems."""
    found = [Problem(problem, c.row, what, c.file) for problem, what in _content_problems(c, kind)]
    converted = convert(c, kind)
    if isinstance(converted, Problem):
        return [*found, converted]
    compared = converted.pairs if kind != "demonstrations" else ()
    if kind == "labels" and len(converted.responses) > 1 and converted.labels is not None:
        good, bad = _by_label(converted.labels)
        compared = tuple((g, b) for g in good for b in bad)
    if any(c.responses[best] == c.responses[worse] for best, worse in compared):
        found.append(Problem("identical responses", c.row, "the preferred response and the other are the same", c.file))
    return found or converted


def _content_problems(c: Comparison, kind: DataKind) -> Iterator[tuple[str, str]]:
    responses = () if kind == "prompts" else c.responses
    messages = [*c.prompt, *(m for r in responses for m in r.messages)]
    try:
        "".join([*(text for m in messages for text in texts_of(m)), *c.tools]).encode()
    except UnicodeEncodeError:
        yield "broken text", "holds half of a surrogate pair, which is not a character"
    if not c.text and not any(m.content.strip() for m in c.prompt if m.role != "system"):
        yield "empty prompt", "the prompt is empty"
    elif not c.text and c.prompt[-1].role == "assistant":
        yield "prompt ends with an answer", "the prompt ends with the assistant's turn, so no answer is asked for"
    elif c.text and kind == "prompts" and not any(m.content.strip() for m in c.prompt):
        yield "empty prompt", "the prompt is empty"
    for k, response in enumerate(responses):
        name = f"the {('chosen', 'rejected')[k]} response" if c.tiers == ((0,), (1,)) else f"response {k + 1}"
        answers = [m for m in response.messages if m.role == "assistant"]
        if not response.messages or response.messages[-1].role != "assistant":
            yield "response without an answer", f"{name} does not end with the assistant's turn"
        elif not c.text and response.messages[0].role != "assistant":
            role = response.messages[0].role
            what = f"{name} begins with a turn of the {role}; leave out a repeated prompt"
            yield "response begins with no answer", what
        elif any(not m.content.strip() and not m.tool_calls for m in answers):
            yield "empty response", f"{name} is empty"
        elif not any(m.trained for m in answers):
            yield "nothing to train", f"no turn of {name} is trained"


def texts_of(m: Message) -> Iterator[str]:
    """All texts of a turn: words, reasoning, and the names and arguments of calls."""
    yield m.content
    yield m.reasoning or ""
    for call in m.tool_calls:
        yield call.name
        yield call.arguments


def refused_rows(problems: Sequence[Problem]) -> int:
    """Number of rows with a problem."""
    return len({(p.file, p.row) for p in problems})


def describe(problems: Sequence[Problem]) -> str:
    """One line: for each kind its count, its first rows and what is wrong (with the first row, where rows differ).

    >>> describe([Problem("missing field", 3, "lacks chosen"), Problem("missing field", 9, "lacks prompt")])
    'missing field: 2 (rows 3, 9; row 3: lacks chosen)'
    """
    several = len({p.file for p in problems}) > 1
    lines = []
    for kind in dict.fromkeys(p.kind for p in problems):
        found = [p for p in problems if p.kind == kind]
        rows = [f"{p.file}:{p.row}" if several else str(p.row) for p in found]
        what = found[0].what
        if any(p.what != what for p in found):
            what = f"{'' if several else 'row '}{rows[0]}: {what}"
        reason = f"; {what}" if what else ""
        lines.append(f"{kind}: {len(found)} (row{'s' * (len(rows) > 1)} {_first_rows(rows)}{reason})")
    return "; ".join(lines)


def _first_rows(rows: Sequence[object]) -> str:
    return ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")


def refuse(problems: Sequence[Problem], read: int) -> DataError:
    """The error for ``problems`` among ``read`` rows: file, rows, reasons and count."""
    files = {p.file for p in problems}
    count = refused_rows(problems)
    remedy = "; correct them, or leave them out with --on-bad-row skip" if count < read else ""
    what = f"{count} of {read} rows cannot be used: {describe(problems)}{remedy}"
    row = problems[0].row if count == 1 else None
    return DataError(what, file=files.pop() if len(files) == 1 else None, row=row)


# Warnings about rows that are used, each with the numbers of the rows; no numbers: it concerns the file.
Warnings = dict[str, list[int]]


def warning_lines(warnings: Mapping[str, Sequence[int]]) -> list[str]:
    """One line for each warning, with its number of rows and the first of them: ``cut: 2 rows (3, 9)``."""
    counts = {what: f"{len(rows)} row{'s' * (len(rows) > 1)} ({_first_rows(rows)})" for what, rows in warnings.items()}
    return [f"{what}: {counts[what]}" if rows else what for what, rows in warnings.items()]
