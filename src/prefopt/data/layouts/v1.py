"""LLaMA-Factory's v1 layouts: messages made of typed parts, each message with a weight of 0 or 1 in the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefopt.data.layouts.holding import CannotHold, best_first, need_chat, need_pair, score_columns
from prefopt.data.layouts.implicit import split_turns
from prefopt.data.layouts.layout import Layout
from prefopt.data.layouts.messages import write_tools
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, scored_sides, weighted
from prefopt.data.layouts.sharegpt import ORIGIN, demonstrated, whole
from prefopt.records import Comparison, Message, Response


def _parts(turns: Sequence[Message]) -> list[dict[str, object]]:
    return [_message(m) for m in turns]


def _message(m: Message) -> dict[str, object]:
    if m.name is not None or m.tool_call_id is not None or any(call.id is not None for call in m.tool_calls):
        raise CannotHold("names of speakers and ids of tool calls")
    parts = [] if m.reasoning is None else [{"type": "reasoning", "value": m.reasoning}]
    if m.content or not m.tool_calls:
        parts.append({"type": "text", "value": m.content})
    for call in m.tool_calls:
        spelt = {"name": call.name, "arguments": json.loads(call.arguments)}
        parts.append({"type": "tool_call", "value": json.dumps(spelt, ensure_ascii=False)})
    learned = m.role == "assistant" and m.trained
    return {"role": m.role, "content": parts, "loss_weight": 1.0 if learned else 0.0}


def _read_pair(row: Row) -> Comparison:
    chosen, rejected = row.turns("chosen_messages"), row.turns("rejected_messages")
    at = split_turns(chosen, rejected)
    return row.pair(chosen[:at], Response(chosen[at:]), Response(rejected[at:]))


def _write_pair(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = (_parts((*c.prompt, *side.messages)) for side in need_pair(c))
    scores = score_columns(c)
    return {"chosen_messages": chosen, "rejected_messages": rejected, **scores, **write_tools(c.tools)}


def _read_messages(row: Row) -> Comparison:
    return demonstrated(row, row.chat("messages"))


def _write_messages(c: Comparison) -> dict[str, object]:
    return {"messages": _parts(whole(c)), **write_tools(c.tools)}


def _example(answer: str) -> list[dict[str, object]]:
    asked, told = Message("user", "What is 2 + 2?"), Message("assistant", answer)
    return _parts([asked, told])


PAIR = Layout(
    name="v1-preference",
    fields=("chosen_messages", "rejected_messages"),
    optional=("tools", *SCORES),
    reads=scored_sides,
    gives="pairs",
    says="two whole conversations of parts and weights; the prompt is the turns they share",
    origin=f"{ORIGIN} v1",
    example={"chosen_messages": _example("4"), "rejected_messages": _example("22")},
    reader=_read_pair,
    writer=_write_pair,
    arranged=best_first,
)
MESSAGES = Layout(
    name="v1-messages",
    fields=("messages",),
    optional=("system", "tools"),
    shape=weighted,
    also=("messages",),
    gives="demonstrations",
    says="a conversation of parts and weights to learn from",
    origin=f"{ORIGIN} v1",
    example={"messages": _example("4")},
    reader=_read_messages,
    writer=_write_messages,
)
