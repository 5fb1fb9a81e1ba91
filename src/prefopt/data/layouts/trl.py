"""TRL's layouts: explicit prompt, plain and conversational."""

from __future__ import annotations

from prefopt.data.layouts.layout import CannotHold, Layout, Row
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.shapes import chat_prompt
from prefopt.records import Comparison, Message, Response

ORIGIN = "TRL"
USER = {"role": "user", "content": "What is 2 + 2?"}


def one_text(turns: tuple[Message, ...]) -> str:
    """The words of a prompt or response of plain text."""
    return "".join(m.content for m in turns)


def need_pair(c: Comparison) -> tuple[Response, Response]:
    """Chosen and rejected; raises :class:`CannotHold` where a row says anything but one response over another."""
    if len(c.responses) != 2:
        raise CannotHold(f"{len(c.responses)} responses: it has a chosen and a rejected one")
    if c.labels is not None:
        raise CannotHold("labels")
    if c.votes is not None or c.tiers not in (((0,), (1,)), ((1,), (0,))):
        raise CannotHold("a pair without one that is preferred" if c.votes is None else "votes")
    best, worse = c.tiers[0][0], c.tiers[1][0]
    return c.responses[best], c.responses[worse]


def need_chat(c: Comparison) -> None:
    """Raise :class:`CannotHold` for the plain text of a base model."""
    if c.text:
        raise CannotHold("the plain text of a base model: it has turns")


def need_text(c: Comparison) -> None:
    """Raise :class:`CannotHold` for a conversation."""
    if not c.text:
        raise CannotHold("turns: it has plain text")


def _read_chat(row: Row) -> Comparison:
    prompt = row.with_system(row.messages("prompt"))
    sides = row.response("chosen"), row.response("rejected")
    return row.comparison(prompt, sides, ((0,), (1,)), tools=row.tools)


def _write_chat(c: Comparison) -> dict[str, object]:
    chosen, rejected = need_pair(c)
    need_chat(c)
    sides = {"chosen": write_messages(chosen.messages), "rejected": write_messages(rejected.messages)}
    return {"prompt": write_messages(c.prompt), **sides, **write_tools(c.tools)}


def _read_text(row: Row) -> Comparison:
    prompt = (Message("user", row.text("prompt")),)
    sides = row.response("chosen", text=True), row.response("rejected", text=True)
    return row.comparison(prompt, sides, ((0,), (1,)), text=True)


def _write_text(c: Comparison) -> dict[str, object]:
    chosen, rejected = need_pair(c)
    need_text(c)
    return {"prompt": one_text(c.prompt), "chosen": one_text(chosen.messages), "rejected": one_text(rejected.messages)}


PREFERENCE_CHAT = Layout(
    name="preference-chat",
    fields=("prompt", "chosen", "rejected"),
    optional=("system", "tools"),
    shape=chat_prompt,
    example={
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": [{"role": "assistant", "content": "22"}],
    },
    origin=ORIGIN,
    reader=_read_chat,
    writer=_write_chat,
)
PREFERENCE_TEXT = Layout(
    name="preference-text",
    fields=("prompt", "chosen", "rejected"),
    example={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 22"},
    origin=ORIGIN,
    reader=_read_text,
    writer=_write_text,
)
