"""Turns that are judged by themselves are compared behind the turns before them, and only where that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data.small import small_tokenizer
from data.templates import CHATML, TEMPLATES
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.conversations import _write_turn
from prefopt.data.layouts.layout import CannotHold
from prefopt.data.load import GroupSet, load_groups
from prefopt.data.steps import NOT_STEPWISE, STEPWISE
from prefopt.errors import DataError
from prefopt.records import Message

ASK = {"role": "user", "content": "2 + 2?"}
CALL = {"tool_calls": [{"id": "call00001", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]}
WRONG = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sub", "arguments": "{}"}}]}
PAIRED: dict[str, Any] = {
    "messages": [
        ASK,
        {"role": "assistant", "content": "", **CALL, "rejected": WRONG},
        {"role": "tool", "content": "4", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It is 4.", "rejected": "No idea."},
    ]
}
LABELLED: dict[str, Any] = {
    "messages": [
        ASK,
        {"role": "assistant", "content": "Let me think.", "label": True},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "5.", "label": 0},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "No."},
    ]
}


def tokenizer_of(template: str) -> Any:
    tokenizer = small_tokenizer(marks=TEMPLATES[template].marks, eos_token=TEMPLATES[template].eos)
    tokenizer.chat_template = TEMPLATES[template].text
    return tokenizer


def load(rows: list[dict[str, Any]], template: str = "thinking", kind: Any = "pairs", **options: Any) -> GroupSet:
    tokenizer = tokenizer_of(template)
    return load_groups([parse_comparisons(rows, "rows")], tokenizer, Rendering(**options), kind=kind)


def texts(found: GroupSet, template: str = "thinking") -> list[tuple[str, list[str]]]:
    """The context of each group that its first response is trained behind, and what is trained of each response."""
    made, tokenizer = [], tokenizer_of(template)
    for group in found.groups:
        ids, trained = group.sequence(0)
        answers = [tokenizer.decode(c.ids[c.trained].tolist()) for c in group.continuations]
        made.append((tokenizer.decode(ids[: int(np.argmax(trained))].tolist()), answers))
    return made


def test_each_judged_turn_of_a_trajectory_is_a_pair_behind_the_turns_before_it() -> None:
    found = load([PAIRED], "quoted", compare="steps")
    start = "<turn>user\n2 + 2?<end>\n<turn>assistant\n"
    (first, pair), (second, answers) = texts(found, "quoted")
    assert (first, pair) == (start, ["<call>adda:2b:2</call><wait>", "<call>sub</call><wait>"])
    assert second.startswith(start) and second.endswith("<turn>tool\n4<end>\n<turn>assistant\n")
    assert answers == ["It is 4.<end>", "No idea.<end>"]
    assert [group.pairs for group in found.groups] == [((0, 1),)] * 2
    assert any(STEPWISE in note and "1 row (1)" in note for note in found.notes)
    # One trajectory is never split between training and evaluation.
    assert len({*found.groups.prompt_key_G.tolist()}) == 1 and found.groups.row_G.tolist() == [1, 1]


def test_labels_of_turns() -> None:
    found = load([LABELLED], kind="labels", compare="steps")
    assert [g.labels for g in found.groups] == [(True,), (False,)]
    assert [answers for _, answers in texts(found)] == [
        ["<think>\n\n</think>\n\nLet me think.<|im_end|>"],
        ["<think>\n\n</think>\n\n5.<|im_end|>"],
    ]
    with pytest.raises(DataError, match=r"too few responses: 1 .row 1; .* unpaired labels"):
        load([LABELLED], compare="steps")


def test_rows_without_judged_turns_are_refused_and_judged_ones_are_said_where_they_are_not_read() -> None:
    plain = {"messages": [ASK, {"role": "assistant", "content": "4"}]}
    with pytest.raises(DataError, match=r"no judged turn: 1 .row 2; .* leave out --compare steps"):
        load([PAIRED, plain], compare="steps")
    contradiction = {"messages": [ASK, {"role": "assistant", "content": "4", "label": False, "rejected": "5"}]}
    with pytest.raises(DataError, match="contradicting judgements"):
        load([contradiction], compare="steps")
    found = load([PAIRED], kind="demonstrations")
    assert len(found.groups) == 1 and any(NOT_STEPWISE in note for note in found.notes)


def test_two_trajectories_with_judged_turns_in_common() -> None:
    first = {"role": "assistant", "content": "Hm.", "label": True}
    ends = ({"role": "assistant", "content": words, "label": words == "4."} for words in ("4.", "5."))
    chosen, rejected = ([first, {"role": "user", "content": "And?"}, end] for end in ends)
    rows = [{"prompt": [ASK], "chosen": chosen, "rejected": rejected}]
    assert [g.labels for g in load(rows, kind="labels", compare="steps").groups] == [(True,), (True,), (False,)]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": "q", "label": True}, "only answers are judged"),
        ({"role": "assistant", "content": "a", "label": "good"}, "label of a message of messages is 'good'"),
        ({"role": "assistant", "content": "a", "rejected": 3}, "not a list of messages"),
        (
            {"role": "assistant", "content": "a", "rejected": {"role": "assistant", "content": "b", "label": True}},
            "holds judgements of its own",
        ),
    ],
)
def test_judgements_that_cannot_be_read(message: dict[str, Any], problem: str) -> None:
    reading = parse_comparisons([{"messages": [ASK, message, {"role": "assistant", "content": "z"}]}], "rows")
    assert problem in reading.problems[0].what


@pytest.mark.parametrize("row", [PAIRED, LABELLED])
def test_judgements_are_written_as_they_were_read(row: dict[str, Any]) -> None:
    (c,) = parse_comparisons([row], "rows").comparisons
    for name in ("canonical", "messages"):
        written = LAYOUTS[name].write(c)
        assert LAYOUTS[name].parse(written, 1, "rows") == c
    with pytest.raises(CannotHold, match="judged by themselves"):
        _write_turn(Message("assistant", "a", label=True))


def test_a_template_is_not_asked_for_tools_that_it_cannot_show() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHATML
    reading = parse_comparisons([PAIRED], "rows")
    with pytest.raises(DataError, match="a tool call"):
        load_groups([reading], tokenizer, Rendering(compare="steps"), kind="pairs")
