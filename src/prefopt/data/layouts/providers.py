"""OpenAI's layouts for fine-tuning: chats with tools, and preferences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from prefopt.data.layouts.layout import (
    CannotHold,
    Layout,
    best_first,
    need_chat,
    need_pair,
    score_columns,
    with_columns,
)
from prefopt.data.layouts.llama_factory import demonstrated, whole
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, TURNS, scored_sides, transcripts
from prefopt.data.layouts.values import BadRow, kind
from prefopt.records import Comparison, Message, Response

ORIGIN = "OpenAI"
USER = {"role": "user", "content": "What is 2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "22"}


def _read_messages(row: Row) -> Comparison:
    return demonstrated(row, row.chat("messages"))


def _write_messages(c: Comparison) -> dict[str, object]:
    return {"messages": write_messages(whole(c), weight="weight"), **write_tools(c.tools)}


def _read_preference(row: Row) -> Comparison:
    """Tools stand beside the messages of the input; what else does is kept as further columns."""
    given = row.given("input")
    if not isinstance(given, dict):
        raise BadRow("wrong type", f"input is {kind(given)}, not an object with messages")
    inner = {k: v for k, v in given.items() if k in ("messages", "tools")}
    others = {str(k): v for k, v in given.items() if k not in inner}
    if twice := others.keys() & row.extra.keys():
        raise BadRow("wrong type", f"has {min(twice)} both in input and beside it")
    row = replace(row, values={**row.values, **inner}, extra={**row.extra, **others})
    return row.pair(row.turns("messages"), row.response("preferred_output"), row.response("non_preferred_output"))


def _write_preference(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = (write_messages(side.messages, weight="weight") for side in need_pair(c))
    asked = {"messages": write_messages(c.prompt, weight="weight"), **write_tools(c.tools)}
    return {"input": asked, "preferred_output": chosen, "non_preferred_output": rejected, **score_columns(c)}


def _inside(row: dict[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    """The row with ``parallel_tool_calls`` where OpenAI wants it."""
    row = with_columns(row, extra)
    if "parallel_tool_calls" in row and isinstance(row["input"], dict):
        row["input"]["parallel_tool_calls"] = row.pop("parallel_tool_calls")
    return row


PREFERENCE = Layout(
    name="openai-preference",
    fields=("input", "preferred_output", "non_preferred_output"),
    optional=SCORES,
    reads=scored_sides,
    gives="pairs",
    says="a conversation with its tools, and two responses to it",
    origin=ORIGIN,
    example={"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    reader=_read_preference,
    writer=_write_preference,
    arranged=best_first,
    finish=_inside,
)
MESSAGES = Layout(
    name="messages",
    fields=("messages",),
    optional=("system", "tools"),
    gives="demonstrations",
    says="a conversation to learn from, with tools where it has any",
    origin=f"{ORIGIN}, TRL",
    example={"messages": [USER, GOOD]},
    reader=_read_messages,
    writer=_write_messages,
)


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
