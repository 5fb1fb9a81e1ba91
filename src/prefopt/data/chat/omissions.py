"""What a chat template leaves out of a conversation, found by rendering unique words in place of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt.data.chat.template import OTHER_TEMPLATE, ChatTemplate, Turns, Unrenderable

PROBE = "prefoptshown"


@dataclass(frozen=True, slots=True)
class Omission:
    """What a template leaves out of a conversation: a reason to refuse it, and the turns whose reasoning it drops."""

    refused: str = ""
    reasoning: tuple[int, ...] = ()


def find_omission(template: ChatTemplate, turns: Turns, tools: Sequence[str]) -> Omission:
    """What the template leaves out of a conversation, found by rendering unique words in place of its own.

    Dropped reasoning of earlier turns, the design of many thinking models, is no reason to refuse the row.
    """
    probes, reasoning, required = [], dict[str, int](), dict[str, str]()
    for i, turn in enumerate(turns):
        content, thought = turn.content, None
        if content.strip():
            content = f"{PROBE}c{i}x"
            required[content] = f"the {turn.role} turn"
        if turn.reasoning is not None:
            thought = f"{PROBE}r{i}x"
            reasoning[thought] = i
        calls = tuple(replace(call, name=f"{PROBE}t{i}n{k}x") for k, call in enumerate(turn.tool_calls))
        required.update(dict.fromkeys((call.name for call in calls), "a tool call"))
        probes.append(replace(turn, content=content, reasoning=thought, tool_calls=calls))
    functions = []
    for k, tool in enumerate(tools):
        name = f"{PROBE}f{k}x"
        functions.append(_renamed(tool, name))
        if name in functions[-1]:
            required[name] = "the tools"
    try:
        text = template.apply(tuple(probes), functions)
    except Unrenderable:
        return Omission()  # it may check names or words; whether it accepts the row itself is seen on rendering that
    missing = list(dict.fromkeys(what for probe, what in required.items() if probe not in text))
    if missing:
        return Omission(f"the template does not show {' and '.join(missing)} of the row; {OTHER_TEMPLATE}")
    return Omission(reasoning=tuple(i for probe, i in reasoning.items() if probe not in text))


def _renamed(tool: str, name: str) -> str:
    """The tool, a JSON object as text, under another name; unchanged where it has none."""
    try:
        value = json.loads(tool)
    except ValueError:
        return tool
    function = value.get("function", value) if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        function["name"] = name
    return json.dumps(value)
