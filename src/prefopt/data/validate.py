"""From what a row says to what a method needs of it.

>>> from prefopt.records import Message
>>> row = Comparison.scored([Message("user", "2 + 2?")], ["22", "4"], scores=[0, 9], row=1)
>>> convert(row, "demonstrations").responses[0].text, convert(row, "labels").labels
('4', (False, True))

>>> from prefopt.records import Message
>>> row = Comparison.pair([Message("user", "2 + 2?")], chosen="4", rejected="4", row=7)
>>> kept, problems = validate([row])
>>> len(kept), problems[0].row, problems[0].kind
(0, 7, 'identical responses')
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prefopt.errors import DataError
from prefopt.records import Comparison, Message, tiers_of

DataKind = Literal["pairs", "scored", "ranking", "labels", "demonstrations", "prompts"]
Tiers = tuple[tuple[int, ...], ...]


class _Impossible(Exception):
    def __init__(self, kind: str, what: str) -> None:
        self.kind, self.what = kind, what


def convert(c: Comparison, kind: DataKind) -> Comparison | Problem:
    """The comparison with what is wanted of it.

    - ``pairs``: votes, or tiers of which at least two differ (from an order, scores, or labels of several responses)
    - ``scored``: such pairs, with a score of every response
    - ``ranking``: such tiers; votes give them where they agree with an order
    - ``labels``: labels, or the better of two tiers as desirable and the other as not
    - ``demonstrations``: the best response alone, of several equally good ones the first; responses without any
      preference all stay
    - ``prompts``: no responses

    A :class:`Problem` where that cannot be had, ``only ties`` where all responses are equally good.
    """
    makers = {
        "pairs": _pairs,
        "scored": _scored,
        "ranking": _ranking,
        "labels": _labels,
        "demonstrations": _demonstrations,
        "prompts": _bare,
    }
    try:
        return makers[kind](c)
    except _Impossible as why:
        return Problem(why.kind, c.row, why.what, c.file)


def tiers_from_votes(c: Comparison) -> Tiers:
    """The order that votes agree with, or nothing where there is none: cycles, missing pairs, ties not transitive.

    Whether one response wins against another is the sum of the weights for it, less those against it. In an order with
    ties, responses with as many wins less losses are tied, so that one sort finds the only candidate.
    """
    count, margin = len(c.responses), _margins(c)
    if len({frozenset(vote[:2]) for vote in c.votes or ()}) < count * (count - 1) // 2:
        return ()
    sign = [[(m > 0) - (m < 0) for m in row] for row in margin]
    net = [sum(row) for row in sign]
    fits = all(sign[i][j] == (net[i] > net[j]) - (net[i] < net[j]) for i in range(count) for j in range(count))
    return tuple(tuple(i for i, n in enumerate(net) if n == value) for value in sorted(set(net), reverse=True)) * fits


def _margins(c: Comparison) -> list[list[float]]:
    """[K][K] the weights of the votes for one response against another, less those the other way round."""
    margin = [[0.0] * len(c.responses) for _ in c.responses]
    for best, worse, weight in c.votes or ():
        margin[best][worse] += weight
        margin[worse][best] -= weight
    return margin


def _ordered(c: Comparison) -> Tiers:
    """Tiers of at least two responses, from whatever gives an order."""
    if not c.responses:
        raise _Impossible(
            "no response", "holds a prompt alone, without responses to compare; prefopt sample draws some"
        )
    if len(c.responses) < 2:
        if c.labels is not None:
            what = "has one response and a label; unpaired labels are for prefopt dpo --loss kto"
            raise _Impossible("too few responses", what)
        what = "has one response; a preference needs two; demonstrations are for prefopt sft"
        raise _Impossible("too few responses", what)
    tiers = c.tiers or (tiers_of(c.scores) if c.scores is not None else ())
    if not tiers and c.labels is not None:
        split = (tuple(k for k, good in enumerate(c.labels) if good is wanted) for wanted in (True, False))
        tiers = tuple(tier for tier in split if tier)
    if not tiers:
        raise _Impossible("no preference", "no response is preferred to another")
    if len(tiers) < 2:
        raise _Impossible("only ties", "all responses are equally good, so none is preferred")
    return tiers


def _pairs(c: Comparison) -> Comparison:
    if c.votes:
        return c
    return replace(c, tiers=_ordered(c), votes=None)


def _scored(c: Comparison) -> Comparison:
    if c.scores is None:
        raise _Impossible("no scores", "has no scores; the loss is on how far they lie apart")
    return _pairs(c)


def _ranking(c: Comparison) -> Comparison:
    if c.votes and not c.tiers:
        tiers = tiers_from_votes(c)
        if not tiers:
            raise _Impossible("no order", "its votes form no order (a cycle, a missing pair, or ties among unequals)")
        c = replace(c, tiers=tiers)
    return replace(c, tiers=_ordered(c), votes=None)


def _labels(c: Comparison) -> Comparison:
    if c.labels is not None:
        return c
    tiers = _ranking(c).tiers
    if len(tiers) > 2:
        raise _Impossible("no label", f"ranks its responses in {len(tiers)} steps; which are desirable is not said")
    return replace(c, labels=tuple(k in tiers[0] for k in range(len(c.responses))))


def _demonstrations(c: Comparison) -> Comparison:
    if not c.responses:
        raise _Impossible("no response", "holds a prompt alone, without a response to learn from")
    kept = range(len(c.responses))
    if c.tiers:
        kept = range(best := min(c.tiers[0]), best + 1)
    elif c.labels is not None:
        good = [k for k, desirable in enumerate(c.labels) if desirable]
        if not good:
            raise _Impossible("no desirable response", "every response is labelled undesirable")
        kept = range(good[0], good[0] + 1)
    elif c.votes:
        margin = _margins(c)
        best = next((k for k in kept if max(margin[k]) > 0 and min(margin[k]) >= 0), -1)
        if best < 0:
            raise _Impossible("no best response", "no response wins against another without losing to a third")
        kept = range(best, best + 1)
    return replace(_bare(c), responses=tuple(c.responses[k] for k in kept))


def _bare(c: Comparison) -> Comparison:
    return replace(c, responses=(), tiers=(), scores=None, labels=None, votes=None)


__all__ = ["NAMED_ROWS", "DataKind", "Problem", "check", "convert", "describe", "refuse", "refused_rows", "validate"]


def validate(comparisons: Sequence[Comparison], kind: DataKind = "pairs") -> tuple[list[Comparison], list[Problem]]:
    """Part rows into those that can be used and the problems of those that cannot (a row may have several)."""
    kept, problems = [], []
    for comparison in comparisons:
        found = check(comparison, kind)
        problems += found
        if not found:
            kept.append(comparison)
    return kept, problems


def check(comparison: Comparison, kind: DataKind) -> list[Problem]:
    """Everything that keeps a row from being used for what is wanted; nothing where :func:`convert` gives it."""
    c = comparison
    converted = convert(c, kind)
    found = [Problem(kind, c.row, what, c.file) for kind, what in _content(c, kind)]
    if isinstance(converted, Problem):
        return [*found, converted]
    compared = converted.pairs if kind != "demonstrations" else ()
    if kind == "labels" and len(converted.responses) > 1 and converted.labels is not None:
        good, bad = (tuple(k for k, x in enumerate(converted.labels) if x is wanted) for wanted in (True, False))
        compared = tuple((g, b) for g in good for b in bad)
    if any(c.responses[best] == c.responses[worse] for best, worse in compared):
        found.append(Problem("identical responses", c.row, "the preferred response and the other are the same", c.file))
    return found


def _content(c: Comparison, kind: DataKind) -> Iterator[tuple[str, str]]:
    responses = () if kind == "prompts" else c.responses
    messages = [*c.prompt, *(m for r in responses for m in r.messages)]
    if any(_broken(text) for m in messages for text in _texts(m)) or any(_broken(tool) for tool in c.tools):
        yield "broken text", "holds half of a surrogate pair, which is no character"
    if not c.text:
        yield from _check_turns(c)
    elif kind == "prompts" and not any(m.content.strip() for m in c.prompt):
        yield "empty prompt", "the prompt is empty"
    for k, response in enumerate(responses):
        answers = [m for m in response.messages if m.role == "assistant"]
        if not response.messages or response.messages[-1].role != "assistant":
            yield "response without an answer", f"the {_name(c, k)} response does not end with the assistant's turn"
        elif not c.text and response.messages[0].role != "assistant":
            role = response.messages[0].role
            what = f"the {_name(c, k)} response begins with a turn of the {role}; a repeated prompt is to be left out"
            yield "response begins with no answer", what
        elif any(not m.content.strip() and not m.tool_calls for m in answers):
            yield "empty response", f"the {_name(c, k)} response is empty"
        elif not any(m.trained for m in answers):
            yield "nothing to train", f"no turn of the {_name(c, k)} response is to be trained"


def _check_turns(c: Comparison) -> Iterator[tuple[str, str]]:
    if not any(m.content.strip() for m in c.prompt if m.role != "system"):
        yield "empty prompt", "the prompt is empty"
    elif c.prompt[-1].role == "assistant":
        yield "prompt ends with an answer", "the prompt ends with the assistant's turn, so no answer is asked for"


def _name(c: Comparison, k: int) -> str:
    return ("chosen", "rejected")[k] if c.tiers == ((0,), (1,)) else f"{k + 1}."


def _texts(m: Message) -> Iterator[str]:
    yield m.content
    if m.reasoning is not None:
        yield m.reasoning
    for call in m.tool_calls:
        yield call.name
        yield call.arguments


def _broken(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


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


Warnings = dict[str, list[int]]


def merge(warnings: Iterable[Mapping[str, Sequence[int]]]) -> Warnings:
    """One from many: what is said once stays so, rows add up, in order."""
    merged: Warnings = {}
    for found in warnings:
        for what, rows in found.items():
            merged.setdefault(what, []).extend(rows)
    return {what: sorted(rows) for what, rows in merged.items()}


def lines(warnings: Mapping[str, Sequence[int]]) -> list[str]:
    """Each finding with the number of rows it concerns and the first of them; without rows, the finding alone."""
    said = []
    for what, rows in warnings.items():
        first = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
        said.append(f"{what}: {len(rows)} row{'s' if len(rows) > 1 else ''} ({first})" if rows else what)
    return said
