"""What every layout must do: read its example, be recognised, write what it reads, refuse what it cannot hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefopt.data.comparisons import parse_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import Problem, check, convert
from prefopt.errors import DataError
from prefopt.records import Comparison, Message, Response, ToolCall

ASKED = (Message("user", "What is 2 + 2?"),)


def one(row: Any, **options: Any) -> Comparison:
    (found,) = parse_comparisons([row], "f", **options)
    assert isinstance(found, Comparison), found
    return found


def problem(row: Any, **options: Any) -> Problem:
    (found,) = parse_comparisons([row], "f", **options)
    assert isinstance(found, Problem), found
    assert found.row == 1 and found.file == "f" and "\n" not in found.what
    return found


def test_the_example_is_recognised_means_what_it_says_and_is_written_again() -> None:
    for name in LAYOUTS:
        layout = LAYOUTS[name]
        reading = parse_comparisons([layout.example] * 2, "f")
        if layout.joins:
            (comparison,) = reading.comparisons
            assert (reading.layout, reading.count) == (name, 1)
            assert f"f: {layout.note}" in reading.notes and check(comparison, "demonstrations") == []
        else:
            assert (reading.layout, reading.count) == (name, 2)
            assert reading.notes == [f"f: {layout.note}"] * bool(layout.note)
            comparison = one(layout.example)
            assert check(comparison, layout.kind) == []
        if layout.writer is None:
            with pytest.raises(DataError, match="read, not written"):
                layout.write(comparison)
            continue
        row = layout.write(comparison)
        assert one(row) == comparison and parse_comparisons([row], "f").layout == name
        assert json.loads(json.dumps(row)) == row
        if not comparison.text:
            assert comparison.prompt[0].role == "user"


def test_many_spellings_of_one_pair() -> None:
    rows = [
        LAYOUTS["preference-chat"].example,
        LAYOUTS["preference-chat"].example | {"chosen": "4", "rejected": {"role": "assistant", "content": "22"}},  # type: ignore[operator]
        LAYOUTS["implicit-chat"].example,
        LAYOUTS["sharegpt-ranking"].example,
        LAYOUTS["messages-ranking"].example,
        LAYOUTS["v1-preference"].example,
        LAYOUTS["openai-preference"].example,
        LAYOUTS["hh"].example,
        {"question": "What is 2 + 2?", "chosen": "4", "rejected": "22"},
        {"instruction": "What is", "input": "", "chosen": "4", "rejected": "22"},
    ]
    *found, with_input = [one(row) for row in rows]
    expected = Comparison.pair(ASKED, chosen="4", rejected="22", row=1, file="f")
    assert found == [expected] * len(found)
    assert with_input.prompt == (Message("user", "What is"),)
    assert one(rows[-1] | {"input": "2 + 2?"}).prompt == (Message("user", "What is\n2 + 2?"),)


def test_earlier_turns_and_system_prompts() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    expected = (Message("system", "be kind"), Message("user", "hi"), Message("assistant", "ho"), *ASKED)
    asked = {"role": "user", "content": "What is 2 + 2?"}
    sides = {"chosen": "4", "rejected": "22"}
    rows = [
        {"instruction": "What is 2 + 2?", "history": [["hi", "ho"]], "system": "be kind", **sides},
        {"prompt": [*turns, asked], "system": "be kind", **sides},
        {"prompt": [{"role": "developer", "content": "be kind"}, *turns, asked], **sides},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, asked], **sides}
        | {"system": "be kind"},
    ]
    assert [one(row).prompt for row in rows] == [expected] * len(rows)
    assert problem({"prompt": [{"role": "system", "content": "x"}, asked], "system": "y", **sides}).kind == (
        "two system turns"
    )
    # To learn from, the response begins with the assistant's first turn.
    learned = one({"instruction": "What is 2 + 2?", "history": [["hi", "ho"]], "output": "4"})
    assert learned.prompt == (Message("user", "hi"),)
    assert learned.responses == (Response((Message("assistant", "ho"), *ASKED, Message("assistant", "4"))),)
    assert one({"messages": [*turns, asked, {"role": "assistant", "content": "4"}]}) == learned
    # With a label it is the last answer alone that was judged.
    judged = one({"messages": [*turns, asked, {"role": "assistant", "content": "4"}], "label": False})
    assert judged.prompt == expected[1:] and judged.labels == (False,)
    assert judged.responses == (Response((Message("assistant", "4"),)),)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = ToolCall("add", '{"x": 2, "y": "ü"}')


def test_tools_and_calls_in_every_spelling() -> None:
    arguments = {"x": 2, "y": "ü"}
    asked = {"role": "user", "content": "q"}
    openai = {
        "messages": [
            asked,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "add", "arguments": json.dumps(arguments)}}
                ],
            },
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "4"}]},
        ],
        "tools": [TOOL],
    }
    found = one(openai)
    assert found.tools == (json.dumps(TOOL),)
    call, result, answer = found.responses[0].messages
    assert call == Message("assistant", "", tool_calls=(ToolCall("add", CALL.arguments, "1"),))
    assert result == Message("tool", "4", tool_call_id="1") and answer.content == "It is 4"
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps({"name": "add", "arguments": arguments})},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4"},
        ],
        "tools": json.dumps([TOOL]),
    }
    v1 = {
        "messages": [
            asked | {"loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [{"type": "tool_call", "value": json.dumps({"name": "add", "arguments": arguments})}],
                "loss_weight": 1.0,
            },
            {"role": "tool", "content": [{"type": "text", "value": "4"}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "It is 4"}], "loss_weight": 1.0},
        ],
        "tools": json.dumps([TOOL]),
    }
    spelt = [one(sharegpt), one(v1)]
    assert spelt[0] == spelt[1] and spelt[0].responses[0].messages[0] == Message("assistant", "", tool_calls=(CALL,))
    older = [asked, {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": arguments}}]
    assert one({"messages": older}).responses[0].messages[0].tool_calls == (CALL,)
    assert one(LAYOUTS["messages"].write(found)) == found
    pair = {"conversations": sharegpt["conversations"][:1], "tools": sharegpt["tools"], "chosen": "a"}
    called = one(pair | {"rejected": sharegpt["conversations"][1]})
    assert one(LAYOUTS["sharegpt-ranking"].write(called)) == called
    named = one(pair | {"conversations": None, "prompt": [asked], "rejected": openai["messages"][1]})
    with pytest.raises(DataError, match=r"f, row 1: cannot be written as sharegpt-ranking, .* ids of tool calls"):
        LAYOUTS["sharegpt-ranking"].write(named)


def test_reasoning_names_and_weights() -> None:
    turns = [
        {"role": "user", "content": "q", "name": "ann"},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "weight": 1},
    ]
    found = one({"messages": turns})
    assert found.prompt == (Message("user", "q", name="ann"),)
    untrained, _, answer = found.responses[0].messages
    assert not untrained.trained and answer == Message("assistant", "b", reasoning="hm")
    assert one(LAYOUTS["messages"].write(found)) == found == one(LAYOUTS["canonical"].write(found))
    # A turn of the prompt is never trained, so its weight says nothing.
    pair = one({"prompt": turns[:3], "chosen": "x", "rejected": "y"})
    assert all(m.trained for m in pair.prompt)
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "b"}]
    v1 = one({"messages": [turns[0], {"role": "assistant", "content": parts, "loss_weight": 1.0}]})
    assert v1.responses[0].messages[0] == answer


def test_openai_preferences_keep_what_stands_beside_the_messages() -> None:
    row = LAYOUTS["openai-preference"].example | {"id": 7}  # type: ignore[operator]
    row["input"] = row["input"] | {"tools": [TOOL], "parallel_tool_calls": True}
    found = one(row)
    assert found.tools == (json.dumps(TOOL),) and found.extra == {"id": 7, "parallel_tool_calls": True}
    assert LAYOUTS["openai-preference"].write(found) == row


def test_ultrafeedback_scores() -> None:
    ratings = {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}, "truthfulness": {"Rating": "5"}}
    completions = [
        {"response": "a", "overall_score": 7.5, "model": "m"},
        {"response": "b", "annotations": ratings},
        {"response": "c", "overall_score": 7.5},
    ]
    reading = parse_comparisons([{"instruction": "q", "completions": completions}], "f")
    (found,) = reading
    assert isinstance(found, Comparison)
    assert found.scores == (7.5, 4.5, 7.5) and found.tiers == ((0, 2), (1,))
    assert reading.notes == ["f: keys inside of columns not read: completions.annotations, completions.model"]
    assert problem({"instruction": "q", "completions": [{"response": "a"}]}).kind == "missing score"
    for rating in ("five", ["5"], True):
        completions = [{"response": "a", "annotations": {"honesty": {"Rating": "4"}, "help": {"Rating": rating}}}]
        assert problem({"instruction": "q", "completions": completions}).kind == "wrong type"
    completions = [{"response": "a", "annotations": {"honesty": {"Rating": -1}, "help": {"Rating": "-2.5"}}}]
    assert one({"instruction": "q", "completions": completions}).scores == (-1.75,)
    text = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert one(text | {"score_chosen": 2, "score_rejected": 1}).scores == (2.0, 1.0)
    assert problem(text | {"score_rejected": 1}).what == "has score_rejected and lacks score_chosen"
    scored = one(text | {"metadata": {"score_chosen": 2, "score_rejected": 2, "id": 3}})
    assert (
        scored.scores == (2.0, 2.0)
        and scored.tiers == ((0, 1),)
        and scored.pairs == ()
        and scored.extra == {"metadata": {"id": 3}}
    )
    assert problem(text | {"score_chosen": 1, "score_rejected": 2}).kind == "scores against the preference"
    tie = convert(one(text | {"score_chosen": 2, "score_rejected": 2}), "pairs")
    assert isinstance(tie, Problem) and tie.kind == "only ties"
    # The prompt stands in both sides, or in neither.
    answers = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    asked = [{"role": "user", "content": "q"}]
    whole = {name: asked + side for name, side in answers.items()}
    assert one({"prompt": "q", **answers}) == one({"prompt": "q", **whole}) == one({"prompt": asked, **answers})
    assert problem({"prompt": "q", **whole, "rejected": whole["rejected"][1:]}).kind == "differing prompts"


def test_labels_are_true_or_false_or_1_or_0_and_nothing_else() -> None:
    row = LAYOUTS["unpaired-text"].example
    for label in (2, -1, 0.5, "yes", "good", [True], float("inf")):
        assert problem({**row, "label": label}).kind == "wrong type"
    for label, good in (
        (0, False),
        (1, True),
        (1.0, True),
        ("0", False),
        ("1", True),
        ("True", True),
        ("false", False),
    ):
        assert one({**row, "label": label}).labels == (good,)
    # A class beside a text is no label of a response: it is not read, and that is said.
    reading = parse_comparisons([{"text": "t", "label": 1}], "f")
    assert reading.layout == "raw-text" and reading.notes == ["f: columns not read: label"]
    assert one({"text": "t", "label": 1}).labels is None


def test_whoever_writes_a_pair_puts_the_preferred_response_first() -> None:
    scored = Comparison.scored(ASKED, ["22", "4"], scores=[1, 9], row=1, file="f")
    row = LAYOUTS["preference-chat"].write(scored)
    assert row["chosen"] == [{"role": "assistant", "content": "4"}] and row["score_rejected"] == 1.0
    tie = Comparison.scored(ASKED, ["22", "4"], scores=[9, 9], row=3)
    written = LAYOUTS["preference-chat"].write(tie)  # equal scores say that it is one
    assert written["score_chosen"] == written["score_rejected"] == 9.0
    untold = Comparison(tie.prompt, tie.responses, ((0, 1),), 3)
    with pytest.raises(DataError, match=r"row 3: .* none is preferred"):
        LAYOUTS["preference-chat"].write(untold)


CANNOT = [
    ("preference-text", LAYOUTS["preference-chat"].example, "turns"),
    ("preference-chat", LAYOUTS["preference-text"].example, "plain text"),
    ("sharegpt-ranking", LAYOUTS["kto"].example, "responses"),
    ("completion-chat", {"prompt": "q", "response": "a", "helpfulness": 4}, "scores"),
    ("completion-chat", LAYOUTS["unpaired-chat"].example, "labels"),
    ("implicit-text", {"prompt": "Par", "chosen": "is", "rejected": "ma"}, "prompt ends"),
    ("implicit-chat", {"instruction": "q", "chosen": "", "rejected": "x", "id": 1, "prompt": None}, None),
    ("raw-text", LAYOUTS["completion-text"].example, "where its prompt ends"),
    ("raw-text", {"question": "q", "answer": "a"}, "turns"),
    ("completion-chat", {"question": "q", "answer": "a", "extra": 1}, None),
    ("messages", {"question": "q", "answer": "a", "messages": None}, "column messages"),
    ("alpaca", LAYOUTS["alpaca"].example, "read, not written"),
]


def test_what_a_layout_cannot_hold_is_refused_with_the_reason() -> None:
    for name, row, reason in CANNOT:
        comparison = one(row)
        if reason is None:
            assert one(LAYOUTS[name].write(comparison)) == comparison
            continue
        with pytest.raises(DataError, match=reason) as caught:
            LAYOUTS[name].write(comparison)
        said = str(caught.value)
        assert said.startswith(f"f, row 1: cannot be written as {name}, which cannot hold ") and "\n" not in said


def test_further_columns_come_back_as_they_were() -> None:
    extra = {"prompt": 1, "scores": "x", "extra": {"a": None}, "images": ["b"], "order": None, "id": [1, {"k": 2}]}
    comparison = Comparison(ASKED, (), (), 1, "f", extra=extra)
    row = LAYOUTS["canonical"].write(comparison)
    assert row["id"] == extra["id"] and one(row) == comparison and one(row).extra == extra
    assert parse_comparisons([row], "f").layout == "canonical"


def test_every_layout_says_what_it_is() -> None:
    for layout in LAYOUTS.values():
        assert layout.description and layout.origin and set(layout.fields) <= layout.known
        assert not set(layout.aliases) & layout.known and not set(layout.option_names) & layout.known
        for other in layout.accepts:
            assert other in LAYOUTS
