r"""Chat templates: rendering options, a conversation as text, and reasoning inside answers.

Templates run in the environment of transformers, as in ``tokenizer.apply_chat_template``. Which input a template
expects (content as text or as parts, a tool call's arguments as an object or as text) is found by rendering probes.

>>> split_reasoning("<think>\n2 + 2\n</think>\n\n4"), split_reasoning("4")
(('2 + 2', '4'), ('', '4'))
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from prefopt.config.data import CompareOptions, RenderOptions
from prefopt.core.options import nearest
from prefopt.data.chat import sandbox, tracing
from prefopt.data.chat.pictures import parts_of
from prefopt.data.chat.sandbox import LimitExceeded
from prefopt.data.tokenizer import Tokenizer, plain_template
from prefopt.errors import ConfigError, ModelError, first_line
from prefopt.records import Message, ToolCall

Turns = tuple[Message, ...]
EarlierTurns = Literal["auto", "as-generated", "as-shown"]
# Where templates look for reasoning. As in transformers, the first two are filled in together.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
RUNAWAYS = 3  # conversations that may exceed the sandbox's limits before the template itself is refused
OTHER_TEMPLATE = "give a template that does with --chat-template"
EARLIER_REASONING = "the chat template leaves out the reasoning of earlier answers"
_WORD, _OTHER = "prefoptword", "prefoptother"
# Template variables that rendering itself sets.
FILLED_IN = (
    *("messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("bos_token", "eos_token", "pad_token", "unk_token"),
)
_PYTHON_SPELLING = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True)
class Rendering:
    """Everything beside the tokenizer and the rows that determines the tokens, as plain values.

    ``max_length`` bounds prompt and response together. ``add_eos`` ends answers with EOS where the template does not.
    ``chat_template`` is the source of a template to use instead of the tokenizer's; ``variables`` are passed to either.
    ``reasoning``: whether reasoning blocks of the assistant are kept or stripped. ``earlier_turns``: a turn of a
    response that the template shows otherwise once another follows is trained as it was generated, in a step of its
    own, or as the finished conversation shows it; ``auto``: as shown, unless something of the turn's own is lost there.
    ``compare``: whole responses, or each turn of them that
    is judged by itself. ``train_on``: the answers, or every
    token. ``windows``: a text without a prompt that is too long becomes several groups of about equal length; other
    rows are truncated. ``date`` is shown by templates that ask for today's: one for all processes of a run.
    """

    max_length: int | None = None
    add_eos: bool = True
    chat_template: str | None = None
    variables: Mapping[str, object] = field(default_factory=dict, hash=False)
    reasoning: Literal["keep", "strip"] = "keep"
    earlier_turns: EarlierTurns = "auto"
    compare: Literal["responses", "steps"] = "responses"
    train_on: Literal["responses", "all"] = "responses"
    windows: bool = False
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for a length under 2 and for variables that are not plain values."""
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"--max-length {self.max_length} is too small; it should be at least 2 tokens")
        try:
            json.dumps(dict(self.variables), allow_nan=False)
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError) as error:
            what = f"rendering takes plain values, as in JSON, and a date such as 2026-11-23: {error}"
            raise ConfigError(what) from None

    @classmethod
    def from_options(cls, options: RenderOptions, max_length: int | None = None, **more: Any) -> Rendering:
        """The options of a run; ``more`` are further fields. Raises :class:`ConfigError` as :func:`read_template` and
        :func:`parse_variables`; :class:`ChatTemplate` checks whether the template reads the variables."""
        template = None if options.chat_template is None else read_template(options.chat_template)
        variables = parse_variables(options.template_variables or ())
        compare = options.compare if isinstance(options, CompareOptions) else "responses"
        return cls(max_length, True, template, variables, options.reasoning, options.earlier_turns, compare, **more)


