"""Chat templates: given turns as they expect them, refusing in one line.

They run in the environment of transformers, so that what is trained is what ``tokenizer.apply_chat_template`` shows the
finished model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from prefopt.data import jinja
from prefopt.data.rendering import Rendering, check_mentioned, check_names
from prefopt.data.tokenizer import Tokenizer, plain_template
from prefopt.errors import ModelError
from prefopt.records import Message, ToolCall

Turns = tuple[Message, ...]
# Where templates look for reasoning. As in transformers, the first two are filled in together.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class Unrenderable(Exception):
    """The template cannot show a conversation; the message says why, in one line."""


class ChatTemplate:
    """The template that a tokenizer and the options give.

    ``plain`` says that there is none and :func:`plain_template` stands in for it. ``carried`` is the source that a
    trained model should carry, where that is not the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering) -> None:
        """Raises :class:`ConfigError` for variables that the template never reads, ``ModelError`` for a broken one."""
        self.plain = rendering.chat_template is None and tokenizer.chat_template is None
        plain = plain_template(tokenizer, add_eos=rendering.add_eos) if self.plain else None
        self.carried = plain or rendering.chat_template
        try:
            self.text: str = tokenizer.get_chat_template(self.carried)
            self._with_tools: str = tokenizer.get_chat_template(self.carried, tools=[])
        except ValueError as error:
            what = f"{jinja.one_line(error)}; give one with --chat-template"
            raise ModelError(f"{tokenizer.name_or_path}: {what}") from None
        sources = {self.text, self._with_tools}
        if reason := next(filter(None, map(jinja.syntax_error, sources)), ""):
            raise ModelError(f"{tokenizer.name_or_path}: the chat template is no Jinja: {reason}")
        self._fields = frozenset[str]().union(*map(jinja.fields, sources))
        self.reads_date = any("strftime_now" in jinja.names(s) for s in sources)
        check_names(rendering.variables)
        check_mentioned(rendering.variables, frozenset[str]().union(*map(jinja.variables, sources)))
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._given: dict[str, Any] = {**special, **rendering.variables}

    @property
    def sources(self) -> tuple[str, str]:
        """The source for conversations without tools, and for those with tools (most tokenizers have one for both)."""
        return self.text, self._with_tools

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template takes reasoning from a field of its own."""
        return not self._fields.isdisjoint(REASONING_FIELDS)

    def show(self, turns: Turns, tools: Sequence[str] = (), *, generation: bool = False) -> str:
        """The turns as text, with the generation prompt behind them if asked. Raises :class:`Unrenderable`."""
        template = jinja.compiled(self._with_tools if tools else self.text)
        try:
            text = template.render(
                messages=[self._message(turn) for turn in turns],
                tools=[_tool(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=generation,
                **self._given,
            )
        except _REFUSALS as error:
            raise Unrenderable(f"the template refuses the conversation: {jinja.one_line(error)}") from None
        return str(text)

    def _message(self, turn: Message) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning is not None and self.reads_reasoning:
            known = not self._fields.isdisjoint(REASONING_FIELDS[:2])
            message.update(dict.fromkeys(REASONING_FIELDS[:2] if known else REASONING_FIELDS[2:], turn.reasoning))
        elif turn.reasoning is not None:
            message["content"] = inline_reasoning(turn.reasoning, turn.content)
        if turn.tool_calls:
            message["tool_calls"] = [_call(call) for call in turn.tool_calls]
        if turn.tool_call_id is not None:
            message["tool_call_id"] = turn.tool_call_id
        if turn.name is not None:
            message["name"] = turn.name
        return message


def inline_reasoning(reasoning: str, content: str) -> str:
    """Reasoning and answer as one text, the way most thinking models write them."""
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    known = {} if call.id is None else {"id": call.id}
    return {"type": "function", **known, "function": {"name": call.name, "arguments": arguments}}


@lru_cache(maxsize=1024)
def _tool(text: str) -> dict[str, Any]:
    """A tool as templates expect it: ``{"type": "function", "function": {"name": ...}}``; a bare one is wrapped."""
    try:
        tool = json.loads(text)
    except ValueError:
        raise Unrenderable(f"a tool is not JSON: {text[:60]!r}") from None
    if not isinstance(tool, dict):
        raise Unrenderable(f"a tool is not a JSON object: {text[:60]!r}")
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
