r"""Reasoning that a thinking model writes before its answer, in a field of its own or inside the text.

>>> split_reasoning("<think>\n2 + 2\n</think>\n\n4")
('2 + 2', '4')
>>> split_reasoning("4")
('', '4')
"""

from __future__ import annotations

import re
from dataclasses import replace

from prefopt.records import Message

_BLOCK = re.compile(r"\s*<(think|thinking)>(.*?)</\1>\s*", re.DOTALL)
# What is sampled behind a generation prompt that opens the block has no opening tag of its own.
_OPENED = re.compile(r"((?:(?!<think>).)*?)(?:^|\n)</think>[^\S\n]*\n\s*", re.DOTALL)
_UNCLOSED = re.compile(r"\s*<(think|thinking)>(?!.*</\1>)", re.DOTALL)


def split_reasoning(content: str) -> tuple[str, str]:
    """The reasoning block that a text begins with (white space around it aside), and the answer behind it.

    A block is ``<think>...</think>`` or ``<thinking>...</thinking>``; the opening tag may be missing where the closing
    one stands on a line of its own. A block that is never closed leaves no answer.
    """
    if match := _BLOCK.match(content):
        return match[2].strip(), content[match.end() :]
    if match := _UNCLOSED.match(content):
        return content[match.end() :].strip(), ""
    if "</think>" in content and (match := _OPENED.match(content)):
        return match[1].strip(), content[match.end() :]
    return "", content


def join_reasoning(reasoning: str, content: str) -> str:
    """Reasoning and answer as one text, the way most thinking models write them."""
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def field_reasoning(turn: Message) -> Message:
    """The turn with the closed blocks that its text begins with in the field; the same object where it has none.

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


def _has_tag(content: str) -> bool:
    return "<think" in content or "</think>" in content


def strip_reasoning(turn: Message) -> Message:
    """The turn without its reasoning; the same object where it has none."""
    if turn.role != "assistant" or (turn.reasoning is None and not _has_tag(turn.content)):
        return turn
    _, content = split_reasoning(turn.content)
    same = turn.reasoning is None and content == turn.content
    return turn if same else replace(turn, reasoning=None, content=content)
