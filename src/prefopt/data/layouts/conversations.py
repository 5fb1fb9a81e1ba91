"""Layouts of training tools: OpenAI's messages, ms-swift's, and LLaMA-Factory's (Alpaca, ShareGPT, parts of v1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from prefopt.data.layouts.layout import (
    BAD,
    GOOD,
    QUESTION,
    SIDES,
    USER,
    CannotHold,
    Layout,
    pair_layout,
    pair_of,
    response_of,
    score_columns,
    with_columns,
)
from prefopt.data.layouts.messages import last_answer, split_turns, write_messages, write_tools
from prefopt.data.layouts.row import RowReader
from prefopt.data.layouts.values import LISTS, SCORES, BadRow, items_of, look, type_name
from prefopt.records import Comparison, Message, Response


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
    rejected = row.response("rejected_messages").messages
    if not (rejected and rejected[0].role == "assistant"):
        if chosen and chosen[0].role == "system" and rejected and rejected[0].role != "system":
            rejected = (chosen[0], *rejected)
        at = split_turns(chosen, rejected)
        if at == 0:
            raise BadRow("differing prompts", "the sides do not begin with the same turns")
        rejected = rejected[at:]
    return row.pair(chosen[:at], Response(chosen[at:]), Response(rejected))


PREFERENCE = pair_layout(
    name="openai-preference",
    optional=SCORES,
    description="a conversation with its tools, and two responses to it",
    origin="OpenAI",
    example={"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    reader=_read_preference,
    writer=_write_preference,
    add_columns=_add_columns,
)
MESSAGES = Layout(
    name="messages",
    optional=("system", "tools"),
    kind="demonstrations",
    description="a conversation to train on, with its tools; messages may have weights, and parts as content",
    origin="OpenAI, TRL, LLaMA-Factory v1",
    example={"messages": [USER, GOOD]},
    reader=lambda row: row.demonstration(row.chat("messages")),
    writer=_write_messages,
)
SWIFT_PREFERENCE = pair_layout(
    name="swift-preference",
    optional=("system", "tools", *SCORES),
    aliases={"rejected_response": "rejected_messages"},
    description="a conversation, and a rejected one that begins with the same turns, or a rejected last answer",
    origin="ms-swift",
    example={"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    reader=_read_rejected_messages,
)

ORIGIN = "LLaMA-Factory"
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
HUMAN, GPT = {"from": "human", "value": QUESTION}, {"from": "gpt", "value": "4"}


def _write_turn(m: Message) -> dict[str, object]:
    """One message in ShareGPT's layout, which has one text each; tool calls are JSON text in a turn of their own."""
    if m.reasoning is not None:
        raise CannotHold("reasoning apart from the answer")
    if not m.trained:
        raise CannotHold("turns of a response that are not trained")
    if m.label is not None or m.rejected:
        raise CannotHold("turns that are judged by themselves")
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
    for name, response in zip(SIDES, pair_of(c), strict=True):
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
    parts = [row.text(name) for name in ("instruction", "input") if row.has(name)]
    return row.with_system((*turns, Message("user", "\n".join(filter(None, parts)))))


def _read_v1_pair(row: RowReader) -> Comparison:
    chosen, rejected = row.turns("chosen_messages"), row.turns("rejected_messages")
    at = split_turns(chosen, rejected)
    return row.pair(chosen[:at], Response(chosen[at:]), Response(rejected[at:]))


def _no_conversations(row: Mapping[str, object]) -> bool:
    """There is no prompt as text beside sides that are whole conversations."""
    text_prompt = row.get("prompt") is not None and look(row["prompt"]) not in LISTS
    return not (text_prompt and all(look(row[name]) in LISTS for name in SIDES))


def _v1_example(answer: str) -> list[dict[str, object]]:
    turns = (("user", QUESTION, 0.0), ("assistant", answer, 1.0))
    return [{"role": r, "content": [{"type": "text", "value": text}], "loss_weight": w} for r, text, w in turns]


SHAREGPT_RANKING = pair_layout(
    name="sharegpt-ranking",
    optional=("system", "tools", *SCORES),
    option_names={"messages": "conversations"},
    description="a conversation and two responses to it, as ShareGPT's messages",
    origin=ORIGIN,
    example={"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "22"}},
    reader=lambda row: row.pair(row.chat("conversations"), row.response("chosen"), row.response("rejected")),
    writer=_write_ranking,
)
MESSAGES_RANKING = pair_layout(
    name="messages-ranking",
    optional=("system", "tools", *SCORES),
    # The sides are answers to the messages, not whole conversations.
    matches=lambda row: look(row["chosen"]) in ("text", "message", "replies"),
    description="a conversation and two responses to it, as OpenAI's messages",
    origin=ORIGIN,
    example={"messages": [USER], "chosen": GOOD, "rejected": BAD},
    reader=lambda row: row.pair(row.chat("messages"), row.response("chosen"), row.response("rejected")),
)
KTO = Layout(
    name="kto",
    optional=("system", "tools"),
    aliases={"conversations": "messages", "kto_tag": "label"},
    accepts=("sharegpt", "messages"),
    kind="labels",
    description="a conversation whose last turn is desirable or not",
    origin=ORIGIN,
    example={"messages": [USER, GOOD], "label": True},
    reader=_read_kto,
)
SHAREGPT = Layout(
    name="sharegpt",
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
ALPACA_RANKING = pair_layout(
    name="alpaca-ranking",
    optional=(*OPTIONAL, *SCORES),
    matches=_no_conversations,
    aliases={"question": "instruction"},
    option_names=OPTION_NAMES,
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
    optional=OPTIONAL,
    option_names=OPTION_NAMES,
    kind="demonstrations",
    description="an instruction and a response to train on; earlier answers are trained too, as in LLaMA-Factory",
    origin="Stanford Alpaca, LLaMA-Factory",
    example={**INSTRUCTION, "output": "4"},
    reader=lambda row: row.demonstration((*instruction_prompt(row), Message("assistant", row.text("output")))),
)
V1_PREFERENCE = pair_layout(
    name="v1-preference",
    optional=("tools", *SCORES),
    description="two conversations of parts and weights that begin with the same prompt",
    origin=f"{ORIGIN} v1",
    example={"chosen_messages": _v1_example("4"), "rejected_messages": _v1_example("22")},
    reader=_read_v1_pair,
)
LAYOUTS = {
    11: (PREFERENCE,),
    12: (V1_PREFERENCE,),
    21: (SWIFT_PREFERENCE,),
    40: (SHAREGPT_RANKING, ALPACA_RANKING),
    55: (MESSAGES_RANKING,),
    75: (KTO, ALPACA_KTO),
    90: (SHAREGPT, ALPACA),
    91: (MESSAGES,),
}
