"""K responses to one prompt: the canonical layout, and orders or votes by index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prefopt.data.layouts.layout import NOT_READ, SIDES, CannotHold, Layout, with_columns, words
from prefopt.data.layouts.messages import write_messages
from prefopt.data.layouts.orders import read_order, read_tiers, read_votes, write_order
from prefopt.data.layouts.row import Row, text_prompt
from prefopt.data.layouts.shapes import listed_order
from prefopt.data.layouts.values import BadRow, kind
from prefopt.records import Comparison, Response, tiers_of

# The columns that a row may have beside its own: those of the canonical layout never stand for something else.
SAID = ("tiers", "scores", "labels", "votes", "tools", "finish")
# Why responses ended: by the model's own will, or not.
WHOLE, BROKEN_OFF = ("stop", "tool_calls", "function_call"), ("length", "content_filter", "abort")
BY_INDEX = ("order", "ranking", "pairs", "top_k")


def _read(row: Row) -> Comparison:
    given = row.given("prompt")
    text = isinstance(given, str)
    prompt = text_prompt(given) if isinstance(given, str) else row.turns("prompt")
    responses = [row.response_of(value, "an item of responses", text=text) for value in row.items("responses")]
    count = len(responses)
    if row.has("finish"):
        responses = _broken_off(row, responses)
    scores = tuple(row.number_of(s, "an item of scores") for s in row.items("scores")) if row.has("scores") else None
    labels = tuple(row.label_of(x, "an item of labels") for x in row.items("labels")) if row.has("labels") else None
    for name, many in (("scores", scores), ("labels", labels)):
        if many is not None and len(many) != count:
            raise BadRow("wrong number", f"has {count} responses and {len(many)} {name}")
    votes = read_votes(row, name, count) if (name := _one(row, "votes", "pairs")) else None
    tiers = tiers_of(scores) if scores is not None else ()
    if name := _one(row, "tiers", "order", "ranking"):
        tiers = (read_tiers if name == "tiers" else read_order)(row, name, count)
    return row.comparison(prompt, responses, tiers, text=text, scores=scores, labels=labels, votes=votes)


def _broken_off(row: Row, responses: list[Response]) -> list[Response]:
    """``finish`` says of each response why it ended, in the words of OpenAI's interface and vLLM's."""
    reasons = row.items("finish")
    if len(reasons) != len(responses):
        raise BadRow("wrong number", f"has {len(responses)} responses and {len(reasons)} finish")
    for reason in reasons:
        if not isinstance(reason, str):
            raise BadRow(
                "wrong type", f"an item of finish should be text, such as stop or length, and is {kind(reason)}"
            )
        if reason not in (*WHOLE, *BROKEN_OFF):
            raise BadRow("wrong type", f"finish holds {reason!r}; known are {', '.join((*WHOLE, *BROKEN_OFF))}")
    return [replace(r, cut=reason in BROKEN_OFF) for r, reason in zip(responses, reasons, strict=True)]


def _one(row: Row, *names: str) -> str:
    """The column that is there of several that say the same, or nothing."""
    found = [name for name in names if row.has(name)]
    if len(found) > 1:
        raise BadRow("wrong order", f"has both {found[0]} and {found[1]}")
    return found[0] if found else ""


def _read_canonical(row: Row) -> Comparison:
    if row.has("extra"):
        extra = row.given("extra")
        if not isinstance(extra, dict):
            raise BadRow("wrong type", "extra should be an object of further columns")
        row.extra.update(extra)
    return _read(row)


def _asked(c: Comparison) -> dict[str, object]:
    if not c.text:
        sides = [write_messages(response.messages) for response in c.responses]
        return {"prompt": write_messages(c.prompt), "responses": sides}
    if len(c.prompt) != 1:
        raise CannotHold("plain text whose prompt is not one text")
    return {"prompt": words(c.prompt), "responses": [words(response.messages) for response in c.responses]}


def _write_canonical(c: Comparison) -> dict[str, object]:
    """What is not said is left out. JSON stays text, so that every row of a table has the same types."""
    row = _asked(c)
    if c.tiers != (tiers_of(c.scores) if c.scores is not None else ()):
        row["tiers"] = [list(tier) for tier in c.tiers]
    for name, many in (("scores", c.scores), ("labels", c.labels), ("tools", c.tools or None)):
        if many is not None:
            row[name] = list(many)
    if c.votes is not None:
        row["votes"] = [list(vote) for vote in c.votes]
    return row | _finish_column(c)


def _finish_column(c: Comparison) -> dict[str, object]:
    """Only where a response was broken off: without the column none was."""
    if not any(r.cut for r in c.responses):
        return {}
    return {"finish": ["length" if r.cut else "stop" for r in c.responses]}


def _aside(row: dict[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    """The row with its further columns; those whose names mean something are put into a column ``extra``."""
    meant = {"prompt", "responses", "extra", *SAID, *BY_INDEX, *NOT_READ, *SIDES}
    aside = {name: value for name, value in extra.items() if name in meant}
    rest = {name: value for name, value in extra.items() if name not in meant}
    return with_columns(row, rest | ({"extra": aside} if aside else {}))


def _write_by_index(c: Comparison) -> dict[str, object]:
    row: dict[str, object] = {**_asked(c), "tools": list(c.tools)} if c.tools else _asked(c)
    if c.votes is not None:
        row["pairs"] = [list(vote) for vote in c.votes]
    if c.tiers or c.votes is None:
        order = write_order(c.tiers, len(c.responses))
        if order is None:
            raise CannotHold("an order with ties, or none")
        row |= order
    for name, many in (("scores", c.scores), ("labels", c.labels)):
        if many is not None:
            row[name] = list(many)
    return row | _finish_column(c)


USER = {"role": "user", "content": "What is 2 + 2?"}
CANONICAL = Layout(
    name="canonical",
    fields=("prompt", "responses"),
    optional=(*SAID, "extra"),
    gives="ranking",
    says="K responses, in text or turns, with tiers, scores, labels or votes; what prefopt writes",
    origin="prefopt",
    example={
        "prompt": [USER],
        "responses": [[{"role": "assistant", "content": text}] for text in ("4", "Four.", "22")],
        "tiers": [[0, 1], [2]],
    },
    reader=_read_canonical,
    writer=_write_canonical,
    finish=_aside,
    verbatim=True,
)
BY_INDEX_LAYOUT = Layout(
    name="k-wise",
    fields=("prompt", "responses"),
    optional=(*SAID, *BY_INDEX),
    shape=listed_order,
    also=("canonical",),
    gives="ranking",
    says="K responses with an order or pairs by index, counted from 0 and best first",
    origin="rankings of any origin",
    example={"prompt": "2 + 2 =", "responses": [" 22", " 4", " four"], "order": [1, 2, 0]},
    reader=_read,
    writer=_write_by_index,
)
