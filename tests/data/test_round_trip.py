"""What is trained, decoded, is the answer and its end-of-turn token, whatever was said, for every template at hand."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.small import small_tokenizer
from data.templates import CHATML, TEMPLATES, Template
from prefopt.data.chat.render import STRIPPED, Renderer
from prefopt.data.chat.spans import CHANGED, ELSEWHERE
from prefopt.data.chat.template import Rendering, Turns, field_reasoning, split_reasoning, strip_reasoning
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.group import IntArray
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import Problem
from prefopt.records import Comparison, Message, Response

Spell = Callable[[Any, IntArray], str]
MERGES = [("Ċ", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "a"), ("a", "b"), ("Ġ", "Ġ"), (":", "Ġ"), ("Ċ", "a")]
FRAGMENTS = (
    *(
        "a",
        "ab",
        "Hello",
        " world",
        "  ",
        "\n",
        "\n\n",
        "\t",
        " \n ",
        "你好",
        "。",
        "👍🏽",
        "👨‍👩‍👧",
        "é",
        "e\u0301",
        "\u2028",
        "0",
        "ß",
    ),
    *("<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "<|eot|>", "<|end|>", "<end>", "<|endoftext|>"),
    *(
        "<think>",
        "</think>",
        "<think>\nhm\n</think>\n\n",
        "prefopt0probe",
        "prefopt1probe",
        "prefoptshownc0x",
        "prefoptword",
    ),
    *("{{ messages }}", "{% raw %}", "{#", "User: ", "Assistant:", "[INST]", "'\"\\", "<result>", "None"),
)
said = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6)), min_size=1, max_size=6).map("".join)
texts = said.filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True) -> Comparison:
    """Some turns and one to three answers, no two of them the same."""
    turns = [Message("system", draw(texts))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(texts)), Message("assistant", draw(texts))]
    turns.append(Message("user", draw(texts)))
    answers = draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    responses = tuple(Response((Message("assistant", answer),)) for answer in answers)
    return Comparison(tuple(turns), responses, (), row=1)


@cache
def renderer_of(name: str) -> Renderer:
    template = TEMPLATES[name]
    marks = [m for m in ("<s>", "</s>") if m not in template.marks]
    special = {"eos_token": template.eos} | ({"bos_token": template.bos} if template.bos else {})
    tokenizer = small_tokenizer(MERGES, [*template.marks, *marks], **special)
    tokenizer.chat_template = template.text
    return Renderer(tokenizer)


def decode(tokenizer: Any, ids: IntArray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def spelled(tokenizer: Any, ids: IntArray) -> str:
    """SentencePiece's tokens as text, less the space that is put before the text and behind every special token."""
    data, start = b"", True
    for token in tokenizer.convert_ids_to_tokens(ids.tolist()):
        special = token in tokenizer.all_special_tokens
        if not special and (byte := re.fullmatch("<0x(..)>", token)):
            data += bytes.fromhex(byte[1])
        else:
            data += (token.removeprefix("▁") if start else token).replace("▁", " ").encode()
        start = special
    return data.decode(errors="replace")


def check(renderer: Renderer, comparison: Comparison, template: Template, *, spell: Spell = decode) -> None:
    """Compare with what ``apply_chat_template`` shows and with what the template is known to make of an answer."""
    renderer.warnings.clear()
    (rendered,) = renderer.render_all([comparison])
    if isinstance(rendered, Problem):
        # Words that a template takes for reasoning and drops must not be dropped in silence.
        assert rendered.kind in ("chat template", "empty response")
        assert "think>" in "".join(r.text for r in comparison.responses)
        return
    (prompt,) = renderer.prompts([comparison])
    assert not isinstance(prompt, Problem)
    asked = shown(renderer, comparison.prompt, template, add_generation_prompt=True)
    for k, response in enumerate(comparison.responses):
        (answer,) = response.messages
        ids, trained = rendered.group.sequence(k)
        first = int(np.argmax(trained))
        assert trained[first:].all()
        full, expected = shown(renderer, (*comparison.prompt, answer), template), template.trained(answer)
        if template.added:
            full = full.removesuffix("<|im_end|>\n") + template.added
        begins = full.startswith(asked)
        thought, _ = split_reasoning(answer.content)
        if not begins and asked.endswith("<think>\n") and thought:
            # The block that the generation prompt opens holds the reasoning that the finished answer does not show.
            expected = f"{thought}\n</think>\n\n{template.trained(strip_reasoning(answer))}"
            full, begins = asked + expected, True
        start = len(asked) if begins else full.rindex(expected)
        assert full.startswith(expected, start), "the test does not know the template"
        assert spell(renderer.tokenizer, ids[:first]) == full[:start]
        assert spell(renderer.tokenizer, ids) == full[: start + len(expected)]
        assert np.array_equal(prompt, ids[:first]) if begins else 1 in renderer.warnings[ELSEWHERE]
        if answer.content.strip() not in full[start:] and "think>" not in answer.content:
            assert 1 in renderer.warnings[CHANGED]


