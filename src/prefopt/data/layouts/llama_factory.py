"""LLaMA-Factory's layouts: Alpaca's columns, ShareGPT's conversations, and the parts and weights of v1."""

from __future__ import annotations

import json
from collections.abc import Mapping

from prefopt.data.layouts.layout import BAD, GOOD, USER, CannotHold, Layout, pair_of, score_columns
from prefopt.data.layouts.messages import last_answer, split_turns, write_tools
from prefopt.data.layouts.row import RowReader
from prefopt.data.layouts.values import LISTS, SCORES, BadRow, items_of, look, type_name
from prefopt.records import Comparison, Message, Response

ORIGIN = "LLaMA-Factory"
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
HUMAN, GPT = {"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}


def _write_turn(m: Message) -> dict[str, object]:
    """One message in ShareGPT's layout, which has one text each; tool calls are JSON text in a turn of their own."""
    if m.reasoning is not None:
        raise CannotHold("reasoning apart from the answer")
    if not m.trained:
        raise CannotHold("turns of a response that are not trained")
    if m.name is not None or m.tool_call_id is not None or any(call.id is not None for call in m.tool_calls):
        raise CannotHold("names of speakers and ids of tool calls")
    if not m.tool_calls:
        return {"from": SHAREGPT_ROLES[m.role], "value": m.content}
    if m.content:
        raise CannotHold("a turn with both text and tool calls")
    calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in m.tool_calls]
    return {"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)}


def _write_ranking(c: Comparison) -> dict[str, object]:
    sides: dict[str, object] = {}
    for name, response in zip(("chosen", "rejected"), pair_of(c), strict=True):
        turns = [_write_turn(m) for m in response.messages]
        sides[name] = turns[0] if len(turns) == 1 else turns
    prompt = [_write_turn(m) for m in c.prompt]
    return {"conversations": prompt, **sides, **score_columns(c), **write_tools(c.tools)}


def _read_kto(row: RowReader) -> Comparison:
    turns = row.chat("messages")
    at = last_answer(turns)
    return row.comparison(turns[:at], [Response(turns[at:])], labels=row.labels)


def instruction_prompt(row: RowReader) -> tuple[Message, ...]:
    """Alpaca's prompt: system, earlier turns, and one user turn with instruction and input on lines of their own."""
    turns: list[Message] = []
    for item in row.items("history") if row.has("history") else ():
        pair = items_of(item, "an item of history")
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            held = ", ".join(type_name(text) for text in pair) or "nothing"
            raise BadRow("wrong type", f"an item of history holds {held}, not a question and an answer")
        turns += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
    parts = [text for text in (row.text("instruction"), row.text_or("input")) if text]
    return row.with_system((*turns, Message("user", "\n".join(parts))))


def _read_v1_pair(row: RowReader) -> Comparison:
    chosen, rejected = row.turns("chosen_messages"), row.turns("rejected_messages")
    at = split_turns(chosen, rejected)
    return row.pair(chosen[:at], Response(chosen[at:]), Response(rejected[at:]))


def _replies(row: Mapping[str, object]) -> bool:
    """The sides are answers to the messages, not whole conversations."""
    return look(row["chosen"]) in ("text", "message", "replies")


def _no_conversations(row: Mapping[str, object]) -> bool:
    """There is no prompt as text beside sides that are whole conversations."""
    if row.get("prompt") is None or look(row["prompt"]) in LISTS:
        return True
    return not all(look(row[name]) in LISTS for name in ("chosen", "rejected"))


def _v1_example(answer: str) -> list[dict[str, object]]:
    turns = (("user", "What is 2 + 2?", 0.0), ("assistant", answer, 1.0))
    return [{"role": r, "content": [{"type": "text", "value": text}], "loss_weight": w} for r, text, w in turns]


SHAREGPT_RANKING = Layout(
    name="sharegpt-ranking",
    fields=("conversations", "chosen", "rejected"),
    optional=("system", "tools", *SCORES),
    option_names={"messages": "conversations"},
    kind="pairs",
    description="a conversation and two responses to it, as ShareGPT's messages",
    origin=ORIGIN,
    example={"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "22"}},
    reader=lambda row: row.pair(row.chat("conversations"), row.response("chosen"), row.response("rejected")),
    writer=_write_ranking,
)
MESSAGES_RANKING = Layout(
    name="messages-ranking",
    fields=("messages", "chosen", "rejected"),
    optional=("system", "tools", *SCORES),
    matches=_replies,
    kind="pairs",
    description="a conversation and two responses to it, as OpenAI's messages",
    origin=ORIGIN,
    example={"messages": [USER], "chosen": GOOD, "rejected": BAD},
    reader=lambda row: row.pair(row.chat("messages"), row.response("chosen"), row.response("rejected")),
)
KTO = Layout(
    name="kto",
    fields=("messages", "label"),
    optional=("system", "tools"),
    aliases={"conversations": "messages", "kto_tag": "label"},
    accepts=("sharegpt", "messages", "v1-messages"),
    kind="labels",
    description="a conversation whose last turn is desirable or not",
    origin=ORIGIN,
    example={"messages": [USER, GOOD], "label": True},
    reader=_read_kto,
)
SHAREGPT = Layout(
    name="sharegpt",
    fields=("conversations",),
    optional=("system", "tools"),
    aliases={"conversation": "conversations"},
    option_names={"messages": "conversations"},
    kind="demonstrations",
    description="a conversation to train on",
    origin=ORIGIN,
    example={"conversations": [HUMAN, GPT]},
    reader=lambda row: row.demonstration(row.chat("conversations")),
)

OPTIONAL = ("input", "system", "history", "tools")
OPTION_NAMES = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "label"}
INSTRUCTION = {"instruction": "Add the numbers.", "input": "2 and 2"}
ALPACA_RANKING = Layout(
    name="alpaca-ranking",
    fields=("instruction", "chosen", "rejected"),
    optional=(*OPTIONAL, *SCORES),
    matches=_no_conversations,
    aliases={"question": "instruction"},
    option_names=OPTION_NAMES,
    kind="pairs",
    description="an instruction and two responses to it",
    origin=ORIGIN,
    example={**INSTRUCTION, "chosen": "4", "rejected": "22"},
    reader=lambda row: row.pair(instruction_prompt(row), row.response("chosen"), row.response("rejected")),
)
ALPACA_KTO = Layout(
    name="alpaca-kto",
    fields=("instruction", "output", "label"),
    optional=OPTIONAL,
    aliases={"kto_tag": "label"},
    option_names=OPTION_NAMES,
    kind="labels",
    description="an instruction and a response that is desirable or not",
    origin=ORIGIN,
    example={**INSTRUCTION, "output": "4", "kto_tag": True},
    reader=lambda row: row.comparison(instruction_prompt(row), [row.response("output")], labels=row.labels),
)
ALPACA = Layout(
    name="alpaca",
    fields=("instruction", "output"),
    optional=OPTIONAL,
    option_names=OPTION_NAMES,
    kind="demonstrations",
    description="an instruction and a response to train on; earlier answers are trained too, as in LLaMA-Factory",
    origin="Stanford Alpaca, LLaMA-Factory",
    example={**INSTRUCTION, "output": "4"},
    reader=lambda row: row.demonstration((*instruction_prompt(row), Message("assistant", row.text("output")))),
)
V1_PREFERENCE = Layout(
    name="v1-preference",
    fields=("chosen_messages", "rejected_messages"),
    optional=("tools", *SCORES),
    kind="pairs",
    description="two conversations of parts and weights that begin with the same prompt",
    origin=f"{ORIGIN} v1",
    example={"chosen_messages": _v1_example("4"), "rejected_messages": _v1_example("22")},
    reader=_read_v1_pair,
)
V1_MESSAGES = Layout(
    name="v1-messages",
    fields=("messages",),
    optional=("system", "tools"),
    matches=lambda row: look(row["messages"]) == "weighted",
    accepts=("messages",),
    kind="demonstrations",
    description="a conversation of parts and weights to train on",
    origin=f"{ORIGIN} v1",
    example={"messages": _v1_example("4")},
    reader=lambda row: row.demonstration(row.chat("messages")),
)
LAYOUTS = {
    12: (V1_PREFERENCE,),
    40: (SHAREGPT_RANKING, ALPACA_RANKING),
    55: (MESSAGES_RANKING,),
    75: (KTO, ALPACA_KTO),
    90: (SHAREGPT, ALPACA, V1_MESSAGES),
}
