r"""Chat templates: a conversation as text, what a template leaves out of it, and reasoning inside of answers.

Templates run in the environment of transformers, so that training sees what ``tokenizer.apply_chat_template`` gives
for the finished model. Which input a template expects (content as text or as parts, a tool call's arguments as an
object or as text) is found by rendering probe conversations once.

>>> split_reasoning("<think>\n2 + 2\n</think>\n\n4"), split_reasoning("4")
(('2 + 2', '4'), ('', '4'))
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from prefopt.data.chat import sandbox, tracing
from prefopt.data.chat.render_options import Rendering, check_mentioned, check_names
from prefopt.data.chat.sandbox import LimitExceeded
from prefopt.data.chat.tracing import Traces
from prefopt.data.tokenizer import Tokenizer, plain_template
from prefopt.errors import ModelError, first_line
from prefopt.records import Message, ToolCall

Turns = tuple[Message, ...]
# Where templates look for reasoning. As in transformers, the first two are filled in together.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
RUNAWAYS = 3  # conversations that may exceed the sandbox's limits before the template itself is refused
OTHER_TEMPLATE = "give a template that does with --chat-template"
EARLIER_REASONING = "the chat template leaves out the reasoning of earlier answers"
_WORD, _OTHER, _PROBE = "prefoptword", "prefoptother", "prefoptshown"


class Unrenderable(Exception):
    """The template cannot render a conversation; the message says why in one line."""


class ChatTemplate:
    """The chat template of a tokenizer, or the one given in the options.

    ``plain``: there is none, and :func:`plain_template` is used. ``carried`` is the source to save with a trained
    model where it differs from the tokenizer's own; template variables are written into it as defaults. ``sources``
    are the templates for conversations without and with tools; most tokenizers have one for both.
    """

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering) -> None:
        """Raises :class:`ConfigError` for variables that the template never reads, ``ModelError`` for a broken one."""
        self.plain = rendering.chat_template is None and tokenizer.chat_template is None
        plain = plain_template(tokenizer, add_eos=rendering.add_eos) if self.plain else None
        given = plain or rendering.chat_template
        try:
            self.sources: tuple[str, str] = (
                tokenizer.get_chat_template(given),
                tokenizer.get_chat_template(given, tools=[]),
            )
        except ValueError as error:
            what = f"{first_line(error)}; give one with --chat-template"
            raise ModelError(f"{tokenizer.name_or_path}: {what}") from None
        if reason := next(filter(None, map(sandbox.syntax_error, self.sources)), ""):
            raise ModelError(f"{tokenizer.name_or_path}: the chat template is not valid Jinja: {reason}")
        self._fields = frozenset[str]().union(*map(sandbox.fields, self.sources))
        check_names(rendering.variables)
        check_mentioned(rendering.variables, frozenset[str]().union(*map(sandbox.variables, self.sources)))
        self.carried = given
        if rendering.variables and len(set(self.sources)) == 1:
            self.carried = with_defaults(self.sources[0], rendering.variables)
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._date, self._asked_date = datetime.datetime.fromisoformat(rendering.date), False
        self._given: dict[str, Any] = {"documents": None, "strftime_now": self._strftime, **special}
        self._given.update(rendering.variables)
        self._traced, self._traces, self._patience = None, Traces(), 0
        self._content_form = "text"
        if _WORD not in self.sample():
            self._content_form = "parts"
            self._content_form = "parts" if _WORD in self.sample() else "text"
        self._traced = tracing.compiled(self.sources[0])
        self._patience = RUNAWAYS

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template reads reasoning from a field of the message."""
        return not self._fields.isdisjoint(REASONING_FIELDS)

    @cached_property
    def shows_blocks(self) -> bool:
        """Whether ``<think>`` tags in the content stay text although reasoning in its field is formatted otherwise.

        Reasoning belongs into the field then: the tags are not part of the model's format.
        """
        if not self.reads_reasoning:
            return False
        question, block = Message("user", "q"), join_reasoning(_WORD, _OTHER)
        inline = self._try(question, Message("assistant", block))
        field = self._try(question, Message("assistant", _OTHER, reasoning=_WORD))
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

    def apply(self, turns: Turns, tools: Sequence[str] = (), *, generation: bool = False) -> str:
        """The turns as text, followed by the generation prompt if asked for. Raises :class:`Unrenderable`."""
        text = None if tools or self._traced is None else self._from_trace(turns, generation)
        if text is not None:
            return text
        template = sandbox.compiled(self.sources[bool(tools)])
        messages = [self._message(turn) for turn in turns]
        try:
            return self._render(template, messages, [_tool(tool) for tool in tools] or None, generation)
        except Exception as error:  # of any class: templates raise what they like
            # One conversation may exceed the limits; where several do, the template is at fault.
            self._patience -= isinstance(error, (LimitExceeded, MemoryError))
            if self._patience < 0:
                reason = f"the chat template never ends: {first_line(error)}; give another with --chat-template"
                raise ModelError(reason) from None
            raise Unrenderable(f"the template refuses the conversation: {first_line(error)}") from None

    def _from_trace(self, turns: Turns, generation: bool) -> str | None:
        """The turns as text if they hold nothing but words and the template has been traced for their roles."""
        roles = []
        for turn in turns:
            if turn.reasoning is not None or turn.tool_calls or turn.tool_call_id is not None or turn.name is not None:
                return None
            roles.append(turn.role)

        def render(words: Sequence[str]) -> str:
            messages = [{"role": r, "content": self._content(w)} for r, w in zip(roles, words, strict=True)]
            return self._render(self._traced, messages, None, generation)

        return self._traces.render((generation, *roles), [turn.content for turn in turns], render)

    def _render(self, template: Any, messages: list[dict[str, Any]], tools: Any, generation: bool) -> str:
        given = self._given
        return sandbox.render(template, messages=messages, tools=tools, add_generation_prompt=generation, **given)

    def sample(self) -> str:
        """One question as text; empty where the template refuses it."""
        return self._try(Message("user", _WORD))

    def _try(self, *turns: Message, tools: Sequence[str] = ()) -> str:
        try:
            return self.apply(turns, tools)
        except Unrenderable:
            return ""

    def _strftime(self, form: str) -> str:
        """One date for all rows of a run, in every process, also past midnight."""
        self._asked_date = True
        if len(form) > 1000:
            raise ValueError("the date format is longer than 1000 characters")
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
        """Whether a call's arguments are given as text, and whether a call without words has no content key."""
        call = ToolCall(_OTHER, json.dumps({"key": _WORD}), "prefoptid")
        question, answer = Message("user", "q"), Message("assistant", "", tool_calls=(call,))
        for form in ((False, False), (False, True), (True, False), (True, True)):
            self.__dict__["_call_form"] = form
            text = self._try(question, answer)
            printed_by_python = f"'{_WORD}'" in text and f'"{_WORD}"' not in text
            if _OTHER in text and _WORD in text and not printed_by_python:
                return form
        return (False, False)