def read_template(path: str) -> str:
    """The text of a chat template: a Jinja file, or the ``chat_template`` of a ``tokenizer_config.json``.

    Raises :class:`ConfigError` in one line for a file that cannot be read and for a syntax error, with its line.
    """
    name = f"--chat-template {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    except OSError as error:
        what = "is a folder; name the file in it" if Path(path).is_dir() else f"{error.strerror}; check the path"
        raise ConfigError(f"{name}: {what}") from None
    if path.endswith(".json"):
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}: is not JSON: {error}") from None
        if not isinstance(config, dict) or not isinstance(config.get("chat_template"), str):
            what = "holds no text chat_template, as a tokenizer_config.json does; give a Jinja file"
            raise ConfigError(f"{name}: {what}")
        text = config["chat_template"]
    if not text.strip():
        raise ConfigError(f"{name}: is empty; it should hold a Jinja template")
    if reason := sandbox.syntax_error(text):
        raise ConfigError(f"{name}: is not a valid Jinja template: {reason}")
    return text


def parse_variables(given: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE as a dict; a value is read as JSON if it is JSON, else as text. ``True``, ``False``, ``None`` too.

    >>> parse_variables(["enable_thinking=false", "date_string=26 Jul 2024"])
    {'enable_thinking': False, 'date_string': '26 Jul 2024'}

    Raises :class:`ConfigError` for an entry without a name, a name given twice, and names that rendering sets.
    """
    variables: dict[str, object] = {}
    for item in given:
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ConfigError(f"--template-variables {item!r} should be NAME=VALUE, such as enable_thinking=false")
        if name in variables:
            raise ConfigError(f"--template-variables gives {name} twice; leave one out")
        variables[name] = value.strip()
        with suppress(ValueError, RecursionError):
            # int refuses NaN and Infinity, which JSON lacks.
            spelling = _PYTHON_SPELLING.get(value.strip(), value)
            variables[name] = json.loads(spelling, parse_constant=int)
    _check_variables(variables)
    return variables


def _check_variables(variables: Mapping[str, object], mentioned: set[str] | None = None) -> None:
    """Raise :class:`ConfigError` for a variable that rendering itself sets, or that the template never mentions."""
    known = sorted((mentioned or set()) - set(FILLED_IN))
    for name in variables:
        if name in FILLED_IN:
            raise ConfigError(f"--template-variables: {name} is filled in by prefopt; leave it out")
        if mentioned is not None and name not in mentioned:
            rest = nearest(name, known) or (f"; it reads {', '.join(known)}" if known else "; it reads none")
            raise ConfigError(f"--template-variables: the chat template never reads {name}{rest}")


class Unrenderable(Exception):
    """The template cannot render a conversation, for the reason in the message."""


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
            without, with_tools = tokenizer.get_chat_template(given), tokenizer.get_chat_template(given, tools=[])
        except ValueError as error:
            what = f"{first_line(error)}; give one with --chat-template"
            raise ModelError(f"{tokenizer.name_or_path}: {what}") from None
        self.sources: tuple[str, str] = (without, with_tools)
        if reason := next(filter(None, map(sandbox.syntax_error, self.sources)), ""):
            raise ModelError(f"{tokenizer.name_or_path}: the chat template is not valid Jinja: {reason}")
        mentioned = [sandbox.mentioned(source) for source in self.sources]
        self._fields = set[str]().union(*(fields for _, fields in mentioned))
        # Whether the template reads reasoning from a field of the message.
        self.reads_reasoning = not self._fields.isdisjoint(REASONING_FIELDS)
        _check_variables(rendering.variables, set[str]().union(*(variables for variables, _ in mentioned)))
        self.carried = given
        if rendering.variables and len(set(self.sources)) == 1:
            # The environment of chat templates drops a line break behind a block.
            default = "{{% if {0} is not defined %}}{{% set {0} = {1} %}}{{% endif %}}\n"
            defaults = "".join(default.format(name, _literal(x)) for name, x in rendering.variables.items())
            self.carried = defaults + self.sources[0]
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._date, self._asked_date = datetime.datetime.fromisoformat(rendering.date), False
        known = {"documents": None, "strftime_now": self._strftime, **special}
        self._given: dict[str, Any] = {**known, **rendering.variables}
        self._traces: dict[object, tracing.Trace | None] = {}
        self._traced, self._patience = None, 0
        self._in_parts = False
        if _WORD not in self.sample():
            self._in_parts = True
            self._in_parts = _WORD in self.sample()
        self._traced = tracing.compiled(self.sources[0])
        self._patience = RUNAWAYS

    @cached_property
    def shows_blocks(self) -> bool:
        """Whether ``<think>`` tags in the content stay text although reasoning in its field is formatted otherwise."""
        if not self.reads_reasoning:
            return False
        question, block = Message("user", "q"), join_reasoning(_WORD, _OTHER)
        inline = self._try(question, Message("assistant", block))
        apart = self._try(question, Message("assistant", _OTHER, reasoning=_WORD))
        return block in inline and _WORD in apart and _OTHER in apart and f"<think>\n{_WORD}" not in apart

    @cached_property
    def reads_date(self) -> bool:
        """Whether the text changes with the day it is rendered on."""
        if not any("strftime_now" in source for source in self.sources):
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
        if any(
            m.reasoning is not None or m.tool_calls or m.tool_call_id is not None or m.name is not None or m.pictures
            for m in turns
        ):
            return None
        roles = [turn.role for turn in turns]

        def render(words: Sequence[str]) -> str:
            messages = [{"role": r, "content": self._content(w)} for r, w in zip(roles, words, strict=True)]
            return self._render(self._traced, messages, None, generation)

        return tracing.from_trace(self._traces, (generation, *roles), [turn.content for turn in turns], render)

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
        """One date for all rows of a run, also past midnight."""
        self._asked_date = True
        if len(form) > 1000:
            raise ValueError("the date format is longer than 1000 characters")
        return self._date.strftime(form)

    def _message(self, turn: Message) -> dict[str, Any]:
        content = turn.content
        message: dict[str, Any] = {"role": turn.role}
        if turn.reasoning is not None and self.reads_reasoning:
            both = not self._fields.isdisjoint(REASONING_FIELDS[:2])
            message |= dict.fromkeys(REASONING_FIELDS[:2] if both else REASONING_FIELDS[2:], turn.reasoning)
        elif turn.reasoning is not None:
            content = join_reasoning(turn.reasoning, content)
        if turn.tool_calls:
            as_text, bare = self._call_form
            message["tool_calls"] = [_call(call, as_text) for call in turn.tool_calls]
        if content or not turn.tool_calls or not bare:
            message["content"] = parts_of(content) if turn.pictures else self._content(content)
        if turn.tool_call_id is not None:
            message["tool_call_id"] = turn.tool_call_id
        if turn.name is not None:
            message["name"] = turn.name
        return message

    def _content(self, words: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": words}] if self._in_parts else words

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


def _literal(value: object) -> str:
    """A plain value as every implementation of Jinja reads it: ``true``, ``false`` and ``none`` in small letters."""
    if isinstance(value, Mapping):
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
    """Reasoning and answer as one text, as most thinking models write them."""
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def field_reasoning(turn: Message) -> Message:
    """Move the closed reasoning blocks at the start of an answer into its field; the same object where it has none.

    The first may lack its opening tag, as in :func:`split_reasoning`.
    """
    if turn.role != "assistant" or turn.reasoning:
        return turn
    found, content = [], turn.content
    while match := _BLOCK.match(content):
        found.append(match[2].strip())
        content = content[match.end() :]
    if not found and "</think>" in content and not _UNCLOSED.match(content) and (match := _OPENED.match(content)):
        found, content = [match[1].strip()], content[match.end() :]
    return replace(turn, reasoning="\n\n".join(filter(None, found)) or None, content=content) if found else turn


def inline_reasoning(turn: Message) -> bool:
    """Whether the text of an answer begins with reasoning, closed or not."""
    return turn.role == "assistant" and split_reasoning(turn.content)[1] != turn.content


def strip_reasoning(turn: Message) -> Message:
    """The turn without its reasoning; the same object where it has none."""
    _, content = split_reasoning(turn.content)
    if turn.role != "assistant" or (turn.reasoning is None and content == turn.content):
        return turn
    return replace(turn, reasoning=None, content=content)
