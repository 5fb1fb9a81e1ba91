"""What makes rendering fast changes nothing: traces and shared prompts against neither of them."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.small import small_tokenizer
from data.templates import TEMPLATES
from data.test_round_trip import MERGES, conversations, decode, renderer_of, spelled, texts
from prefopt.data.chat import encoding, spans
from prefopt.data.chat.render import Rendered, Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import read_comparisons
from prefopt.data.validate import Problem
from prefopt.records import Comparison, Message, Response


def outcome(rendered: Rendered | Problem) -> object:
    if isinstance(rendered, Problem):
        return rendered
    group = rendered.group
    return [[part.tolist() for part in group.sequence(k)] for k in range(len(group.continuations))]


def slowly(renderer: Renderer, rows: list[Comparison]) -> list[object]:
    """Every response by itself, every text by the template, every place by a probe."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(renderer._template, "_traced", None))
        stack.enter_context(mock.patch.object(renderer._responses._spans, "_frames", []))
        stack.enter_context(mock.patch.object(spans, "REMEMBERED", 0))
        stack.enter_context(mock.patch.object(encoding, "WORTH_SHARING", 10**9))
        return [outcome(x) for x in renderer.render_all(rows)]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25)
@given(data=st.data())
def test_random_rows(name: str, data: st.DataObject) -> None:
    renderer = renderer_of(name)
    rows = data.draw(st.lists(conversations(system=TEMPLATES[name].system), min_size=1, max_size=4))
    with mock.patch.object(encoding, "WORTH_SHARING", 0):
        fast = [outcome(x) for x in renderer.render_all(rows)]
    found = dict(renderer.warnings)
    renderer.warnings.clear()
    assert fast == slowly(renderer, rows) and found == renderer.warnings
    renderer.warnings.clear()


@pytest.mark.parametrize("fixture", ["minimind", "gpt2", "stories"])
def test_real_rows(fixture: str, shared: Path, request: pytest.FixtureRequest) -> None:
    rows = read_comparisons(shared / "data/llamafactory_demo/dpo_en_demo.json").comparisons[::12]
    renderer = Renderer(request.getfixturevalue(fixture))
    assert [outcome(x) for x in renderer.render_all(rows)] == slowly(renderer, rows)


def test_a_pair_takes_no_run_of_the_template_once_it_is_known() -> None:
    renderer = renderer_of("thinking")
    rows = [
        Comparison.pair([Message("user", f"question {i}")], chosen=f"yes {i}", rejected=f"no {i}", row=i)
        for i in range(20)
    ]
    renderer.render(rows[0])
    with mock.patch.object(renderer._template, "_render", wraps=renderer._template._render) as run:
        assert all(isinstance(x, Rendered) for x in renderer.render_all(rows))
        assert run.call_count == 0


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("name", ["chatml", "headers", "twice", "finished"])
def test_responses_of_several_turns(name: str, data: st.DataObject) -> None:
    turns = [Message("assistant", data.draw(texts), trained=data.draw(st.booleans()))]
    for _ in range(data.draw(st.integers(0, 2))):
        turns += [
            Message("user", data.draw(texts)),
            Message("assistant", data.draw(texts), trained=data.draw(st.booleans())),
        ]
    row = Comparison((Message("user", data.draw(texts)),), (Response(tuple(turns)),), (), row=1)
    renderer = renderer_of(name)
    (rendered,) = renderer.render_all([row])
    learned = [TEMPLATES[name].trained(m) for m in turns if m.role == "assistant" and m.trained]
    if isinstance(rendered, Problem):
        assert not learned
        return
    ids, trained = rendered.group.sequence(0)
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))
    runs = [
        decode(renderer.tokenizer, ids[:b])[len(decode(renderer.tokenizer, ids[:a])) :] for a, b in edges.reshape(-1, 2)
    ]
    assert runs == learned


@cache
def plain() -> Renderer:
    return Renderer(small_tokenizer(MERGES))


def check_text(renderer: Renderer, prompt: str, answers: list[str], spell: Any = decode) -> None:
    sides = tuple(Response((Message("assistant", answer),)) for answer in answers)
    row = Comparison((Message("user", prompt),), sides, (), row=1, text=True)
    (rendered,) = renderer.render_all([row])
    if isinstance(rendered, Problem):
        assert rendered.kind == "nothing to train" and not prompt  # one token, and nothing before it
        return
    (asked,) = renderer.prompts([row])
    eos, lead = renderer.tokenizer.eos_token, renderer._lead
    for k, answer in enumerate(answers):
        ids, trained = rendered.group.sequence(k)
        first = int(np.argmax(trained))
        if not isinstance(asked, Problem):
            assert ids[:first].tolist() == asked.tolist() and trained[first:].all()
        bos = "" if prompt.startswith("<s>") or not lead else "<s>"
        end = "" if (prompt + answer).endswith(eos) else eos
        assert spell(renderer.tokenizer, ids) == bos + prompt + answer + end
        if not isinstance(asked, Problem):
            assert spell(renderer.tokenizer, ids[:first]) == bos + prompt


@settings(max_examples=100)
@given(st.one_of(texts, st.just("")), st.lists(texts, min_size=1, max_size=3, unique=True))
def test_plain_text(prompt: str, answers: list[str]) -> None:
    check_text(plain(), prompt, answers)


@pytest.mark.parametrize("fixture", ["minimind", "gpt2", "imdb", "stories"])
def test_plain_text_of_real_tokenizers(fixture: str, request: pytest.FixtureRequest) -> None:
    renderer = Renderer(copy.deepcopy(request.getfixturevalue(fixture)), Rendering())

    @settings(max_examples=40)
    @given(texts, st.lists(texts, min_size=1, max_size=2, unique=True))
    def check(prompt: str, answers: list[str]) -> None:
        check_text(renderer, prompt, answers, spelled if fixture == "stories" else decode)

    check()
