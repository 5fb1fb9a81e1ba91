"""Comparisons and rows for property tests: whatever the types allow, and rows with something changed."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

from prefopt.data.layouts import LAYOUTS
from prefopt.records import ROLES, Comparison, Message, Response, ToolCall, tiers_of

WORDS = [
    "a",
    "b c",
    " ",
    "",
    "你好",
    "x\n\ny",
    "\n\nHuman: q",
    "\n\nAssistant: a",
    "[1]",
    '{"k": 1}',
    "é\u0301",
    "\ud83d",
]
text = st.sampled_from(WORDS) | st.text(max_size=8)
scalar = (
    st.none()
    | st.booleans()
    | st.integers(-2, 4)
    | st.sampled_from([10**30, -0.0, 0.5, math.nan, math.inf, 10**400])
    | text
)
ROLE_WORDS = ["user", "human", "assistant", "gpt", "system", "tool", "observation", "function_call", "bot"]
KEYS = ["role", "content", "from", "value", "type", "text", "name", "arguments", "function", "tool_calls", "weight"]
KEYS += ["loss_weight", "response", "score", "solution", "is_correct", "metadata"]
COLUMNS = sorted({n for x in LAYOUTS.values() for n in (*x.known, *x.aliases)} | {"id", "images", "prediction 3"})
value = st.recursive(
    scalar | st.sampled_from(ROLE_WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2)


@st.composite
def calls(draw: st.DrawFn, plain: bool) -> ToolCall:
    arguments = json.dumps(draw(objects), ensure_ascii=False)
    if not plain and draw(st.booleans()):
        arguments = f" {arguments}"  # JSON, though not as json.dumps spells it
    return ToolCall(draw(st.sampled_from(["f", "é"])), arguments, draw(st.none() | st.just("1")))


@st.composite
def messages(draw: st.DrawFn, role: str, plain: bool = False) -> Message:
    """One turn; ``plain`` as files give it, else with whatever the type allows."""
    if draw(st.integers(0, 9)) < 7:
        return Message(role, draw(text))
    empty = st.none() | st.just("x") if plain else st.none() | text
    called = draw(st.lists(calls(plain), max_size=2)) if role == "assistant" else []
    return Message(
        role,
        draw(text),
        draw(empty),
        tuple(called),
        draw(empty) if role == "tool" else None,
        draw(empty),
        draw(st.booleans()) if role == "assistant" or not plain else True,
    )


@st.composite
def comparisons(draw: st.DrawFn, plain: bool = False, most: int = 4) -> Comparison:
    """Any comparison: text or turns, with 0 to ``most`` responses, and anything said of them."""
    count = min(draw(st.sampled_from([0, 1, 1, 2, 2, 2, 3, 4])), most)
    if draw(st.booleans()):
        prompt = (Message("user", draw(text)),)
        sides = tuple(Response((Message("assistant", draw(text)),)) for _ in range(count))
        said = draw(preferences(count))
        return Comparison(prompt, sides, row=1, file="f", text=True, **said)
    roles = st.lists(st.sampled_from(ROLES), max_size=4)
    prompt = tuple(draw(messages(role, plain)) for role in draw(roles))
    if plain:
        prompt = tuple(Message(m.role, m.content, m.reasoning, m.tool_calls, m.tool_call_id, m.name) for m in prompt)
    sides = tuple(Response(tuple(draw(messages(role, plain)) for role in draw(roles))) for _ in range(count))
    tools = tuple(json.dumps(tool, ensure_ascii=False) for tool in draw(st.lists(objects, max_size=2)))
    return Comparison(prompt, sides, row=1, file="f", tools=tools, **draw(preferences(count)))


@st.composite
def preferences(draw: st.DrawFn, count: int) -> dict[str, Any]:
    """Tiers, scores, labels and votes of ``count`` responses, in any mixture."""
    said: dict[str, Any] = {"tiers": ()}
    kinds = draw(st.sets(st.sampled_from(["tiers", "scores", "labels", "votes"]), max_size=2))
    if "scores" in kinds:
        said["scores"] = tuple(draw(st.lists(st.sampled_from([0.0, 1.5, -2.0]), min_size=count, max_size=count)))
        said["tiers"] = tiers_of(said["scores"])
    if "tiers" in kinds:
        said["tiers"] = tiers_of(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    if "labels" in kinds:
        said["labels"] = tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    if "votes" in kinds:
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        chosen = draw(st.lists(st.sampled_from(pairs), max_size=4)) if pairs else []
        said["votes"] = tuple((i, j, draw(st.sampled_from([1.0, 2.5]))) for i, j in chosen)
    return said


@st.composite
def changed_files(draw: st.DrawFn) -> list[Any]:
    """Rows of one layout, most often, with something changed."""
    name = draw(st.none() | st.sampled_from(sorted(LAYOUTS)))
    return draw(st.lists(changed_rows(name), min_size=1, max_size=3))


@st.composite
def changed_rows(draw: st.DrawFn, name: str | None = None) -> Any:
    """A row of a layout with something in it changed, or any value at all; without a name, of any layout."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.dictionaries(st.sampled_from(COLUMNS), value, max_size=4) | value)
    row = copy.deepcopy(dict(LAYOUTS[name or draw(st.sampled_from(sorted(LAYOUTS)))].example))
    for _ in range(draw(st.integers(0, 3))):
        _change(draw, row)
    return row


def _change(draw: st.DrawFn, row: dict[str, Any]) -> None:
    """Change one thing in place: a value replaced, left out, doubled, or a column added."""
    places = list(_places(row))
    if not places or draw(st.integers(0, 4)) == 0:
        row[draw(st.sampled_from(COLUMNS))] = draw(value)
        return
    holder, key = draw(st.sampled_from(places))
    match draw(st.integers(0, 3)):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case 1:
            holder[draw(st.sampled_from(KEYS))] = draw(value)
        case _:
            holder[key] = draw(value)


def _places(inner: Any) -> Any:
    items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
    for key, held in list(items):
        yield inner, key
        yield from _places(held)
