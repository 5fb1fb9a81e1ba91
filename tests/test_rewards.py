"""Rewards are held to their word, and what is wrong is said with the reward and the prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prefopt.config import scoring as config
from prefopt.errors import ConfigError, RunError
from prefopt.rewards import RULES, Reward, load_reward


def test_vader_prefers_praise() -> None:
    pytest.importorskip("vaderSentiment")
    praise, blame = load_reward("vader")(["It was", "It was"], [" a wonderful, delightful film.", " awful and boring."])
    assert -1 <= blame < 0 < praise <= 1


def test_a_function_of_ones_own_is_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_for_a_test.py").write_text(
        "def overlap(prompts, responses):\n"
        "    return [len(set(p.split()) & set(r.split())) for p, r in zip(prompts, responses)]\n"
        "seven = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = load_reward("my_rewards_for_a_test:overlap")
    assert reward(["a b", "c d"], ["a b c", "x"]) == [2.0, 0.0]
    for name, what in {
        "my_rewards_for_a_test:overlaps": "has no overlaps",
        "my_rewards_for_a_test:seven": "is not a function",
        "no_such_module_anywhere:f": "no module no_such_module_anywhere",
        "vadr": "did you mean vader",
    }.items():
        with pytest.raises(ConfigError, match=what):
            load_reward(name)


def test_code_is_told_by_its_file_and_in_a_script_by_its_own_lines(tmp_path: Path) -> None:
    def one(prompts: Any, responses: Any) -> Any:
        return [1.0 for _ in responses]

    def two(prompts: Any, responses: Any) -> Any:
        return [2.0 for _ in responses]

    class Three:
        __call__ = two

    digests = {Reward("mine", f).digest() for f in (one, two, Three(), partial(one))}
    assert len(digests) == 1 and None not in digests
    for f in (one, two):
        f.__module__ = "__main__"
    assert len(digests | {Reward("mine", f).digest() for f in (one, two)} - {None}) == 3
    assert Reward("length", RULES["length"]()).digest() is None
    assert Reward("mine", eval("lambda prompts, responses: []")).digest() is None


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda p, r: [1.0], "gave 1 numbers for 2 responses"),
        (lambda p, r: [1.0, float("nan")], "gave nan for a response to 'second prompt'"),
        (lambda p, r: [float("inf"), 1.0], "gave inf for a response to 'first prompt'"),
        (lambda p, r: ["high", 1.0], "gave 'high'"),
        (lambda p, r: [None, 1.0], "gave None"),
        (lambda p, r: {}["missing"], "KeyError: 'missing'"),
    ],
)
def test_a_reward_that_breaks_its_word_is_named_with_the_prompt(function: Callable[..., Any], what: str) -> None:
    with pytest.raises(RunError) as caught:
        Reward("mine", function)(["first prompt", "second prompt"], ["x", "y"])
    assert what in str(caught.value) and "the reward mine" in str(caught.value) and "\n" not in str(caught.value)


def test_every_rule_gives_finite_numbers_for_odd_texts() -> None:
    pytest.importorskip("vaderSentiment")
    odd = ["", " ", "\x00", "好电影", "a" * 10_000, "!!!", "😀"]
    for name in RULES:
        assert len(load_reward(name)(odd, odd)) == len(odd)


def test_rules_are_known_before_torch_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(RULES) == set(config.RULES)
    (tmp_path / "length").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ("length", "mine", "other", "owner/name", "./mine", "module:function", "prefopt:demo/tiny_imdb")
    assert [config.is_model_reward(name) for name in names] == [False, True, False, True, True, False, True]