def shown(renderer: Renderer, turns: Turns, template: Template, **options: Any) -> str:
    """The turns as transformers shows them."""
    dicts: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in turns]
    if template is TEMPLATES["channels"]:  # it has a place of its own for the block that an answer begins with
        fields = [field_reasoning(m) for m in turns]
        dicts = [{"role": m.role, "content": m.content, "thinking": m.reasoning or ""} for m in fields]
    if template is TEMPLATES["parts"]:
        dicts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in dicts]
    apply = renderer.tokenizer.apply_chat_template
    return str(apply(dicts, chat_template=renderer.template, tokenize=False, **options))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60)
@given(data=st.data())
def test_trained_tokens_are_the_answer(name: str, data: st.DataObject) -> None:
    comparison = data.draw(conversations(system=TEMPLATES[name].system))
    check(renderer_of(name), comparison, TEMPLATES[name])


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(data=st.data())
def test_an_answer_that_was_cut_off_has_no_end(name: str, data: st.DataObject) -> None:
    whole = data.draw(conversations(system=TEMPLATES[name].system))
    comparison = replace(whole, responses=tuple(replace(r, cut=True) for r in whole.responses))
    renderer, template = renderer_of(name), TEMPLATES[name]
    (rendered,) = renderer.render_all([comparison])
    thoughts = [split_reasoning(r.messages[0].content)[0] if name == "forgets" else "" for r in whole.responses]
    # What `forgets` removes stands behind its generation prompt, which opens the block for it.
    bare = [
        strip_reasoning(r.messages[0]) if t else r.messages[0] for r, t in zip(whole.responses, thoughts, strict=True)
    ]
    trained = [(f"{t}\n</think>\n\n" if t else "") + template.trained(m) for m, t in zip(bare, thoughts, strict=True)]
    # Of all these templates one has a place of its own for the block that an answer begins with.
    turns = [field_reasoning(m) if name == "channels" else m for m in bare]
    words = [turn.content.strip() for turn in turns]
    if isinstance(rendered, Problem):
        # Words that the template changes, or that end in what it drops, are not what an answer ends with. An answer
        # that is nothing but a reasoning block has no words at all where the template has a field for that.
        ends = [said_of(template, shown, word) for word, shown in zip(words, trained, strict=True)]
        assert "" in words if rendered.kind == "empty response" or (name == "forgets" and "" in words) else None in ends
        return
    for k, (shown, word) in enumerate(zip(trained, words, strict=True)):
        ids, mask = rendered.group.sequence(k)
        assert mask[-1] and decode(renderer.tokenizer, ids[mask]) == said_of(template, shown, word)


def said_of(template: Template, shown: str, words: str) -> str | None:
    """What is shown of an answer up to its last word; None where that is not the last of ``words``."""
    close = template.trained(Message("assistant", "#")).partition("#")[2]
    before = shown.removesuffix(close).rstrip()
    return before if before.endswith(words) else None


def test_a_cut_answer_of_reasoning_alone_is_empty_where_reasoning_has_a_field() -> None:
    for name, words in itertools.product(
        ("channels", "chatml"), ("<think></think>", "<think>\nhm\n</think>\n\n", "<think>")
    ):
        response = Response((Message("assistant", words),), cut=True)
        (rendered,) = renderer_of(name).render_all([Comparison((Message("user", "q"),), (response,), (), row=1)])
        empty = isinstance(rendered, Problem) and rendered.kind == "empty response"
        assert empty == (name == "channels" and "</think>" in words)


