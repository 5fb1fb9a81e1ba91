"""Values that are not what they should be: one clear problem with the row."""

from __future__ import annotations

from typing import Any

from prefopt.data.comparisons import parse_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import Problem

EXAMPLE = {name: dict(layout.example) for name, layout in LAYOUTS.items()}
USER, GOOD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]


def chat(*turns: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [USER, *turns], **columns}


def responses(**columns: Any) -> dict[str, Any]:
    return {"prompt": "q", "responses": ["a", "b", "c"], **columns}


def called(**call: Any) -> dict[str, Any]:
    return chat({"role": "assistant", "tool_calls": [call]})


ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    # where text belongs
    ("preference-text", {"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong type", "prompt is a number, not text"),
    ("preference-text", {"prompt": "q", "chosen": 1.5, "rejected": "b"}, "wrong type", "chosen should be text"),
    (
        "preference-chat",
        {"prompt": [USER], "chosen": 7, "rejected": "b"},
        "wrong type",
        "chosen is a number, not a list",
    ),
    (
        "preference-chat",
        {"prompt": ["q"], "chosen": "a", "rejected": "b"},
        "wrong type",
        "prompt holds text, not a mess",
    ),
    ("raw-text", {"text": ["a"]}, "wrong type", "text is a list, not text"),
    ("alpaca", {"instruction": "q", "output": {}}, "wrong type", "output is an object, not text"),
    ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "wrong type", "input is a number"),
    (
        "alpaca",
        {"instruction": "q", "output": "a", "history": [["b"]]},
        "wrong type",
        "item of history holds text, not",
    ),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["b", 1]]}, "wrong type", "holds text, a number, not"),
    ("alpaca", {"instruction": "q", "output": "a", "system": True}, "wrong type", "system is true or false, not text"),
    # messages
    ("messages", chat({"role": "bot", "content": "a"}), "unknown role", "has the role 'bot'; known are user, human"),
    ("messages", chat({"role": 1, "content": "a"}), "wrong type", "role of a message of messages is a number"),
    ("messages", chat({"content": "a"}), "missing field", "a message of messages lacks role"),
    ("messages", chat({"from": "gpt", "content": "a"}), "missing field", "a message of messages lacks value"),
    ("messages", chat({"role": "assistant", "content": None}), "missing field", "lacks content"),
    (
        "messages",
        chat({"role": "assistant", "content": 3}),
        "wrong type",
        "content of a message of messages is a number",
    ),
    ("messages", chat({"role": "assistant", "content": [3]}), "wrong type", "holds a number, not parts with a type"),
    ("messages", chat({"role": "user", "content": [{"type": "video_url"}]}), "field that cannot", "type 'video_url'"),
    ("messages", chat({"role": "user", "content": [{"type": "image_url"}]}), "bad picture", "without a picture"),
    ("messages", chat({"role": "user", "content": [{"type": "text"}]}), "wrong type", "part of a message of messages"),
    ("messages", chat(GOOD | {"images": ["x"]}), "field that cannot be used", "has images"),
    ("messages", chat(GOOD | {"name": 3}), "wrong type", "name of a message of messages is a number"),
    ("messages", chat(GOOD | {"reasoning_content": []}), "wrong type", "reasoning_content"),
    ("messages", chat(GOOD | {"weight": 0.5}), "wrong type", "has the weight 0.5; it should be 0 or 1"),
    ("messages", chat(GOOD | {"weight": True}), "wrong type", "has the weight True"),
    ("messages", chat(USER | {"weight": 1}), "wrong type", "has the weight 1, but its role is user"),
    ("messages", chat(GOOD | {"trained": "no"}), "wrong type", "trained of a message of messages is text"),
    # tools
    ("messages", chat(GOOD, tools="[{]"), "wrong type", "tools is text that is not JSON"),
    ("messages", chat(GOOD, tools=3), "wrong type", "tools is a number, not a list of functions"),
    ("messages", chat(GOOD, tools=["[]"]), "wrong type", "an item of tools is a list written as text, not an object"),
    ("messages", chat(GOOD, tools=[{"f": DEEP}]), "wrong type", "cannot be written as JSON"),
    ("messages", chat(GOOD, functions=[{}]), "field that cannot be used", "has functions"),
    ("preference-text", EXAMPLE["preference-text"] | {"tools": [{}]}, "field that cannot be used", "has tools"),
    (
        "messages",
        chat({"role": "user", "content": "", "tool_calls": [{"name": "f"}]}),
        "wrong type",
        "its role is user",
    ),
    (
        "messages",
        chat({"role": "assistant", "tool_calls": "f"}),
        "wrong type",
        "tool_calls of a message of messages is t",
    ),
    ("messages", called(arguments={}), "missing field", "lacks the name of its function"),
    (
        "messages",
        called(name="f", arguments="{"),
        "wrong type",
        "the arguments of a tool call of messages is text that",
    ),
    ("messages", called(name="f", arguments=[1]), "wrong type", "is a list, not an object"),
    ("messages", called(name="f", id=3), "wrong type", "the id of a tool call of messages is a number"),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "wrong type",
        "is text that is not JSON",
    ),
    ("openai-preference", EXAMPLE["openai-preference"] | {"input": "q"}, "wrong type", "input is text, not an object"),
    ("openai-preference", EXAMPLE["openai-preference"] | {"input": {}}, "missing field", "lacks messages"),
    # labels and scores
    ("kto", EXAMPLE["kto"] | {"label": 2}, "wrong type", "label is a number, 2, not true or false"),
    ("alpaca-kto", EXAMPLE["alpaca-kto"] | {"kto_tag": "good"}, "wrong type", "label is text, not true or false"),
    ("canonical", responses(scores=[1, 2]), "wrong number", "has 3 responses and 2 scores"),
    ("canonical", responses(scores=[1, 2, "3"]), "wrong type", "an item of scores is text, not a number"),
    ("canonical", responses(scores=[1, 2, True]), "wrong type", "an item of scores is true or false, not a number"),
    ("canonical", responses(scores=[1, 2, float("nan")]), "not a finite number", "an item of scores is nan"),
    ("canonical", responses(scores=[1, 2, float("inf")]), "not a finite number", "an item of scores is inf"),
    ("canonical", responses(scores=[1, 2, 10**400]), "not a finite number", "an item of scores is inf"),
    ("canonical", responses(labels=[True, False, 3]), "wrong type", "an item of labels is a number, 3, not true"),
    ("canonical", responses(labels=[True]), "wrong number", "has 3 responses and 1 labels"),
    (
        "preference-text",
        EXAMPLE["preference-text"] | {"score_chosen": "9", "score_rejected": 1},
        "wrong type",
        "score_ch",
    ),
    # orders
    ("canonical", responses(tiers=[[0], [1]]), "wrong order", "tiers leaves out response 2; for the best few"),
    ("canonical", responses(tiers=[[0, 1], [1, 2]]), "wrong order", "tiers names response 1 twice"),
    ("canonical", responses(tiers=[[0, 1, 2], []]), "wrong order", "tiers holds an empty tier"),
    ("canonical", responses(tiers=[0, 1, 2]), "wrong type", "an item of tiers is a number, not a list"),
    ("canonical", responses(tiers="012"), "wrong type", "tiers is text, not a list"),
    ("k-wise", responses(order=[1, 2, 3]), "unknown response", "order names response 3; there are 3, counted from 0"),
    ("k-wise", responses(order=[0, 1, -1]), "unknown response", "order names response -1"),
    ("k-wise", responses(order=[0, 1.0, 2]), "wrong type", "order holds a number, not the index of a response"),
    ("k-wise", responses(order=[0, True, 2]), "wrong type", "order holds true or false, not the index"),
    ("k-wise", responses(ranking=[0, 1, 1]), "wrong order", "ranking names response 1 twice"),
    (
        "k-wise",
        responses(ranking=[2, 0]),
        "wrong order",
        "ranking leaves out response 1; for the best few alone, add to",
    ),
    ("k-wise", responses(order=[2, 0], top_k=1), "wrong order", "order names 2 responses, and top_k is 1"),
    ("k-wise", responses(order=[], top_k=0), "wrong order", "top_k is 0"),
    ("k-wise", responses(order=[0, 1, 2], tiers=[[0, 1, 2]]), "wrong order", "has both tiers and order"),
    ("k-wise", responses(pairs=[[0, 1], [2, 2]]), "wrong order", "pairs prefers response 2 to itself"),
    ("k-wise", responses(pairs=[[0, 3]]), "unknown response", "pairs names response 3"),
    ("k-wise", responses(pairs=[[0]]), "wrong type", "an item of pairs holds 1 values"),
    ("k-wise", responses(pairs=[[0, 1, 0]]), "wrong type", "the weight of an item of pairs is 0; it should be above 0"),
    ("k-wise", responses(pairs=[[0, 1, None]]), "wrong type", "is null, not a number"),
    ("canonical", {"prompt": "q", "responses": [[GOOD]]}, "wrong type", "an item of responses should be text"),
    ("canonical", {"prompt": [USER], "responses": "a"}, "wrong type", "responses is text, not a list"),
    ("canonical", responses(extra=[1]), "wrong type", "extra should be an object"),
    ("pair-labels", EXAMPLE["pair-labels"] | {"preference": [0, 1]}, "wrong number", "so 3 pairs, and 2 labels"),
    ("pair-labels", EXAMPLE["pair-labels"] | {"preference": [0, 1, 3]}, "wrong type", "preference holds 3; it should"),
    ("pair-labels", EXAMPLE["pair-labels"] | {"prediction 4": 3}, "wrong type", "prediction 4 is a number, not text"),
    ("solutions", {"question": "q", "m": {"solution": 4, "is_correct": True}}, "wrong type", "the solution of m is a"),
    (
        "solutions",
        {"question": "q", "m": {"solution": "4", "is_correct": 2}},
        "wrong type",
        "is_correct of m is a numb",
    ),
    ("ultrafeedback", {"instruction": "q", "completions": ["a"]}, "wrong type", "completions holds text"),
    # transcripts
    ("hh", {"chosen": "Human: q", "rejected": "\n\nHuman: q"}, "no transcript", "chosen does not begin with an empty"),
    ("hh", {"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, "response without an answer", "chosen has no turn"),
    (
        "hh",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: a"},
        "differing prompts",
        "the sides differ before their last answers",
    ),
]


def test_a_bad_value_is_one_problem_with_its_row() -> None:
    for name, row, kind, what in ROWS:
        good = LAYOUTS[name].example
        reading = parse_comparisons([good, row, good], "f", format=name)
        one, problem, other = reading
        assert isinstance(problem, Problem) and (problem.row, problem.file) == (2, "f")
        assert kind in problem.kind and what in problem.what and "\n" not in problem.what
        assert not isinstance(one, Problem) and not isinstance(other, Problem)


def test_rows_that_are_no_objects() -> None:
    rows = [EXAMPLE["hh"], None, 3, "x", [1], b"x"]
    problems = parse_comparisons(rows, "f").problems
    assert [p.row for p in problems] == [2, 3, 4, 5, 6] and {p.kind for p in problems} == {"not an object"}
    assert [p.what.split(",")[0] for p in problems] == ["is null", "is a number", "is text", "is a list", "is a bytes"]


def test_empty_tools_are_none_and_plain_text_has_none() -> None:
    for tools in ([], {}, "", None):
        for name in ("messages", "preference-text", "implicit-text", "canonical"):
            (found,) = parse_comparisons([EXAMPLE[name] | {"tools": tools}], "f").comparisons
            assert found.tools == ()
    (problem,) = parse_comparisons([responses(tools=[{}])], "f").problems
    assert problem.kind == "field that cannot be used" and "plain text" in problem.what
