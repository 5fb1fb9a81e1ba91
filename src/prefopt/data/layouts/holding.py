"""What writers ask of a comparison before they write it: each refuses, with the reason, what its layout cannot hold."""

from __future__ import annotations

from dataclasses import replace

from prefopt.data.layouts.shapes import SCORES
from prefopt.records import Comparison, Message, Response


class CannotHold(Exception):
    """A layout has no place for something that a comparison says; the message says for what."""


def need_chat(c: Comparison) -> None:
    """Refuse the plain text of a base model."""
    if c.text:
        raise CannotHold("plain text: it has turns")


def need_text(c: Comparison) -> None:
    """Refuse a conversation."""
    if not c.text:
        raise CannotHold("turns: it has plain text")


def need_pair(c: Comparison) -> tuple[Response, Response]:
    """Chosen and rejected. Refuses whatever is not one response preferred to another, or as good by its scores."""
    if len(c.responses) != 2:
        raise CannotHold(f"{len(c.responses)} responses: it has a chosen and a rejected one")
    for name, value in (("labels", c.labels), ("votes", c.votes)):
        if value is not None:
            raise CannotHold(name)
    tied = c.scores is not None and c.scores[0] == c.scores[1]
    if c.tiers != (((0, 1),) if tied else ((0,), (1,))):
        raise CannotHold("two responses of which none is preferred")
    return c.responses[0], c.responses[1]


def need_demonstration(c: Comparison) -> Response:
    """The one response. Refuses several, and whatever was said of it."""
    if len(c.responses) != 1:
        raise CannotHold(f"{len(c.responses)} responses: it has one")
    need_no_preference(c)
    return c.responses[0]


def need_label(c: Comparison) -> tuple[Response, bool]:
    """The one response and its label."""
    if len(c.responses) != 1 or c.labels is None:
        raise CannotHold(f"{len(c.responses)} responses, or none with a label: it has one with a label")
    need_no_preference(replace(c, labels=None))
    return c.responses[0], c.labels[0]


def need_no_preference(c: Comparison) -> None:
    """Refuse tiers, scores, labels and votes."""
    for name, value in (("an order", c.tiers or None), ("scores", c.scores), ("labels", c.labels), ("votes", c.votes)):
        if value is not None:
            raise CannotHold(name)


def need_user(c: Comparison) -> str:
    """The words of a prompt that is one turn of the user."""
    need_chat(c)
    if len(c.prompt) != 1 or c.prompt[0].role != "user":
        raise CannotHold("a prompt of more than one turn of the user")
    return c.prompt[0].content


def need_one_turn(response: Response) -> str:
    """The words of a response that is one turn of the assistant."""
    if len(response.messages) != 1 or response.messages[0].role != "assistant":
        raise CannotHold("responses of several turns")
    return response.messages[0].content


def words(turns: tuple[Message, ...]) -> str:
    """The words of a prompt or response of plain text."""
    return "".join(m.content for m in turns)


def score_columns(c: Comparison) -> dict[str, object]:
    """The columns :data:`SCORES`, or none where there are no scores."""
    return {} if c.scores is None else dict(zip(SCORES, c.scores, strict=True))


def best_first(c: Comparison) -> Comparison:
    """A pair with the preferred response first, which says the same."""
    if c.tiers != ((1,), (0,)) or len(c.responses) != 2 or c.labels is not None or c.votes is not None:
        return c
    scores = None if c.scores is None else (c.scores[1], c.scores[0])
    return replace(c, responses=(c.responses[1], c.responses[0]), tiers=((0,), (1,)), scores=scores)
