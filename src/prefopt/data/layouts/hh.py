"""Transcripts in the manner of Anthropic's HH: each side is a whole dialogue as text."""

from __future__ import annotations

import re

from prefopt.data.layouts.holding import CannotHold, best_first, need_chat, need_pair, score_columns
from prefopt.data.layouts.layout import Layout
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, TURNS, scored_sides, transcripts
from prefopt.data.layouts.values import BadRow
from prefopt.records import Comparison, Message, Response

MARK = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SPELT = {role: mark for mark, role in ROLES.items()}


def _turns(row: Row, name: str) -> tuple[str, tuple[Message, ...], tuple[Message, ...]]:
    """The text before the last turn of the assistant, the turns in it, and the turns from there on."""
    text = row.text(name)
    if not text.startswith(TURNS):
        raise BadRow("no transcript", f"{name} does not begin with an empty line and 'Human:'")
    marks = list(MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = tuple(
        Message(ROLES[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    )
    last = next((i for i in reversed(range(len(turns))) if turns[i].role == "assistant"), None)
    if last is None:
        raise BadRow("response without an answer", f"{name} has no turn of the assistant")
    return text[: marks[last].start()], turns[:last], turns[last:]


def _read(row: Row) -> Comparison:
    (before, prompt, chosen), (other, _, rejected) = _turns(row, "chosen"), _turns(row, "rejected")
    if before != other:
        raise BadRow("differing prompts", "the sides differ before their last answers, so they answer two prompts")
    return row.pair(prompt, Response(chosen), Response(rejected))


def _write(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = (_text((*c.prompt, *side.messages)) for side in need_pair(c))
    return {"chosen": chosen, "rejected": rejected, **score_columns(c)}


def _text(turns: tuple[Message, ...]) -> str:
    if any(m.role not in SPELT or m.tool_calls for m in turns):
        raise CannotHold("system turns and tools")
    return "".join(f"\n\n{SPELT[m.role]}: {m.content}" for m in turns)


TRANSCRIPTS = Layout(
    name="hh",
    fields=("chosen", "rejected"),
    optional=SCORES,
    reads=scored_sides,
    shape=transcripts,
    gives="pairs",
    says="two transcripts; the prompt is all before the last answer",
    origin="Anthropic HH-RLHF",
    example={
        "chosen": "\n\nHuman: What is 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: What is 2 + 2?\n\nAssistant: 22",
    },
    reader=_read,
    writer=_write,
    arranged=best_first,
)
