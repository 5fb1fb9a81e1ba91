"""How the value of a column looks: all that may tell layouts with the same columns apart."""

from __future__ import annotations

from collections.abc import Mapping

TURNS = ("\n\nHuman:", "\n\nAssistant:")


def look(value: object) -> str:
    """One of ``text transcript truth number object solution message messages weighted texts list null``.

    ``weighted`` are messages in the manner of LLaMA-Factory v1, ``transcript`` is text in that of Anthropic's HH.
    """
    if isinstance(value, str):
        return "transcript" if value.startswith(TURNS) else "text"
    if isinstance(value, (list, tuple)):
        first = value[0] if value else None
        if isinstance(first, dict):
            return "weighted" if _weighted(first) else "messages"
        return "texts" if isinstance(first, str) else "list"
    if isinstance(value, dict):
        if "solution" in value and "is_correct" in value:
            return "solution"
        return "message" if ("role" in value or "from" in value) else "object"
    if isinstance(value, bool):
        return "truth"
    return "null" if value is None else "number"


def _weighted(message: dict[object, object]) -> bool:
    content = message.get("content")
    part = content[0] if isinstance(content, list) and content else None
    return message.get("loss_weight") is not None or (isinstance(part, dict) and part.get("value") is not None)


def always(_: Mapping[str, object]) -> bool:
    """The shape of a layout that its columns alone tell."""
    return True


def chat_prompt(row: Mapping[str, object]) -> bool:
    """The prompt is a list of messages."""
    return look(row["prompt"]) in ("messages", "weighted", "texts", "list")
