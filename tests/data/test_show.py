"""Groups of every kind as a person sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data.small import small_tokenizer
from data.templates import CHATML
from prefopt.data.chat.render import Renderer
from prefopt.data.group import Group, show
from prefopt.records import Comparison, Message, Response

ASKED = (Message("user", "q"),)


def shown(comparison: Comparison, tokenizer: Any = None) -> list[str]:
    if tokenizer is None:
        tokenizer = small_tokenizer(eos_token="<|im_end|>")
        tokenizer.chat_template = CHATML
    return show(Renderer(tokenizer).render(comparison).group, tokenizer).splitlines()


def test_pair() -> None:
    lines = shown(Comparison.pair(ASKED, chosen="a 你", rejected="b", row=1))
    assert lines == [
        "shared prefix (20 tokens)",
        "<|im_start|>user",
        "q<|im_end|>",
        "<|im_start|>assistant",
        "",
        "chosen (6 tokens, 6 trained)",
        "⟦a 你<|im_end|>⟧",
        "rejected (2 tokens, 2 trained)",
        "⟦b<|im_end|>⟧",
    ]


def test_what_was_said_of_each_response() -> None:
    scored = Comparison.scored(ASKED, ["a", "b", "c"], scores=[1, 2.5, 2.5], row=1)
    names = [line.split(" (")[0] for line in shown(scored) if line.startswith("response")]
    assert names == ["response 1, ranked 2 of 2, score 1", "response 2, ranked 1 of 2", "response 3, ranked 1 of 2"]
    assert sum("(tied), score 2.5" in line for line in shown(scored)) == 2
    sides = tuple(Response((Message("assistant", text),)) for text in "abc")
    bare = Comparison(ASKED, sides, (), 1)
    cycle = replace(bare, votes=((0, 1, 1.0), (1, 2, 1.0), (2, 0, 2.0)))
    assert sum("preferred in 1 and dispreferred in 1 of 3 pairs" in line for line in shown(cycle)) == 3
    labelled = replace(bare, labels=(True, False, True))
    assert [line.split(" (")[0] for line in shown(labelled) if "desirable" in line] == [
        "response 1, desirable",
        "response 2, undesirable",
        "response 3, desirable",
    ]
    demonstration = replace(bare, responses=sides[:1])
    assert "response (2 tokens, 2 trained)" in shown(demonstration)


def test_prompt_alone_and_nothing_shared() -> None:
    tokenizer = small_tokenizer()
    (ids,) = Renderer(tokenizer).prompts([Comparison.pair("ab", chosen="c", rejected="d", row=1)])
    assert show(Group(ids, (), 1, ()), tokenizer) == "prompt (2 tokens)\nab"  # type: ignore[arg-type]
    lines = shown(Comparison.pair("", chosen="cd", rejected="de", row=1), tokenizer)
    assert lines[:3] == ["shared prefix (0 tokens)", "chosen (3 tokens, 2 trained)", "c⟦d</s>⟧"]
    assert lines[3:] == ["rejected (3 tokens, 2 trained)", "d⟦e</s>⟧"]


def test_spaces_that_decoding_hides_at_a_start(stories: Any) -> None:
    lines = shown(Comparison.pair("Once upon", chosen=" a time", rejected=" a day", row=1), stories)
    assert "⟦ a time</s>⟧" in lines and "⟦ a day</s>⟧" in lines
