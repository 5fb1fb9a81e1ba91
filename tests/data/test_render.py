"""Templates and tokenizers that make the boundary between prompt and response hard to find."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from data.small import small_tokenizer
from prefopt.data.chat.encoding import Encoder
from prefopt.data.chat.render import APART, EOS_ADDED, SPECIAL, Rendered, Renderer
from prefopt.data.chat.spans import NO_END
from prefopt.data.chat.template import Rendering
from prefopt.data.tokenizer import leading_ids, vocabulary_size
from prefopt.data.validate import Problem
from prefopt.errors import DataError, ModelError
from prefopt.records import Comparison, Message, Response

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning is shown in the last answer only: an earlier answer changes when a later one is added.
REWRITES = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 != ns.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a reasoning block that a finished conversation does not show.
OPENS = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content.split('</think>')[-1] }}</s>"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:<think>\n{% endif %}"
)
# White space between words and end of turn, words stripped, BOS written by the template.
SPACED = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def pair(chosen: str, rejected: str, *prompt: tuple[str, str]) -> Comparison:
    return Comparison.pair([Message(*m) for m in prompt], chosen=chosen, rejected=rejected, row=1, file="f.json")


def text(prompt: str, chosen: str, rejected: str) -> Comparison:
    return Comparison.pair(prompt, chosen=chosen, rejected=rejected, row=1, file="f.json")


def with_template(template: str, **special: str) -> Any:
    tokenizer = small_tokenizer(**special)
    tokenizer.chat_template = template
    return tokenizer


def runs(tokenizer: Any, rendered: Rendered, k: int) -> list[tuple[bool, str]]:
    """Response k as decoded runs of (trained, text)."""
    ids, trained = rendered.group.sequence(k)
    cuts = [0, *(np.nonzero(np.diff(trained))[0] + 1), len(ids)]
    return [(bool(trained[a]), tokenizer.decode(ids[a:b].tolist())) for a, b in pairwise(cuts)]


def test_prompt_and_answer_that_the_tokenizer_would_join_are_tokenized_apart() -> None:
    tokenizer = small_tokenizer([("a", "b"), ("Ġ", "b")])
    vocabulary = tokenizer.get_vocab()
    renderer = Renderer(tokenizer)
    group = renderer.render(text("xa", " b", "b")).group
    chosen, rejected = (group.sequence(k) for k in (0, 1))
    assert chosen[0].tolist() == [vocabulary[t] for t in ("x", "a", "Ġb", "</s>")]
    assert rejected[0].tolist() == [vocabulary[t] for t in ("x", "a", "b", "</s>")]
    assert chosen[1].tolist() == rejected[1].tolist() == [False, False, True, True]
    (prompt,) = renderer.prompts([text("xa", " b", "b")])
    assert group.prefix.tolist() == list(prompt) == [vocabulary["x"], vocabulary["a"]]
    assert renderer.warnings == {APART: [1]}


def test_empty_prompt_and_response_of_one_token() -> None:
    tokenizer = small_tokenizer()
    vocabulary = tokenizer.get_vocab()
    group = Renderer(tokenizer).render(text("", "b", "c")).group
    assert len(group.prefix) == 0
    # Nothing stands before the first token, so only EOS is scored.
    assert [c.trained.tolist() for c in group.continuations] == [[False, True]] * 2
    assert [c.ids.tolist() for c in group.continuations] == [[vocabulary[t], vocabulary["</s>"]] for t in "bc"]
    group = Renderer(tokenizer, Rendering(add_eos=False)).render(text("a", "b", "c")).group
    assert [c.ids.tolist() for c in group.continuations] == [[vocabulary["b"]], [vocabulary["c"]]]
    with pytest.raises(DataError, match=r"f\.json, row 1: nothing to train"):
        Renderer(tokenizer, Rendering(add_eos=False)).render(text("", "b", "c"))


def test_bos_and_eos_are_there_once(stories: Any) -> None:
    assert leading_ids(stories) == [1]
    ids = Renderer(stories).render(text("Once upon", " a time", " a day</s>")).group
    for k in (0, 1):
        sequence = ids.sequence(k)[0].tolist()
        assert sequence[0] == 1 and sequence.count(1) == 1 and sequence[-1] == 2 and sequence.count(2) == 1
    ids = Renderer(stories).render(text("<s>Once upon", " a time", " a day")).group
    assert ids.sequence(0)[0].tolist().count(1) == 1
    tokenizer = with_template(SPACED)
    group = Renderer(tokenizer).render(pair("yes", "no", ("user", "is it?"))).group
    assert group.sequence(0)[0].tolist().count(tokenizer.bos_token_id) == 1
    assert group.sequence(0)[0].tolist().count(tokenizer.eos_token_id) == 1


def test_end_of_turn_behind_white_space_is_trained_with_it() -> None:
    tokenizer = with_template(SPACED)
    rendered = Renderer(tokenizer).render(pair("yes\n", "no", ("user", " is it? ")))
    assert runs(tokenizer, rendered, 0) == [(False, "<s>[INST] is it? [/INST]"), (True, " yes </s>")]


def test_template_that_rewrites_earlier_turns() -> None:
    tokenizer = with_template(REWRITES, eos_token="<|im_end|>")
    prompt = (("user", "1?"), ("assistant", "<think>hm</think>one"), ("user", "2?"))
    # The prompt is what sampling begins with, which still shows the reasoning of the answer before; or, with
    # --earlier-turns as-shown, what the finished conversation makes of it.
    for how, earlier in (("as-generated", "<think>hm</think>one"), ("as-shown", "one")):
        renderer = Renderer(tokenizer, Rendering(earlier_turns=how))
        comparison = pair("<think>so</think>two", "three", *prompt)
        rendered = renderer.render(comparison)
        start = f"<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n{earlier}<|im_end|>\n"
        asked = start + "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
        assert runs(tokenizer, rendered, 0) == [(False, asked), (True, "<think>so</think>two<|im_end|>")]
        assert runs(tokenizer, rendered, 1) == [(False, asked), (True, "three<|im_end|>")]
        (sampled,) = renderer.prompts([comparison])
        assert not isinstance(sampled, Problem)
        assert (tokenizer.decode(sampled.tolist()) == asked) == (how == "as-generated")


def test_several_answers_in_one_response_are_trained_without_what_lies_between() -> None:
    user, assistant = "user", "assistant"
    sides = (
        Response((Message(assistant, "<think>a</think>b"), Message(user, "go on"), Message(assistant, "c"))),
        Response((Message(assistant, "d"),)),
    )
    comparison = Comparison((Message(user, "q"),), sides, ((0,), (1,)), row=1)
    start, between = (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n",
    )
    # A template that rewrites the first turn: with --earlier-turns as-shown what the finished conversation shows.
    for template, first in ((CHATML, "<think>a</think>b"), (REWRITES, "b")):
        tokenizer = with_template(template, eos_token="<|im_end|>")
        rendered = Renderer(tokenizer, Rendering(earlier_turns="as-shown")).render(comparison)
        assert runs(tokenizer, rendered, 0) == [
            (False, start),
            (True, f"{first}<|im_end|>"),
            (False, between),
            (True, "c<|im_end|>"),
        ]
        assert runs(tokenizer, rendered, 1) == [(False, start), (True, "d<|im_end|>")]
        assert len(rendered.group.prefix) == len(start) - len("<|im_start|>" * 2 + "<|im_end|>") + 3


def test_generation_prompt_that_no_finished_conversation_shows() -> None:
    tokenizer = with_template(OPENS)
    # The second answer begins like the block that the generation prompt opens, which is not the template's doing.
    rendered = Renderer(tokenizer).render(pair("yes", "<thinking is good", ("user", "q")))
    assert runs(tokenizer, rendered, 0) == [(False, "<s>U:qA:"), (True, "yes</s>")]
    assert runs(tokenizer, rendered, 1) == [(False, "<s>U:qA:"), (True, "<thinking is good</s>")]


def test_reasoning_that_the_template_takes_apart(minimind: Any) -> None:
    rendered = Renderer(minimind).render(pair("<think>\nhm\n</think>\n\nyes", "no", ("user", "q")))
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert runs(minimind, rendered, 0) == [(False, asked), (True, "hm\n</think>\n\nyes<|im_end|>")]
    assert runs(minimind, rendered, 1) == [(False, asked + "\n</think>\n\n"), (True, "no<|im_end|>")]


def test_template_without_end_of_turn_gets_eos_and_says_so_once() -> None:
    tokenizer = with_template(ENDLESS)
    renderer = Renderer(tokenizer)
    rendered = [renderer.render(pair("yes", "no", ("user", "q"))) for _ in range(2)]
    assert runs(tokenizer, rendered[1], 0) == [(False, "user: q\nassistant:"), (True, " yes</s>")]
    assert renderer.notes == [EOS_ADDED]
    bare = Renderer(with_template(ENDLESS), Rendering(add_eos=False)).render(pair("yes", "no", ("user", "q")))
    assert runs(tokenizer, bare, 0)[-1] == (True, " yes")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "refuses the conversation"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "not show the assistant turn"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content | length }}",
            NO_END,
        ),
    ],
)
def test_templates_that_hide_the_answer_are_refused(template: str, reason: str) -> None:
    (problem,) = Renderer(with_template(template)).render_all([pair("yes", "no", ("user", "q"))])
    assert isinstance(problem, Problem) and problem.kind == "chat template" and reason in problem.what
    with pytest.raises(DataError, match=r"f\.json, row 1"):
        Renderer(with_template(template)).render(pair("yes", "no", ("user", "q")))


def test_responses_that_the_template_makes_the_same_are_refused() -> None:
    (problem,) = Renderer(with_template(SPACED)).render_all([pair("yes", "yes\n", ("user", "q"))])
    assert isinstance(problem, Problem) and problem.kind == "identical responses"


def test_special_tokens_written_in_the_text_are_said() -> None:
    renderer = Renderer(with_template(CHATML, eos_token="<|im_end|>"))
    renderer.render(pair("fine", "a<|im_start|>b", ("user", "q")))
    assert renderer.warnings == {SPECIAL: [1]}


def test_no_eos_is_one_line() -> None:
    with pytest.raises(ModelError, match="no EOS token; set eos_token"):
        Renderer(small_tokenizer(bos_token="<s>"))


def test_truncation_of_a_group() -> None:
    tokenizer = small_tokenizer()
    row = text("<s>" + "p" * 20, "a" * 30, "b")
    full = Renderer(tokenizer).render(row)
    assert (full.prompt_cut, full.responses_cut) == (0, (0, 0))
    rendered = Renderer(tokenizer, Rendering(16)).render(row)
    # 8 of 21 tokens of the prompt stay, BOS among them; then the longer response loses its end.
    assert (rendered.prompt_cut, rendered.responses_cut) == (13, (23, 0))
    assert tokenizer.decode(rendered.group.prefix.tolist()) == "<s>" + "p" * 7
    assert runs(tokenizer, rendered, 0)[-1] == (True, "a" * 8)
    assert runs(tokenizer, rendered, 1)[-1] == (True, "b</s>")
    (problem,) = Renderer(tokenizer, Rendering(16)).render_all([text("p", "a" * 30 + "b", "a" * 30)])
    assert isinstance(problem, Problem) and problem.kind == "identical after truncation"


def test_offsets_cover_every_character(gpt2: Any, minimind: Any, stories: Any) -> None:
    words = "  Hi  there 你好 👍🏽\n\n  end "
    for tokenizer in (gpt2, minimind, stories):
        encoded = Encoder(tokenizer).encode(words)
        ids = encoded.ids
        assert tokenizer.decode(ids.tolist()).strip() == words.strip()
        assert encoded.covers([(0, len(words))]).all()
        assert (encoded.starts[1:] <= encoded.ends[:-1]).all() and encoded.ends[-1] == len(words)
        assert (np.diff(encoded.ends) >= 0).all() and encoded.starts[0] == 0


def test_vocabulary_size(minimind: Any, gpt2: Any) -> None:
    assert (vocabulary_size(minimind), vocabulary_size(gpt2)) == (6400, 50257)
