"""ShareGPT's layouts as LLaMA-Factory reads them: ``conversations`` of ``from`` and ``value``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefopt.data.layouts.layout import CannotHold, Layout, Row
from prefopt.data.layouts.messages import write_tools
from prefopt.data.layouts.trl import need_chat, need_pair
from prefopt.records import Comparison, Message

ORIGIN = "LLaMA-Factory"
SPELT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
HUMAN = {"from": "human", "value": "What is 2 + 2?"}


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


def _read_ranking(row: Row) -> Comparison:
    prompt = row.with_system(row.messages("conversations"))
    sides = row.response("chosen"), row.response("rejected")
    return row.comparison(prompt, sides, ((0,), (1,)), tools=row.tools)


def _write_ranking(c: Comparison) -> dict[str, object]:
    sides: dict[str, object] = {}
    for name, response in zip(("chosen", "rejected"), need_pair(c), strict=True):
        turns = write_turns(response.messages)
        sides[name] = turns[0] if len(turns) == 1 else turns
    need_chat(c)
    return {"conversations": write_turns(c.prompt), **sides, **write_tools(c.tools)}


RANKING = Layout(
    name="sharegpt-ranking",
    fields=("conversations", "chosen", "rejected"),
    optional=("system", "tools"),
    words={"messages": "conversations"},
    example={
        "conversations": [HUMAN],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "22"},
    },
    origin=ORIGIN,
    reader=_read_ranking,
    writer=_write_ranking,
)