def with_defaults(source: str, variables: Mapping[str, object]) -> str:
    """The template with default values for variables."""
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in variables.items()
    ]
    return "".join(lines) + source  # the environment of chat templates drops a line break behind a block


def _literal(value: object) -> str:
    """A plain value in Jinja's syntax."""
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


def conversation_shape(turns: Turns, tools: Sequence[str]) -> object:
    """What :func:`find_omission` depends on: the roles of the turns and what they hold, but not the words."""
    return bool(tools), tuple(
        [(m.role, not m.content or m.content.isspace(), m.reasoning is None, len(m.tool_calls)) for m in turns]
    )


def find_omission(template: ChatTemplate, turns: Turns, tools: Sequence[str]) -> str:
    """What the template leaves out of a conversation, found by rendering unique words in place of its own.

    Empty where it shows everything; :data:`EARLIER_REASONING`, the design of many thinking models, is no reason to
    refuse the row, everything else is.
    """
    probes, reasoning, required = [], [], dict[str, str]()
    for i, turn in enumerate(turns):
        content, thought = turn.content, None
        if content.strip():
            content = f"{_PROBE}c{i}x"
            required[content] = f"the {turn.role} turn"
        if turn.reasoning is not None:
            thought = f"{_PROBE}r{i}x"
            reasoning.append(thought)
        calls = tuple(replace(call, name=f"{_PROBE}t{i}n{k}x") for k, call in enumerate(turn.tool_calls))
        required.update(dict.fromkeys((call.name for call in calls), "a tool call"))
        probes.append(replace(turn, content=content, reasoning=thought, tool_calls=calls))
    functions = []
    for k, tool in enumerate(tools):
        name = f"{_PROBE}f{k}x"
        functions.append(_renamed(tool, name))
        if name in functions[-1]:
            required[name] = "the tools"
    try:
        text = template.apply(tuple(probes), functions)
    except Unrenderable:
        return ""  # it may check names or words; whether it accepts the row itself is seen on rendering that
    missing = list(dict.fromkeys(what for probe, what in required.items() if probe not in text))
    if missing:
        return f"the template does not show {' and '.join(missing)} of the row; {OTHER_TEMPLATE}"
    dropped = [probe for probe in reasoning if probe not in text]
    if dropped and dropped[-1] == reasoning[-1] and turns[-1].reasoning is not None:
        return f"the template does not show the reasoning of the answer; use --reasoning strip, or {OTHER_TEMPLATE}"
    return EARLIER_REASONING if dropped else ""


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


