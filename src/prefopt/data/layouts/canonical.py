"""K responses to one prompt: the canonical layout, which is what prefopt writes, and orders or votes by index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from prefopt.data.layouts.layout import NOT_READ, SIDES, USER, CannotHold, plain_text, ranking_layout, with_columns
from prefopt.data.layouts.messages import write_messages
from prefopt.data.layouts.row import RowReader, text_prompt
from prefopt.data.layouts.values import BadRow, index_of, items_of
from prefopt.records import Comparison, Response, Tiers, tiers_of

Votes = tuple[tuple[int, int, float], ...]
COLUMNS = ("tiers", "scores", "labels", "votes", "tools", "finish")
INDEX_COLUMNS = ("order", "ranking", "pairs", "top_k")
# Finish reasons of OpenAI's interface and vLLM: a complete response, or one that was cut off.
COMPLETE, CUT = ("stop", "tool_calls", "function_call"), ("length", "content_filter", "abort")


def _read(row: RowReader) -> Comparison:
    text = isinstance(row.given("prompt"), str)
    prompt = text_prompt(row.text("prompt")) if text else row.turns("prompt")
    responses = [row.response_of(value, "an item of responses", text=text) for value in row.items("responses")]
    count = len(responses)
    for name in ("finish", "scores", "labels"):
        if row.has(name) and len(row.items(name)) != count:
            raise BadRow("wrong number", f"has {count} responses and {len(row.items(name))} {name}")
    if row.has("finish"):
        responses = [_finished(r, reason) for r, reason in zip(responses, row.items("finish"), strict=True)]
    scores = tuple(row.number_of(s, "an item of scores") for s in row.items("scores")) if row.has("scores") else None
    labels = tuple(row.label_of(x, "an item of labels") for x in row.items("labels")) if row.has("labels") else None
    votes = _read_votes(row, name, count) if (name := _only(row, "votes", "pairs")) else None
    tiers = tiers_of(scores) if scores is not None else ()
    if name := _only(row, "tiers", "order", "ranking"):
        tiers = (_read_tiers if name == "tiers" else _read_order)(row, name, count)
    return row.comparison(prompt, responses, tiers, text=text, scores=scores, labels=labels, votes=votes)


def _finished(response: Response, reason: object) -> Response:
    if reason not in (*COMPLETE, *CUT):
        raise BadRow("wrong type", f"finish holds {reason!r}; known are {', '.join((*COMPLETE, *CUT))}")
    return replace(response, cut=reason in CUT)


def _only(row: RowReader, *names: str) -> str:
    """The column that is present of several with one meaning, or an empty string."""
    found = [name for name in names if row.has(name)]
    if len(found) > 1:
        raise BadRow("wrong order", f"has both {found[0]} and {found[1]}")
    return found[0] if found else ""


def _read_tiers(row: RowReader, name: str, count: int) -> Tiers:
    """Lists of indices, best first, that hold every response once. An empty list is no preference."""
    listed = (items_of(tier, f"an item of {name}") for tier in row.items(name))
    tiers = tuple(tuple(index_of(k, count, name) for k in tier) for tier in listed)
    if not all(tiers):
        raise BadRow("wrong order", f"{name} holds an empty tier")
    if tiers:
        _check_complete([k for tier in tiers for k in tier], name, count, count)
    return tiers


def _read_order(row: RowReader, name: str, count: int) -> Tiers:
    """Indices, best first, each once. With the column ``top_k`` only the best few: the others share the last tier."""
    order = [index_of(k, count, name) for k in row.items(name)]
    expected = count
    if row.has("top_k"):
        top_k = row.number_of(row.given("top_k"), "top_k")
        if top_k != len(order) or not order:
            raise BadRow("wrong order", f"{name} names {len(order)} responses, and top_k is {top_k:g}")
        expected = len(order)
    _check_complete(order, name, expected, count)
    rest = tuple(sorted(set(range(count)) - set(order)))
    return tuple((k,) for k in order) + ((rest,) if rest else ())


def _check_complete(named: Sequence[int], name: str, expected: int, count: int) -> None:
    times = Counter(named)
    if twice := [k for k in named if times[k] > 1]:
        raise BadRow("wrong order", f"{name} names response {twice[0]} twice")
    if len(named) != expected:
        missing = ", ".join(str(k) for k in range(count) if k not in times)
        raise BadRow("wrong order", f"{name} leaves out response {missing}; for the best few alone, add top_k")


def _read_votes(row: RowReader, name: str, count: int) -> Votes:
    """Lists of (preferred, dispreferred) or (preferred, dispreferred, weight), by index."""
    votes = []
    for item in row.items(name):
        vote = items_of(item, f"an item of {name}")
        if len(vote) not in (2, 3):
            raise BadRow("wrong type", f"an item of {name} holds {len(vote)} values, not winner, loser and weight")
        best, worse = index_of(vote[0], count, name), index_of(vote[1], count, name)
        weight = row.number_of(vote[2], f"the weight of an item of {name}") if len(vote) == 3 else 1.0
        if best == worse:
            raise BadRow("wrong order", f"{name} prefers response {best} to itself")
        if weight <= 0:
            raise BadRow("wrong type", f"the weight of an item of {name} is {weight:g}; it should be above 0")
        votes.append((best, worse, weight))
    return tuple(votes)


def _read_canonical(row: RowReader) -> Comparison:
    extra = row.given("extra") if row.has("extra") else {}
    if not isinstance(extra, dict):
        raise BadRow("wrong type", "extra should be an object of further columns")
    row.extra.update(extra)
    return _read(row)


def _write(c: Comparison) -> dict[str, object]:
    """Absent values are left out. JSON stays text, so that every row of a table has the same types."""
    if c.text and len(c.prompt) != 1:
        raise CannotHold("plain text whose prompt is not one text")
    written = plain_text if c.text else write_messages
    row: dict[str, object] = {"prompt": written(c.prompt), "responses": [written(r.messages) for r in c.responses]}
    if c.tiers != (tiers_of(c.scores) if c.scores is not None else ()):
        row["tiers"] = [list(tier) for tier in c.tiers]
    columns = {"scores": c.scores, "labels": c.labels, "tools": c.tools or None}
    row |= {name: list(values) for name, values in columns.items() if values is not None}
    if c.votes is not None:
        row["votes"] = [list(vote) for vote in c.votes]
    if any(r.cut for r in c.responses):
        row["finish"] = ["length" if r.cut else "stop" for r in c.responses]
    return row


def _add_columns(row: dict[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    """Further columns whose names have a meaning here go into a column ``extra``."""
    reserved = {"prompt", "responses", "extra", *COLUMNS, *INDEX_COLUMNS, *NOT_READ, *SIDES}
    aside = {name: value for name, value in extra.items() if name in reserved}
    rest = {name: value for name, value in extra.items() if name not in reserved}
    return with_columns(row, rest | ({"extra": aside} if aside else {}))


K_WISE = ranking_layout(
    name="k-wise",
    optional=(*COLUMNS, *INDEX_COLUMNS),
    matches=lambda row: any(row.get(name) is not None for name in ("order", "ranking", "pairs")),
    accepts=("canonical",),
    description="K responses with an order or pairs by index, counted from 0 and best first",
    origin="rankings of any origin",
    example={"prompt": "2 + 2 =", "responses": [" 22", " 4", " four"], "order": [1, 2, 0]},
    reader=_read,
)
CANONICAL = ranking_layout(
    name="canonical",
    optional=(*COLUMNS, "extra"),
    description="K responses, as text or messages, with tiers, scores, labels or votes; the layout prefopt writes",
    origin="prefopt",
    example={
        "prompt": [USER],
        "responses": [[{"role": "assistant", "content": text}] for text in ("4", "Four.", "22")],
        "tiers": [[0, 1], [2]],
    },
    reader=_read_canonical,
    writer=_write,
    add_columns=_add_columns,
    verbatim=True,
)
LAYOUTS = {0: (K_WISE,), 10: (CANONICAL,)}
