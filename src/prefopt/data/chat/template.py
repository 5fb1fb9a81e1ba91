"""Chat templates: given turns as they expect them, refusing in one line.

They run in the environment of transformers, so that what is trained is what ``tokenizer.apply_chat_template`` shows the
finished model. How a template wants to be given some things (content as text or in parts, a tool call's arguments as
an object or as text) is found out by asking it for turns made up on the spot, once and whatever the rows.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from prefopt.data.chat import sandbox, tracing
from prefopt.data.chat.reasoning import join_reasoning
from prefopt.data.chat.render_options import Rendering, check_mentioned, check_names
from prefopt.data.chat.sandbox import TooMuch
from prefopt.data.chat.tracing import Traces
from prefopt.data.tokenizer import Tokenizer, plain_template
from prefopt.errors import ModelError, first_line
from prefopt.records import Message, ToolCall

Turns = tuple[Message, ...]
# Where templates look for reasoning. As in transformers, the first two are filled in together.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Conversations for which a template may run out of bounds before it is given up.
ENDLESS = 3
_WORD, _OTHER = "prefoptword", "prefoptother"


class Unrenderable(Exception):
    """The template cannot show a conversation; the message says why, in one line."""


class ChatTemplate:
    """The template that a tokenizer and the options give.

    ``plain`` says that there is none and :func:`plain_template` stands in for it. ``carried`` is the source that a
    trained model should carry, where that is not the tokenizer's own: variables are its defaults there, so that whoever
    uses the model sees what it was trained on.
    """

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering) -> None:
        """Raises :class:`ConfigError` for variables that the template never reads, ``ModelError`` for a broken one."""
        self.plain = rendering.chat_template is None and tokenizer.chat_template is None
        plain = plain_template(tokenizer, add_eos=rendering.add_eos) if self.plain else None
        given = plain or rendering.chat_template
        try:
            self.text: str = tokenizer.get_chat_template(given)
            self._with_tools: str = tokenizer.get_chat_template(given, tools=[])
        except ValueError as error:
            what = f"{first_line(error)}; give one with --chat-template"
            raise ModelError(f"{tokenizer.name_or_path}: {what}") from None
        sources = {self.text, self._with_tools}
        if reason := next(filter(None, map(sandbox.syntax_error, sources)), ""):
            raise ModelError(f"{tokenizer.name_or_path}: the chat template is no Jinja: {reason}")
        self._fields = frozenset[str]().union(*map(sandbox.fields, sources))
        check_names(rendering.variables)
        check_mentioned(rendering.variables, frozenset[str]().union(*map(sandbox.variables, sources)))
        self.carried = given
        if rendering.variables and self.text == self._with_tools:
            self.carried = with_defaults(self.text, rendering.variables)
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._date, self._asked_date = datetime.datetime.fromisoformat(rendering.date), False
        self._given: dict[str, Any] = {"documents": None, "strftime_now": self._strftime, **special}
        self._given.update(rendering.variables)
        self._traced, self._traces, self._patience = None, Traces(), 0
        self._content_form = "text"
        if _WORD not in self.sample():
            self._content_form = "parts"
            self._content_form = "parts" if _WORD in self.sample() else "text"
        self._traced = tracing.compiled(self.text)
        self._patience = ENDLESS

    @property
    def sources(self) -> tuple[str, str]:
        """The source for conversations without tools, and for those with tools (most tokenizers have one for both)."""
        return self.text, self._with_tools

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template takes reasoning from a field of its own."""
        return not self._fields.isdisjoint(REASONING_FIELDS)

    @cached_property
    def shows_blocks(self) -> bool:
        """Whether reasoning inside of the text is shown as it stands, though reasoning in its field is shown otherwise.

        What a model of such a template thinks belongs into the field: the tags in the text are none of its format.
        """
        if not self.reads_reasoning:
            return False
        asked, block = Message("user", "q"), join_reasoning(_WORD, _OTHER)
        inline = self._try(asked, Message("assistant", block))
        field = self._try(asked, Message("assistant", _OTHER, reasoning=_WORD))
        return block in inline and _WORD in field and _OTHER in field and f"<think>\n{_WORD}" not in field

    @cached_property
    def reads_date(self) -> bool:
        """Whether the text changes with the day it is rendered on."""
        if not any("strftime_now" in sandbox.names(source) for source in self.sources):
            return False
        for tools in ((), ('{"name": "f"}',)):
            self._try(Message("user", _WORD), tools=tools)
            self._try(Message("system", _WORD), Message("user", _WORD), tools=tools)
        return self._asked_date

    def show(self, turns: Turns, tools: Sequence[str] = (), *, generation: bool = False) -> str:
        """The turns as text, with the generation prompt behind them if asked. Raises :class:`Unrenderable`."""
        text = None if tools or self._traced is None else self._known(turns, generation)
        if text is not None:
            return text
        template = sandbox.compiled(self._with_tools if tools else self.text)
        messages = [self._message(turn) for turn in turns]
        try:
            return self._render(template, messages, [_tool(tool) for tool in tools] or None, generation)
        except Exception as error:  # of whatever class: a template may do what it likes to its turns
            self._note_endless(error)
            raise Unrenderable(f"the template refuses the conversation: {first_line(error)}") from None

    def _note_endless(self, error: Exception) -> None:
        """One conversation may be too much for a template; where several are, the template is at fault."""
        self._patience -= isinstance(error, (TooMuch, MemoryError))
        if self._patience < 0:
            raise ModelError(f"the chat template has no end: {first_line(error)}; give another with --chat-template")

    def _known(self, turns: Turns, generation: bool) -> str | None:
        """The turns as text, if words are all they hold and the template has shown what it does with them."""
        roles = []
        for turn in turns:
            if turn.reasoning is not None or turn.tool_calls or turn.tool_call_id is not None or turn.name is not None:
                return None
            roles.append(turn.role)

        def render(words: Sequence[str]) -> str:
            messages = [{"role": r, "content": self._content(w)} for r, w in zip(roles, words, strict=True)]
            return self._render(self._traced, messages, None, generation)

        return self._traces.show((generation, *roles), [turn.content for turn in turns], render)

    def _render(self, template: Any, messages: list[dict[str, Any]], tools: Any, generation: bool) -> str:
        given = self._given
        return sandbox.render(template, messages=messages, tools=tools, add_generation_prompt=generation, **given)

    def sample(self) -> str:
        """What the template makes of one question; nothing where it refuses that."""
        return self._try(Message("user", _WORD))

    def _try(self, *turns: Message, tools: Sequence[str] = ()) -> str:
        """The turns as text, or nothing where the template refuses them."""
        try:
            return self.show(turns, tools)
        except Unrenderable:
            return ""

    def _strftime(self, form: str) -> str:
        """One date for all rows of a run, in every process, also past midnight."""
        self._asked_date = True
        if len(form) > 1000:
            raise ValueError("the form of a date is longer than any date")
        return self._date.strftime(form)

    def _message(self, turn: Message) -> dict[str, Any]:
        content = turn.content
        message: dict[str, Any] = {"role": turn.role}
        if turn.reasoning is not None and self.reads_reasoning:
            known = not self._fields.isdisjoint(REASONING_FIELDS[:2])
            message.update(dict.fromkeys(REASONING_FIELDS[:2] if known else REASONING_FIELDS[2:], turn.reasoning))
        elif turn.reasoning is not None:
            content = join_reasoning(turn.reasoning, content)
        if turn.tool_calls:
            as_text, bare = self._call_form
            message["tool_calls"] = [_call(call, as_text) for call in turn.tool_calls]
        if content or not turn.tool_calls or not bare:
            message["content"] = self._content(content)
        if turn.tool_call_id is not None:
            message["tool_call_id"] = turn.tool_call_id
        if turn.name is not None:
            message["name"] = turn.name
        return message

    def _content(self, words: str) -> str | list[dict[str, str]]:
        return words if self._content_form == "text" else [{"type": "text", "text": words}]

    @cached_property
    def _call_form(self) -> tuple[bool, bool]:
        """Whether a call's arguments are wanted as text, and whether a call without words is to have no content."""
        call = ToolCall(_OTHER, json.dumps({"key": _WORD}), "prefoptid")
        asked, answer = Message("user", "q"), Message("assistant", "", tool_calls=(call,))
        for form in ((False, False), (False, True), (True, False), (True, True)):
            self.__dict__["_call_form"] = form
            text = self._try(asked, answer)
            printed_by_python = f"'{_WORD}'" in text and f'"{_WORD}"' not in text
            if _OTHER in text and _WORD in text and not printed_by_python:
                return form
        return (False, False)


def with_defaults(source: str, variables: Mapping[str, object]) -> str:
    """The template with values for variables that it is not given."""
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in variables.items()
    ]
    return "".join(lines) + source  # the environment of chat templates drops a line break behind a block


def _literal(value: object) -> str:
    """A plain value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def _call(call: ToolCall, as_text: bool) -> dict[str, Any]:
    try:
        arguments = call.arguments if as_text else json.loads(call.arguments)
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