@pytest.mark.parametrize("reasoning", ["keep", "strip"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_words_of_a_cut_answer_that_stand_in_the_end_of_a_turn_too(
    name: str, reasoning: Literal["keep", "strip"]
) -> None:
    template, tokenizer = TEMPLATES[name], renderer_of(name).tokenizer
    renderer = Renderer(tokenizer, Rendering(reasoning=reasoning))
    for words in ("e", "end", "im", "|", "s", "t", "so it", "en"):
        response = Response((Message("assistant", words),), cut=True)
        comparison = Comparison((Message("user", "why?"),), (response,), (), row=1)
        ids, mask = renderer.render(comparison).group.sequence(0)
        assert decode(tokenizer, ids[mask]) == said_of(template, template.trained(response.messages[0]), words)
    assert STRIPPED not in renderer.warnings


@pytest.mark.parametrize("name", TEMPLATES)
def test_cut_off_or_not_is_said_by_the_row(name: str) -> None:
    row = {"prompt": [{"role": "user", "content": "why?"}], "responses": ["so it", "so"], "finish": ["length", "stop"]}
    (comparison,) = parse_comparisons([row], "rows")
    assert isinstance(comparison, Comparison) and [r.cut for r in comparison.responses] == [True, False]
    for reason, cut in (("content_filter", True), ("abort", True), ("tool_calls", False)):
        (other,) = parse_comparisons([row | {"finish": [reason, "stop"]}], "rows")
        assert isinstance(other, Comparison) and other.responses[0].cut == cut
    (unknown,) = parse_comparisons([row | {"finish": ["stopped", "stop"]}], "rows")
    assert isinstance(unknown, Problem) and "finish holds 'stopped'; known are stop, " in unknown.what
    assert LAYOUTS["canonical"].write(comparison)["finish"] == ["length", "stop"]
    renderer = renderer_of(name)
    group = renderer.render(comparison).group
    cut, whole = (decode(renderer.tokenizer, ids[mask]) for ids, mask in (group.sequence(0), group.sequence(1)))
    expected = TEMPLATES[name].trained(Message("assistant", "so"))
    assert whole == expected and cut == expected[: expected.rindex("so") + 2] + " it"
    plain = {"prompt": "why", "responses": [" so it", " so"], "finish": ["length", "stop"]}
    (comparison,) = parse_comparisons([plain], "rows")
    assert isinstance(comparison, Comparison)
    group = renderer.render(comparison).group
    eos = renderer.tokenizer.eos_token_id
    assert [int(group.sequence(k)[0][-1]) == eos for k in (0, 1)] == [False, True]


def reasoned(turn: Message) -> str:
    """What minimind's template shows of an answer behind the empty reasoning block of its generation prompt."""
    if "</think>" not in turn.content:
        return turn.content.lstrip("\n") + "<|im_end|>"
    head, tail = turn.content.split("</think>")[0], turn.content.split("</think>")[-1]
    reasoning = head.rstrip("\n").split("<think>")[-1].strip("\n")
    block = f"{reasoning}\n</think>\n\n" if reasoning else ""
    return f"{block}{tail.lstrip(chr(10))}<|im_end|>"


def vision(folder: Path, name: str) -> Template:
    """A template of a vision model on minimind's tokenizer, which has all its marks."""
    text = json.loads((folder / f"data/chat_templates/{name}.tokenizer_config.json").read_text())["chat_template"]
    return Template(text, (), "", TEMPLATES["chatml"].trained)


def plain(end: str) -> Template:
    return Template("", (), "", lambda m: f" {m.content}{end}")


@pytest.mark.parametrize("name", ["minimind", "qwen2.5-vl", "qwen3-vl", "gpt2", "gpt2 chatml", "imdb", "stories"])
def test_real_tokenizers(name: str, shared: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = copy.deepcopy(
        request.getfixturevalue({"qwen2.5-vl": "minimind", "qwen3-vl": "minimind"}.get(name, name.split()[0]))
    )
    template, spell = plain(str(tokenizer.eos_token)), decode
    if name == "minimind":
        template = Template("", (), "", reasoned)
    elif name.startswith("qwen"):
        model = "Qwen2.5-VL-7B-Instruct" if name == "qwen2.5-vl" else "Qwen3-VL-4B-Instruct"
        template = vision(shared, model)
    elif name == "gpt2 chatml":
        template = Template(CHATML, (), "", lambda m: f"{m.content}<|endoftext|>", added="<|endoftext|>")
    elif name == "stories":
        spell = spelled
    renderer = Renderer(tokenizer, Rendering(chat_template=template.text or None))

    @settings(max_examples=30)
    @given(conversations())
    def answers(comparison: Comparison) -> None:
        check(renderer, comparison, template, spell=spell)

    answers()
