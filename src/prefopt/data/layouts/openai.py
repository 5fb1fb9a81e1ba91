"""OpenAI's layouts for fine-tuning: conversations with tools, and preferences; and ms-swift's, which extend them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prefopt.data.layouts.layout import BAD, GOOD, USER, Layout, pair_of, response_of, score_columns, with_columns
from prefopt.data.layouts.messages import last_answer, split_turns, write_messages, write_tools
from prefopt.data.layouts.row import RowReader
from prefopt.data.layouts.values import SCORES, BadRow, type_name
from prefopt.records import Comparison, Response


def _write_messages(c: Comparison) -> dict[str, object]:
    turns = (*c.prompt, *response_of(c).messages) if c.responses else c.prompt
    return {"messages": write_messages(turns, weight="weight"), **write_tools(c.tools)}


def _read_preference(row: RowReader) -> Comparison:
    """``input`` holds messages and tools; its other keys are kept as further columns."""
    given = row.given("input")
    if not isinstance(given, dict):
        raise BadRow("wrong type", f"input is {type_name(given)}, not an object with messages")
    inner = {k: v for k, v in given.items() if k in ("messages", "tools")}
    others = {str(k): v for k, v in given.items() if k not in inner}
    if twice := others.keys() & row.extra.keys():
        raise BadRow("wrong type", f"has {min(twice)} both in input and beside it")
    row = replace(row, values={**row.values, **inner}, extra={**row.extra, **others})
    return row.pair(row.turns("messages"), row.response("preferred_output"), row.response("non_preferred_output"))


def _write_preference(c: Comparison) -> dict[str, object]:
    chosen, rejected = (write_messages(side.messages, weight="weight") for side in pair_of(c))
    prompt = {"messages": write_messages(c.prompt, weight="weight"), **write_tools(c.tools)}
    return {"input": prompt, "preferred_output": chosen, "non_preferred_output": rejected, **score_columns(c)}


def _add_columns(row: dict[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    """Further columns; ``parallel_tool_calls`` goes into ``input``, as OpenAI expects."""
    row = with_columns(row, extra)
    if "parallel_tool_calls" in row and isinstance(row["input"], dict):
        row["input"]["parallel_tool_calls"] = row.pop("parallel_tool_calls")
    return row


def _read_rejected_messages(row: RowReader) -> Comparison:
    """The rejected side is a whole conversation, or the last answer alone."""
    chosen = row.chat("messages")
    at = last_answer(chosen)
    value = row.given("rejected_messages" if row.has("rejected_messages") else "rejected_response")
    rejected = row.response_of(value, "rejected_response" if isinstance(value, str) else "the rejected side").messages
    if not isinstance(value, str) and not (rejected and rejected[0].role == "assistant"):
        if chosen and chosen[0].role == "system" and rejected and rejected[0].role != "system":
            rejected = (chosen[0], *rejected)
        at = split_turns(chosen, rejected)
        if at == 0:
            raise BadRow("differing prompts", "the sides do not begin with the same turns")
        rejected = rejected[at:]
    return row.pair(chosen[:at], Response(chosen[at:]), Response(rejected))


PREFERENCE = Layout(
    name="openai-preference",
    fields=("input", "preferred_output", "non_preferred_output"),
    optional=SCORES,
    kind="pairs",
    description="a conversation with its tools, and two responses to it",
    origin="OpenAI",
    example={"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    reader=_read_preference,
    writer=_write_preference,
    add_columns=_add_columns,
)
MESSAGES = Layout(
    name="messages",
    fields=("messages",),
    optional=("system", "tools"),
    kind="demonstrations",
    description="a conversation to train on, with its tools",
    origin="OpenAI, TRL",
    example={"messages": [USER, GOOD]},
    reader=lambda row: row.demonstration(row.chat("messages")),
    writer=_write_messages,
)
SWIFT_PREFERENCE = Layout(
    name="swift-preference",
    fields=("messages", "rejected_messages"),
    optional=("system", "tools", *SCORES),
    kind="pairs",
    description="a conversation, and a rejected one that begins with the same turns",
    origin="ms-swift",
    example={"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    reader=_read_rejected_messages,
)
SWIFT_REJECTED_RESPONSE = Layout(
    name="swift-rejected-response",
    fields=("messages", "rejected_response"),
    optional=("system", "tools", *SCORES),
    kind="pairs",
    description="a conversation, and a response to which its last answer is preferred",
    origin="ms-swift",
    example={"messages": [USER, GOOD], "rejected_response": "22"},
    reader=_read_rejected_messages,
)
LAYOUTS = {11: (PREFERENCE,), 21: (SWIFT_PREFERENCE, SWIFT_REJECTED_RESPONSE), 91: (MESSAGES,)}
