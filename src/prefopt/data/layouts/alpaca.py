"""Alpaca's layouts as LLaMA-Factory reads them: ``instruction`` and ``input`` are one turn of the user."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.data.layouts.holding import (
    CannotHold,
    best_first,
    need_chat,
    need_demonstration,
    need_label,
    need_one_turn,
    need_pair,
    score_columns,
)
from prefopt.data.layouts.layout import Layout
from prefopt.data.layouts.messages import write_tools
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import SCORES, no_whole_chats, scored_sides
from prefopt.data.layouts.sharegpt import ORIGIN, demonstrated
from prefopt.data.layouts.values import BadRow, items_of, kind
from prefopt.records import Comparison, Message

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


def _read_ranking(row: Row) -> Comparison:
    return row.pair(instructed(row), row.response("chosen"), row.response("rejected"))


def _write_ranking(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = (need_one_turn(side) for side in need_pair(c))
    return {**_columns(c), "chosen": chosen, "rejected": rejected, **score_columns(c)}


def _read_kto(row: Row) -> Comparison:
    labels = (row.label_of(row.given("label"), "label"),)
    return row.comparison(instructed(row), [row.response("output")], labels=labels)


def _write_kto(c: Comparison) -> dict[str, object]:
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
RANKING = Layout(
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
    reader=_read_ranking,
    writer=_write_ranking,
    arranged=best_first,
)
KTO = Layout(
    name="alpaca-kto",
    fields=("instruction", "output", "label"),
    optional=OPTIONAL,
    aliases={"kto_tag": "label"},
    words=WORDS,
    gives="labels",
    says="an instruction and a response that is desirable or not",
    origin=ORIGIN,
    example={**ASKED, "output": "4", "kto_tag": True},
    reader=_read_kto,
    writer=_write_kto,
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
