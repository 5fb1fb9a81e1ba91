"""Where the prompt ends when both sides hold the whole."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.layouts.messages import split_turns
from prefopt.data.layouts.trl import split_text
from prefopt.records import Message

CASES = [
    ("The capital is Paris", "The capital is London", "The capital is", " Paris", " London"),
    # One side begins as the other ends: the last word stays with both.
    ("Capital: Paris", "Capital: Paris is", "Capital:", " Paris", " Paris is"),
    ("Paris", "Paris is", "", "Paris", "Paris is"),
    ("Paris is", "Paris", "", "Paris is", "Paris"),
    ("Paris", "London", "", "Paris", "London"),
    # Never inside of a word, a number or an accented letter.
    ("He met Paris", "He met Parma", "He met", " Paris", " Parma"),
    ("It costs 3.14", "It costs 3.15", "It costs", " 3.14", " 3.15"),
    ("I don't", "I don", "I", " don't", " don"),
    ("see cafe\u0301", "see cafe", "see", " cafe\u0301", " cafe"),
    ("see x", "see x\u0301", "see", " x", " x\u0301"),
    ("q\n\nParis", "q\n\nLondon", "q\n\n", "Paris", "London"),
    ("q:\tParis", "q:\tLondon", "q:\t", "Paris", "London"),
    ("same words", "same words", "same", " words", " words"),
    ("same", "same", "", "same", "same"),
    # What is white space alone is no response.
    ("a b", "a b  ", "a", " b", " b  "),
    ("a ", "a", "", "a ", "a"),
    ("  ", "a", "", "  ", "a"),
    ("", "a", "", "", "a"),
    # Scripts without spaces are split between characters, marks and joined signs kept whole.
    ("法国的首都是巴黎", "法国的首都是伦敦", "法国的首都是", "巴黎", "伦敦"),
    ("首都是Paris", "首都是Parma", "首都是", "Paris", "Parma"),
    ("首都", "首都是", "首", "都", "都是"),
    ("東京です", "東京でし", "東京で", "す", "し"),
    ("กรุงเทพ", "กรุงโรม", "กรุง", "เทพ", "โรม"),
    ("ดี", "ดิ", "", "ดี", "ดิ"),
    ("수도는 파리", "수도는 파스", "수도는", " 파리", " 파스"),
    ("ok 👩\u200d🔬", "ok 👩\u200d🌾", "ok", " 👩\u200d🔬", " 👩\u200d🌾"),
    ("ok 👍🏽", "ok 👍🏿", "ok", " 👍🏽", " 👍🏿"),
]


def test_texts_are_split_between_words() -> None:
    for chosen, rejected, prompt, one, other in CASES:
        assert split_text(chosen, rejected) == (prompt, one, other)
        assert split_text(rejected, chosen) == (prompt, other, one)


words = st.lists(st.sampled_from(["a", "ab", "b", "巴", "黎", "é", " ", "\n", ".", "c"]), max_size=8).map("".join)


@given(words, words)
def test_nothing_is_lost_and_no_side_is_left_empty(chosen: str, rejected: str) -> None:
    prompt, one, other = split_text(chosen, rejected)
    assert (prompt + one, prompt + other) == (chosen, rejected)
    assert bool(one.strip()) == bool(chosen.strip()) and bool(other.strip()) == bool(rejected.strip())
    if prompt:
        for side in (one, other):
            joined = prompt[-1].isascii() and prompt[-1].isalnum() and side[0].isascii() and side[0].isalnum()
            assert not joined
    # The same with one more word in front: the prompt grows by it, unless there is nothing else to answer with.
    again, *_ = split_text(f"zz {chosen}", f"zz {rejected}")
    if chosen.strip() and rejected.strip() and not (chosen[0].isspace() or rejected[0].isspace()):
        assert again == (f"zz {prompt}" if prompt else "zz")


def test_a_million_characters_take_no_longer_than_reading_them() -> None:
    for text in ("a" * 1_000_000, "a " * 500_000, "巴" * 1_000_000):
        start = time.process_time()
        prompt, one, other = split_text(text, text)
        assert prompt + one == text and one == other
        assert time.process_time() - start < 20


def turns(spelt: str) -> list[Message]:
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [Message(roles[word[0]], word) for word in spelt.split()]


TURNS = [
    ("u1 a1", "u1 a2", 1),
    ("s1 u1 a1 u2 a2", "s1 u1 a1 u2 a3", 4),
    ("u1 a1 u2 a2", "u1 a1 u3 a3", 1),  # the users' turns differ: the response begins with the answer before
    ("u1 a1", "u1 a1 u2 a2", 1),
    ("u1 a1", "u1 a1", 1),
    ("u1 a1 t1 a2", "u1 a1 t2 a2", 1),
    ("u1", "u1 a1", 0),
    ("u1 a1", "u2 a1", 0),
    ("a1", "a2", 0),
    ("", "a1", 0),
]


def test_conversations_are_split_before_an_answer_of_both_sides() -> None:
    for chosen, rejected, at in TURNS:
        assert split_turns(turns(chosen), turns(rejected)) == split_turns(turns(rejected), turns(chosen)) == at
