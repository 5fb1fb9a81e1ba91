"""Alpaca's layouts as LLaMA-Factory reads them: ``instruction`` and ``input`` are one turn of the user."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefopt.data.layouts.layout import (
    CannotHold,
    Layout,
    best_first,
    need_chat,
    need_demonstration,
    need_label,
    need_no_preference,
    need_one_turn,
    need_pair,
    score_columns,
)
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, no_whole_chats, replies, scored_sides, weighted
from prefopt.data.layouts.trl import first_answer, last_answer, split_turns
from prefopt.data.layouts.values import BadRow, items_of, kind
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


SHAREGPT_RANKING = Layout(
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
SHAREGPT_KTO = Layout(
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


OPTIONAL = ("input", "system", "history", "tools")
WORDS = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "label"}


def instructed(row: Row) -> tuple[Message, ...]:
    """The prompt: system, earlier turns, and instruction and input on lines of their own."""
    turns: list[Message] = []
    for old in row.items("history") if row.has("history") else ():
        pair = items_of(old, "an item of history")
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            held = ", ".join(kind(text) for text in pair) or "nothing"
            raise BadRow("wrong type", f"an item of history holds {held}, not what was asked and what was answered")
        turns += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
    asked = [text for text in (row.text("instruction"), row.text_or("input")) if text]
    return row.with_system((*turns, Message("user", "\n".join(asked))))


def _columns(c: Comparison) -> dict[str, object]:
    """The columns that hold the prompt."""
    need_chat(c)
    turns = c.prompt
    system = {}
    if turns and turns[0].role == "system":
        system, turns = {"system": turns[0].content}, turns[1:]
    return {**_asked(turns), **system, **write_tools(c.tools)}


def _asked(turns: Sequence[Message]) -> dict[str, object]:
    roles = [m.role for m in turns]
    if len(turns) % 2 == 0 or roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise CannotHold("prompts whose turns are not the user's and the assistant's by turns")
    pairs = [[turns[i].content, turns[i + 1].content] for i in range(0, len(turns) - 1, 2)]
    return {"instruction": turns[-1].content, **({"history": pairs} if pairs else {})}


def _read_alpaca_ranking(row: Row) -> Comparison:
    return row.pair(instructed(row), row.response("chosen"), row.response("rejected"))


def _write_alpaca_ranking(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = (need_one_turn(side) for side in need_pair(c))
    return {**_columns(c), "chosen": chosen, "rejected": rejected, **score_columns(c)}


def _read_alpaca_kto(row: Row) -> Comparison:
    labels = (row.label_of(row.given("label"), "label"),)
    return row.comparison(instructed(row), [row.response("output")], labels=labels)


def _write_alpaca_kto(c: Comparison) -> dict[str, object]:
    need_chat(c)
    response, label = need_label(c)
    return {**_columns(c), "output": need_one_turn(response), "label": label}


def _read_demonstration(row: Row) -> Comparison:
    """Earlier answers are learned too, as LLaMA-Factory learns them."""
    return demonstrated(row, (*instructed(row), Message("assistant", row.text("output"))))


def _write_demonstration(c: Comparison) -> dict[str, object]:
    need_chat(c)
    turns = need_demonstration(c).messages
    if not turns or turns[-1].role != "assistant":
        raise CannotHold("responses that do not end with the assistant's turn")
    system = {"system": c.prompt[0].content} if c.prompt and c.prompt[0].role == "system" else {}
    asked = _asked((*c.prompt[len(system) :], *turns[:-1]))
    return {**asked, "output": turns[-1].content, **system, **write_tools(c.tools)}


ASKED = {"instruction": "Add the numbers.", "input": "2 and 2"}
ALPACA_RANKING = Layout(
    name="alpaca-ranking",
    fields=("instruction", "chosen", "rejected"),
    optional=(*OPTIONAL, *SCORES),
    reads=scored_sides,
    shape=no_whole_chats,
    aliases={"question": "instruction"},
    words=WORDS,
    gives="pairs",
    says="an instruction and two responses to it",
    origin=ORIGIN,
    example={**ASKED, "chosen": "4", "rejected": "22"},
    reader=_read_alpaca_ranking,
    writer=_write_alpaca_ranking,
    arranged=best_first,
)
ALPACA_KTO = Layout(
    name="alpaca-kto",
    fields=("instruction", "output", "label"),
    optional=OPTIONAL,
    aliases={"kto_tag": "label"},
    words=WORDS,
    gives="labels",
    says="an instruction and a response that is desirable or not",
    origin=ORIGIN,
    example={**ASKED, "output": "4", "kto_tag": True},
    reader=_read_alpaca_kto,
    writer=_write_alpaca_kto,
)
DEMONSTRATION = Layout(
    name="alpaca",
    fields=("instruction", "output"),
    optional=OPTIONAL,
    words=WORDS,
    gives="demonstrations",
    says="an instruction and a response to learn",
    origin="Stanford Alpaca, LLaMA-Factory",
    example={**ASKED, "output": "4"},
    reader=_read_demonstration,
    writer=_write_demonstration,
)


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


V1_PAIR = Layout(
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
V1_MESSAGES = Layout(
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
