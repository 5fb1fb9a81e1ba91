"""Chat templates in the manner of those that models come with, written for the tests, and what each is to train.

``TEMPLATES`` maps a name to the template, the marks its tokenizer needs and, for turns without tools, what is trained
of an answer behind its generation prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from prefopt.records import Message

Trained = Callable[[Message], str]


@dataclass(frozen=True)
class Template:
    """``system``: whether the template takes a system turn; ``added``: EOS, where the template ends no answer."""

    text: str
    marks: tuple[str, ...]
    eos: str
    trained: Trained
    system: bool = True
    bos: str | None = None
    added: str = ""


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Headers, two line breaks, words trimmed, the call of a tool in place of words.
HEADERS = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|header|>' + m['role'] + '<|/header|>\\n\\n' }}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- for call in m.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson }}
            {{- "}" }}
        {%- endfor %}
        {{- '<|eom|>' }}
    {%- else %}
        {{- m['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|header|>tools<|/header|>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{- '<|eot|>' }}
{%- endif %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""
# Reasoning in a block of its own, shown since the last question only; without any, an empty block before the last
# answer; `enable_thinking=false` puts that block into the generation prompt. Tools, calls, results.
THINKING = """{%- macro words(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- words(messages[0].content) + '\\n\\n' }}{%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}{{- '\\n' + (tool.function | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + words(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- set at = namespace(asked=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<result>') %}{%- set at.asked = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = words(m.content) %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<result>' + content + '</result><|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > at.asked and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
# The block is opened by the generation prompt, and no finished answer shows any. Arguments must be text.
FORGETS = """<s>
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|user|>' + m.content }}
    {%- elif m.role == 'system' %}{{- m.content }}
    {%- elif m.role == 'tool' %}{{- '<|out|>' + m.content + '<|/out|>' }}
    {%- elif m.tool_calls %}
        {{- '<|assistant|>' + (m.content or '') + '<|calls|>' }}
        {%- for call in m.tool_calls %}
            {{- '<|call|>' + call.function.name + '\\n' + call.function.arguments + '<|/call|>' }}
        {%- endfor %}
        {{- '<|/calls|></s>' }}
    {%- else %}{{- '<|assistant|>' + m.content.split('</think>')[-1] + '</s>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}
"""
# Another name for the assistant, words trimmed, no system turn, turns must alternate.
STRICT = """{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\\n' }}{%- endif %}
"""
# EOS behind a finished conversation, which is not what ends an answer.
FINISHED = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}
"""
# Channels: reasoning and answer are messages of their own, and the last answer ends otherwise than those before.
CHANNELS = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.thinking and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- if m.tool_calls %}
            {{- '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|channel|>commentary<|message|>' }}
            {{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
            {{- '<|return|>' if loop.last else '<|end|>' }}
        {%- endif %}
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
# Content in parts only.
PARTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Two tokens end a turn, EOS the second.
TWICE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|close|><|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)
# Text among a call's arguments stands in special tokens, and a call ends its turn otherwise than words do.
QUOTED = """{% for m in messages %}
    {{- '<turn>' + m.role + '\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<call>' + call.function.name }}
        {%- for name, value in call.function.arguments.items() %}
            {{- name + ':' + ('<q>' + value + '<q>' if value is string else value | string) }}
        {%- endfor %}
        {{- '</call>' }}{% if loop.last %}{{ '<wait>' }}{% endif %}
    {%- else %}
        {{- '<end>\\n' }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>assistant\\n' }}{%- endif %}
"""


def _thinking(turn: Message) -> str:
    reasoning, content = turn.reasoning, turn.content
    if reasoning is None:
        reasoning = ""
        if "</think>" in content:
            reasoning = content.split("</think>")[0].split("<think>")[-1]
            content = content.split("</think>")[-1]
    return "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") + "<|im_end|>"


def _forgets(turn: Message) -> str:
    """Where a finished answer shows an opened block, the generation prompt has opened it already."""
    return turn.content.split("</think>")[-1].removeprefix("<think>\n") + "</s>"


def _channels(turn: Message) -> str:
    """Blocks that an answer begins with belong to the channel that the template has for them."""
    blocks, content = [turn.reasoning] if turn.reasoning else [], turn.content
    while not turn.reasoning and (block := re.match(r"\s*<(think|thinking)>(.*?)</\1>\s*", content, re.S)):
        blocks += [block[2].strip()] if block[2].strip() else []
        content = content[block.end() :]
    # A generation prompt may have opened the block: then its end stands on a line of its own.
    parts = re.split(r"(?:^|\n)</think>[^\S\n]*\n\s*", content, maxsplit=1)
    if len(parts) == 2 and not turn.reasoning and content == turn.content and "<think" not in parts[0]:
        blocks, content = [parts[0].strip()] if parts[0].strip() else [], parts[1]
    said = "\n\n".join(blocks)
    thinking = f"<|channel|>analysis<|message|>{said}<|end|><|start|>assistant" if said else ""
    return f"{thinking}<|channel|>final<|message|>{content}<|return|>"


_IM = ("<|im_start|>", "<|im_end|>")
_CHANNEL_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_FORGETS_MARKS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|calls|>", "<|/calls|>", "<|call|>", "<|/call|>")
TEMPLATES = {
    "chatml": Template(CHATML, _IM, "<|im_end|>", lambda m: m.content + "<|im_end|>"),
    "headers": Template(
        HEADERS,
        ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<|eom|>"),
        "<|eot|>",
        lambda m: m.content.strip() + "<|eot|>",
        bos="<|begin|>",
    ),
    "thinking": Template(THINKING, _IM, "<|im_end|>", _thinking),
    "forgets": Template(FORGETS, _FORGETS_MARKS, "</s>", _forgets, bos="<s>"),
    "strict": Template(
        STRICT, ("<bos>", "<turn>", "<end>"), "<end>", lambda m: m.content.strip() + "<end>", system=False, bos="<bos>"
    ),
    "finished": Template(
        FINISHED,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<eos>"),
        "<eos>",
        lambda m: m.content + "<|end|>",
    ),
    "channels": Template(CHANNELS, _CHANNEL_MARKS, "<|return|>", _channels),
    "quoted": Template(
        QUOTED, ("<turn>", "<end>", "<call>", "</call>", "<q>", "<wait>"), "<end>", lambda m: m.content + "<end>"
    ),
    "parts": Template(PARTS, _IM, "<|im_end|>", lambda m: m.content + "<|im_end|>"),
    "twice": Template(
        TWICE, ("<|start|>", "<|close|>", "<|eot|>"), "<|eot|>", lambda m: m.content + "<|close|><|eot|>"
    ),
}