_BLOCK = re.compile(r"\s*<(think|thinking)>(.*?)</\1>\s*", re.DOTALL)
# What is sampled behind a generation prompt that opens the block has no opening tag of its own.
_OPENED = re.compile(r"((?:(?!<think>).)*?)(?:^|\n)</think>[^\S\n]*\n\s*", re.DOTALL)
_UNCLOSED = re.compile(r"\s*<(think|thinking)>(?!.*</\1>)", re.DOTALL)


def split_reasoning(content: str) -> tuple[str, str]:
    """Split a text into the reasoning block at its start, stripped, and the answer behind it.

    A block is ``<think>...</think>`` or ``<thinking>...</thinking>``; the opening tag may be missing where the closing
    one has a line of its own. A block that is never closed leaves no answer.
    """
    if match := _BLOCK.match(content):
        return match[2].strip(), content[match.end() :]
    if match := _UNCLOSED.match(content):
        return content[match.end() :].strip(), ""
    if "</think>" in content and (match := _OPENED.match(content)):
        return match[1].strip(), content[match.end() :]
    return "", content


def join_reasoning(reasoning: str, content: str) -> str:
    """Reasoning and answer as one text, in the format of most thinking models."""
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def field_reasoning(turn: Message) -> Message:
    """Move the closed reasoning blocks at the start of an answer into its field; the same object where it has none.

    The first may lack its opening tag, as in :func:`split_reasoning`.
    """
    if turn.role != "assistant" or turn.reasoning or not _has_tag(turn.content):
        return turn
    found, content = [], turn.content
    while match := _BLOCK.match(content):
        found.append(match[2].strip())
        content = content[match.end() :]
    if not found and not _UNCLOSED.match(content) and (match := _OPENED.match(content)):
        found, content = [match[1].strip()], content[match.end() :]
    return replace(turn, reasoning="\n\n".join(filter(None, found)) or None, content=content) if found else turn


def inline_reasoning(turn: Message) -> bool:
    """Whether the text of an answer begins with reasoning, closed or not."""
    return turn.role == "assistant" and _has_tag(turn.content) and split_reasoning(turn.content)[1] != turn.content


def strip_reasoning(turn: Message) -> Message:
    """The turn without its reasoning; the same object where it has none."""
    if turn.role != "assistant" or (turn.reasoning is None and not _has_tag(turn.content)):
        return turn
    _, content = split_reasoning(turn.content)
    same = turn.reasoning is None and content == turn.content
    return turn if same else replace(turn, reasoning=None, content=content)


def _has_tag(content: str) -> bool:
    return "<think" in content or "</think>" in content
