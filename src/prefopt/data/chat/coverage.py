"""Whether a chat template shows all that a row holds: what it leaves out would be trained away without a word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt.data.chat.template import ChatTemplate, Turns, Unrenderable
from prefopt.records import Message, ToolCall

OTHER_TEMPLATE = "name a template that does with --chat-template"
_PROBE = "prefoptshown"


@dataclass(frozen=True, slots=True)
class Hidden:
    """``problem`` says what a template leaves out and must not; ``earlier_reasoning`` that it drops that of turns
    before the last, as templates do whose models do not look back at it."""

    problem: str = ""
    earlier_reasoning: bool = False


def shape(turns: Turns, tools: Sequence[str]) -> object:
    """What :func:`hidden` depends on: whose turns they are and what they hold, but not the words."""
    return bool(tools), tuple(
        [(m.role, not m.content or m.content.isspace(), m.reasoning is None, len(m.tool_calls)) for m in turns]
    )


def hidden(template: ChatTemplate, turns: Turns, tools: Sequence[str]) -> Hidden:
    """What the template leaves out of a conversation, found by giving it other words that are easily told apart."""
    probed, wanted = [], dict[str, str]()
    reasoning = []
    for i, turn in enumerate(turns):
        changed = {}
        if turn.content.strip():
            changed["content"] = mark = f"{_PROBE}c{i}x"
            wanted[mark] = f"the {turn.role} turn"
        if turn.reasoning is not None:
            changed["reasoning"] = mark = f"{_PROBE}r{i}x"
            reasoning.append(mark)
        calls = [replace(call, name=f"{_PROBE}t{i}n{k}x") for k, call in enumerate(turn.tool_calls)]
        wanted.update(dict.fromkeys((call.name for call in calls), "a tool call"))
        probed.append(_changed(turn, changed, calls))
    functions = []
    for k, tool in enumerate(tools):
        name = f"{_PROBE}f{k}x"
        functions.append(_renamed(tool, name))
        if name in functions[-1]:
            wanted[name] = "the tools"
    try:
        text = template.show(tuple(probed), functions)
    except Unrenderable:
        return Hidden()  # it may check names or words; whether it takes the row itself is seen when that is rendered
    missing = list(dict.fromkeys(what for mark, what in wanted.items() if mark not in text))
    if missing:
        return Hidden(f"the template does not show {' and '.join(missing)} of the row; {OTHER_TEMPLATE}")
    gone = [mark for mark in reasoning if mark not in text]
    if reasoning and reasoning[-1] in gone and turns[-1].reasoning is not None:
        return Hidden(f"the template does not show the reasoning of the answer; --reasoning strip, or {OTHER_TEMPLATE}")
    return Hidden(earlier_reasoning=bool(gone))


def _changed(turn: Message, changed: dict[str, str], calls: list[ToolCall]) -> Message:
    return Message(
        turn.role,
        changed.get("content", turn.content),
        changed.get("reasoning"),
        tuple(calls),
        turn.tool_call_id,
        turn.name,
        turn.trained,
    )


def _renamed(tool: str, name: str) -> str:
    """The tool, a JSON object as text, under another name; as it is where it has none."""
    try:
        value = json.loads(tool)
    except ValueError:
        return tool
    function = value.get("function", value) if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        function["name"] = name
    return json.dumps(value)
