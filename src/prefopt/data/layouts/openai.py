"""OpenAI's layouts for fine-tuning: chats with tools, and preferences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prefopt.data.layouts.holding import best_first, need_chat, need_pair, score_columns
from prefopt.data.layouts.layout import Layout, with_columns
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, scored_sides
from prefopt.data.layouts.sharegpt import demonstrated, whole
from prefopt.data.layouts.values import BadRow, kind
from prefopt.records import Comparison

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
