"""ShareGPT's layouts as LLaMA-Factory reads them: ``conversations`` of ``from`` and ``value``, and its KTO rows."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefopt.data.layouts.holding import (
    CannotHold,
    best_first,
    need_chat,
    need_demonstration,
    need_label,
    need_no_preference,
    need_pair,
    score_columns,
)
from prefopt.data.layouts.implicit import first_answer, last_answer
from prefopt.data.layouts.layout import Layout
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, replies, scored_sides
from prefopt.records import Comparison, Message, Response

ORIGIN = "LLaMA-Factory"
SPELT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
USER, GOOD = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
HUMAN, GPT = {"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}


def write_turns(turns: Sequence[Message]) -> list[dict[str, object]]:
    """Messages in ShareGPT's spelling, which has one text for each."""
    return [write_turn(m) for m in turns]


def write_turn(m: Message) -> dict[str, object]:
    """One message; calls are JSON text in a turn of their own."""
    if m.reasoning is not None:
        raise CannotHold("reasoning apart from the answer")
    if not m.trained:
        raise CannotHold("turns of a response that are not trained")
    if m.name is not None or m.tool_call_id is not None or any(call.id is not None for call in m.tool_calls):
        raise CannotHold("names of speakers and ids of tool calls")
    if not m.tool_calls:
        return {"from": SPELT[m.role], "value": m.content}
    if m.content:
        raise CannotHold("a turn with both words and tool calls")
    calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in m.tool_calls]
    return {"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)}


def demonstrated(row: Row, turns: tuple[Message, ...]) -> Comparison:
    """A conversation to learn from: all turns from the assistant's first on are the response."""
    at = first_answer(turns)
    return row.comparison(turns[:at], [Response(turns[at:])] if turns[at:] else ())


def whole(c: Comparison) -> tuple[Message, ...]:
    """The conversation of a row with one response, or with a prompt alone."""
    need_chat(c)
    if not c.responses:
        need_no_preference(c)
        return c.prompt
    return (*c.prompt, *need_demonstration(c).messages)


def _read_ranking(row: Row) -> Comparison:
    return row.pair(row.chat("conversations"), row.response("chosen"), row.response("rejected"))


def _write_ranking(c: Comparison) -> dict[str, object]:
    need_chat(c)
    sides: dict[str, object] = {}
    for name, response in zip(("chosen", "rejected"), need_pair(c), strict=True):
        turns = write_turns(response.messages)
        sides[name] = turns[0] if len(turns) == 1 else turns
    return {"conversations": write_turns(c.prompt), **sides, **score_columns(c), **write_tools(c.tools)}


def _read_messages_ranking(row: Row) -> Comparison:
    return row.pair(row.chat("messages"), row.response("chosen"), row.response("rejected"))


def _write_messages_ranking(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = (write_messages(side.messages, weight="weight") for side in need_pair(c))
    sides: dict[str, object] = {"chosen": chosen, "rejected": rejected}
    if len(chosen) == len(rejected) == 1:
        sides = {"chosen": chosen[0], "rejected": rejected[0]}
    return {"messages": write_messages(c.prompt), **sides, **score_columns(c), **write_tools(c.tools)}


def _read_kto(row: Row) -> Comparison:
    turns, labels = row.chat("messages"), (row.label_of(row.given("label"), "label"),)
    at = last_answer(turns)
    return row.comparison(turns[:at], [Response(turns[at:])], labels=labels)


def _write_kto(c: Comparison) -> dict[str, object]:
    need_chat(c)
    response, label = need_label(c)
    return {"messages": write_messages((*c.prompt, *response.messages)), "label": label, **write_tools(c.tools)}


def _read_conversation(row: Row) -> Comparison:
    return demonstrated(row, row.chat("conversations"))


def _write_conversation(c: Comparison) -> dict[str, object]:
    return {"conversations": write_turns(whole(c)), **write_tools(c.tools)}


RANKING = Layout(
    name="sharegpt-ranking",
    fields=("conversations", "chosen", "rejected"),
    optional=("system", "tools", *SCORES),
    reads=scored_sides,
    words={"messages": "conversations"},
    gives="pairs",
    says="a conversation and two responses to it, in ShareGPT's spelling",
    origin=ORIGIN,
    example={"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "22"}},
    reader=_read_ranking,
    writer=_write_ranking,
    arranged=best_first,
)
MESSAGES_RANKING = Layout(
    name="messages-ranking",
    fields=("messages", "chosen", "rejected"),
    optional=("system", "tools", *SCORES),
    reads=scored_sides,
    shape=replies,
    gives="pairs",
    says="a conversation and two responses to it, in OpenAI's spelling",
    origin=ORIGIN,
    example={"messages": [USER], "chosen": GOOD, "rejected": {"role": "assistant", "content": "22"}},
    reader=_read_messages_ranking,
    writer=_write_messages_ranking,
    arranged=best_first,
)
KTO = Layout(
    name="kto",
    fields=("messages", "label"),
    optional=("system", "tools"),
    aliases={"conversations": "messages", "kto_tag": "label"},
    also=("sharegpt", "messages", "v1-messages"),
    gives="labels",
    says="a conversation whose last turn is desirable or not",
    origin=ORIGIN,
    example={"messages": [USER, GOOD], "label": True},
    reader=_read_kto,
    writer=_write_kto,
)
CONVERSATION = Layout(
    name="sharegpt",
    fields=("conversations",),
    optional=("system", "tools"),
    aliases={"conversation": "conversations"},
    words={"messages": "conversations"},
    gives="demonstrations",
    says="a conversation to learn from",
    origin=ORIGIN,
    example={"conversations": [HUMAN, GPT]},
    reader=_read_conversation,
    writer=_write_conversation,
)
