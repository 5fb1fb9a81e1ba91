"""What names a prompt."""

from __future__ import annotations

from dataclasses import replace

from prefopt.records import Comparison, Message, ToolCall

ROW = Comparison.pair([Message("system", "s"), Message("user", "q")], chosen="a", rejected="b", row=1)


def test_a_prompt_is_named_by_words_and_tools_alone() -> None:
    asked = (*ROW.prompt, Message("assistant", "", tool_calls=(ToolCall("f", '{"x": 1}', id="1"),)))
    other = (*ROW.prompt, Message("assistant", "", tool_calls=(ToolCall("f", '{"x": 2}', id="1"),)))
    keys = [
        ROW.prompt_key,
        replace(ROW, tools=('{"name": "f"}',)).prompt_key,
        replace(ROW, tools=('{"name": "g"}',)).prompt_key,
        replace(ROW, prompt=asked).prompt_key,
        replace(ROW, prompt=other).prompt_key,
        replace(ROW, prompt=ROW.prompt[1:]).prompt_key,
        replace(ROW, prompt=(ROW.prompt[0], Message("system", "q"))).prompt_key,
    ]
    assert len(set(keys)) == len(keys)
    same = replace(asked[2], reasoning="why", tool_calls=(ToolCall("f", '{"x": 1}', id="2"),))
    assert replace(ROW, prompt=(*ROW.prompt, same)).prompt_key == keys[3]
    spaced = (Message("system", " s"), Message("user", "q\n"))
    assert replace(ROW, prompt=spaced, responses=ROW.responses[:1], tiers=(), row=7).prompt_key == keys[0]


def test_the_name_of_a_prompt_without_tools_never_changes() -> None:
    """Held-out prompts are chosen by it, so that another name would move rows between training and evaluation."""
    assert ROW.prompt_key.hex() == "ba625d4a153e95b6481f5ff9e605dd20"


def test_raw_texts_are_told_apart() -> None:
    rows = [Comparison.pair("", chosen=words, rejected="z", row=1, file="f") for words in ("a", "b", "a")]
    keys = [r.prompt_key for r in rows]
    assert keys[0] == keys[2] != keys[1]
