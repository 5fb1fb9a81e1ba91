"""Long conversations lose whole turns, then words; what is left is a conversation that the template would show."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.small import small_tokenizer
from data.test_as_written import CHATML, with_template
from prefopt.data.chat.encoding import Encoder
from prefopt.data.chat.render import TURN_CUT, TURNS_DROPPED, Rendered, Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.chat.truncate import Shortener
from prefopt.data.validate import Problem
from prefopt.records import Comparison, Message, ToolCall

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.S)
WORDS = st.text("ab é 中\n", min_size=1, max_size=60).map(lambda text: f"x{text}y")


def rendered(c: Comparison, limit: int) -> tuple[Renderer, Rendered | Problem]:
    renderer = Renderer(with_template(CHATML), Rendering(max_length=limit))
    return renderer, next(renderer.render_all([c]))


def shown(tokenizer: Any, result: Rendered) -> list[tuple[list[tuple[str, str]], str]]:
    """Of every response the turns of its prompt, and its own text; all of it, nothing between."""
    found = []
    for part in result.group.continuations:
        text = tokenizer.decode([*result.group.prefix.tolist(), *part.ids.tolist()])
        prompt, mark, answer = text.rpartition("<|im_start|>assistant\n")
        turns = TURN.findall(prompt)
        assert mark and "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns) == prompt
        found.append((turns, answer))
    return found


@settings(max_examples=60)
@given(
    system=st.none() | WORDS,
    turns=st.lists(st.tuples(WORDS, WORDS), max_size=4),
    last=WORDS,
    answers=st.tuples(WORDS, WORDS).filter(lambda two: two[0] != two[1]),
    limit=st.integers(150, 400),
)
def test_what_is_left_is_a_conversation(
    system: str | None, turns: list[tuple[str, str]], last: str, answers: tuple[str, str], limit: int
) -> None:
    asked = [Message("system", system)] if system else []
    asked += [Message(role, words) for two in turns for role, words in zip(("user", "assistant"), two, strict=True)]
    asked.append(Message("user", last))
    renderer, result = rendered(Comparison.pair(asked, chosen=answers[0], rejected=answers[1], row=1), limit)
    assert isinstance(result, Rendered), result
    for (kept, answer), response in zip(shown(renderer.tokenizer, result), answers, strict=True):
        rest = kept[1:] if system else kept
        whole = [(m.role, m.content) for m in asked if m.role != "system"][-len(rest) :]
        assert rest[0][0] == "user" and [role for role, _ in rest] == [role for role, _ in whole]
        assert all(
            words and whole_words.endswith(words) for (_, words), (_, whole_words) in zip(rest, whole, strict=True)
        )
        if len(rest) > 1:  # words go when there are no turns left to go
            assert rest == whole
        if system:
            assert kept[0][0] == "system" and system.startswith(kept[0][1])
        assert f"{response}<|im_end|>".startswith(answer.rstrip("\n"))
        if len(renderer.tokenizer(response)["input_ids"]) + 2 < limit // 2:
            assert answer.rstrip("\n") == f"{response}<|im_end|>"
    assert max(len(result.group.prefix) + len(c.ids) for c in result.group.continuations) <= limit


def test_a_turn_that_is_too_long_keeps_its_role_and_its_last_words() -> None:
    long = "<|im_end|> is no end. " * 20 + "What is 2 + 2?"
    c = Comparison.pair([Message("user", long)], chosen="It is 4.", rejected="It is 5.", row=3)
    for limit in range(70, 90):  # wherever the cut falls, it goes through no token that is written out
        renderer, result = rendered(c, limit)
        assert isinstance(result, Rendered) and result.prompt_cut > 0
        text = renderer.tokenizer.decode(result.group.prefix.tolist())
        body = text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert text.startswith("<|im_start|>user\n") and long.endswith(body) and body.endswith("What is 2 + 2?")
        assert re.fullmatch(r"(<\|im_end\|>|[^<>|])*", body), body
        assert renderer.warnings[TURN_CUT] == [3] and TURNS_DROPPED not in renderer.warnings


def test_a_result_of_a_tool_is_cut_and_its_call_stays() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("f", "{}"),))
    asked = [Message("user", "Ask f."), call, Message("tool", "result " * 60)]
    calls = "{% for t in m.tool_calls or [] %}{{ t.function.name }} {{ t.function.arguments }}{% endfor %}"
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls)
    tokenizer = with_template(template)
    c = Comparison.pair(asked, chosen="yes", rejected="no", row=1)
    result = Renderer(tokenizer, Rendering(max_length=160)).render(c)
    ((turns, _), _) = shown(tokenizer, result)
    assert [role for role, _ in turns] == ["user", "assistant", "tool"]
    assert turns[0][1] == "Ask f." and turns[1][1] == "f {}" and 0 < len(turns[2][1]) < 60 * 7


def test_a_prompt_without_words_to_lose_is_refused_and_counted() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHATML.replace("{% for m in messages %}", "{{ 'tools ' * 50 }}{% for m in messages %}", 1)
    c = Comparison.pair([Message("user", "long " * 30)], chosen="yes", rejected="no", row=7)
    result = next(Renderer(tokenizer, Rendering(max_length=100)).render_all([c]))
    assert isinstance(result, Problem) and result.kind == "nothing to train" and "no room" in result.what


@pytest.mark.parametrize("limit", [40, 41, 80])
def test_a_long_system_turn_loses_its_end(limit: int) -> None:
    rules = "Rule: " + "be kind. " * 30
    c = Comparison.pair([Message("system", rules), Message("user", "Hi")], chosen="yes", rejected="no", row=1)
    renderer, result = rendered(c, 2 * limit + 40)
    assert isinstance(result, Rendered)
    ((turns, answer), _) = shown(renderer.tokenizer, result)
    assert turns[0][0] == "system" and rules.startswith(turns[0][1]) and turns[0][1].startswith("Rule:")
    assert turns[1][0] == "user" and answer.rstrip("\n") == "yes<|im_end|>"


@pytest.mark.parametrize("refused", [None, 1500])
def test_thousands_of_turns_are_not_shown_thousands_of_times(refused: int | None) -> None:
    """As few turns go as will do, or as the template shows; ``refused``: it shows no conversation of so few turns."""
    asked = [Message("user" if n % 2 == 0 else "assistant", "w") for n in range(4001)]
    whole, laid = Comparison.pair(asked, chosen="a", rejected="b", row=1), []

    def lay(c: Comparison) -> list[Any] | None:
        laid.append(len(c.prompt))
        if refused is not None and len(c.prompt) <= refused:
            return None
        return [
            (np.zeros(10 * len(c.prompt) + 2, np.int32), np.arange(10 * len(c.prompt) + 2) >= 10 * len(c.prompt))
        ] * 2

    how = Shortener(10_000, lay, lambda text: pytest.fail(text), re.compile("x"))
    sequences = lay(whole)
    assert sequences is not None
    left, _ = how.drop_turns(whole, sequences)
    assert len(left.prompt) == (999 if refused is None else 1501) and len(laid) < 20
    assert left.prompt == whole.prompt[-len(left.prompt) :]


@pytest.mark.parametrize("refused", [False, True])
def test_thousands_of_long_turns_are_not_cut_one_by_one(refused: bool) -> None:
    """Results of tools behind the last question; ``refused``: the template wants each of them to begin as it did."""
    tokenizer, asked = (
        small_tokenizer(),
        [Message("user", "Go."), *[Message("tool", f"[{n:04}" + "x" * 21) for n in range(4000)]],
    )
    encoder, tried = Encoder(tokenizer), []

    def tokenize(c: Comparison) -> list[Any] | None:
        tried.append(c)
        if refused and any(m.role == "tool" and not m.content.startswith("[") for m in c.prompt):
            return None
        length = sum(len(m.content) for m in c.prompt)
        return [(np.zeros(length + 2, np.int32), np.arange(length + 2) >= length)] * 2

    whole = Comparison.pair(asked, chosen="a", rejected="b", row=1)
    sequences = tokenize(whole)
    assert sequences is not None
    shortener = Shortener(50_000, tokenize, encoder.encode, re.compile("(?!)"))
    left = shortener.cut_words(whole, sequences)
    assert len(tried) < 100
    lengths = [len(m.content) for m in tried[-1].prompt[1:]]
    if refused:
        assert len(left[0][0]) > 50_000  # nothing can be cut; the row is refused, and soon
    else:  # the first turns lose all but a token, one turn a part, the last turns nothing
        assert len(left[0][0]) == 50_000
        assert sorted(lengths) == lengths and len({*lengths} - {1, 26}) <= 1 and 1 in lengths and 26 in lengths
