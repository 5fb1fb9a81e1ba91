"""What is wrong with rows that could be read: every problem is named, none is passed over.

>>> from prefopt.records import Message
>>> row = Comparison.pair([Message("user", "2 + 2?")], chosen="4", rejected="4", row=7)
>>> kept, problems = validate([row])
>>> len(kept), problems[0].row, problems[0].kind
(0, 7, 'identical responses')
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefopt.data.problem import NAMED_ROWS, Problem, describe, refuse, refused_rows
from prefopt.data.want import Want, convert
from prefopt.records import Comparison, Message

__all__ = ["NAMED_ROWS", "Problem", "Want", "check", "convert", "describe", "refuse", "refused_rows", "validate"]


def validate(comparisons: Sequence[Comparison], want: Want = "pairs") -> tuple[list[Comparison], list[Problem]]:
    """Part rows into those that can be used and the problems of those that cannot (a row may have several)."""
    kept, problems = [], []
    for comparison in comparisons:
        found = check(comparison, want)
        problems += found
        if not found:
            kept.append(comparison)
    return kept, problems


def check(comparison: Comparison, want: Want) -> list[Problem]:
    """Everything that keeps a row from being used for what is wanted; nothing where :func:`convert` gives it."""
    c = comparison
    converted = convert(c, want)
    found = [Problem(kind, c.row, what, c.file) for kind, what in _content(c, want)]
    if isinstance(converted, Problem):
        return [*found, converted]
    compared = converted.pairs if want != "demonstrations" else ()
    if want == "labels" and len(converted.responses) > 1 and converted.labels is not None:
        good, bad = (tuple(k for k, x in enumerate(converted.labels) if x is wanted) for wanted in (True, False))
        compared = tuple((g, b) for g in good for b in bad)
    if any(c.responses[best] == c.responses[worse] for best, worse in compared):
        found.append(Problem("identical responses", c.row, "the preferred response and the other are the same", c.file))
    return found


def _content(c: Comparison, want: Want) -> Iterator[tuple[str, str]]:
    responses = () if want == "prompts" else c.responses
    messages = [*c.prompt, *(m for r in responses for m in r.messages)]
    if any(_broken(text) for m in messages for text in _texts(m)) or any(_broken(tool) for tool in c.tools):
        yield "broken text", "holds half of a surrogate pair, which is no character"
    if not c.text:
        yield from _check_turns(c)
    elif want == "prompts" and not any(m.content.strip() for m in c.prompt):
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
