"""A conversation that is known without running the template is what running it gives."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.small import small_tokenizer
from data.templates import TEMPLATES
from data.test_round_trip import conversations, renderer_of, texts
from prefopt.data.chat import tracing
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import ChatTemplate, Rendering, Turns, Unrenderable
from prefopt.records import Comparison, Message

# What depends on words in ways that are easily overlooked. True: such a template can be traced all the same.
SLY = {
    "{% for m in messages %}{{ m.content }}|{% endfor %}": True,
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '|' }}{% endfor %}": True,
    "{% for m in messages %}{% if '\\n' in m.content %}!{% endif %}{{ m.content | trim }}{% endfor %}": True,
    "{% for m in messages %}{{ m.content.strip().replace('a', 'a') }}{% endfor %}": True,
    "{% for m in messages %}{% if m.content == 'a' %}!{% endif %}{{ m.content }}{% endfor %}": True,
    "{% for m in messages %}{% if m.content.startswith(('a', ' ')) %}!{% endif %}{{ m.content }}{% endfor %}": True,
    "{% macro w(x) %}{{ x }}{% endmacro %}"
    "{% for m in messages %}{% set x = w(m.content) | trim %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": True,
    "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all }}": True,
    "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.content %}{% endfor %}{{ n.x }}": True,
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}": True,
    "{% for m in messages %}{{ loop.index0 % 2 }}{{ '%s!' % m.role }}{{ m.content }}{% endfor %}": True,
    "{% for m in messages %}{{ m.content if m.role in roles | default('user assistant') }}{% endfor %}": True,
    "{% for m in messages %}{% if m.content in ['a', 'b'] %}!{% endif %}{{ m.content }}{% endfor %}": True,
    "{% for m in messages %}{% set x = m.content ~ '' %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": True,
    "{% for m in messages %}{{ [m.role, 'x'] | join }}{{ m.content }}{% endfor %}": True,
    "{% for m in messages %}{% filter trim %}{{ m.content }}{% endfilter %}{% endfor %}": True,
    "{% for m in messages %}{{ m.content.split('a')[-1].lstrip() }}|{% endfor %}": True,
    # Each of these is run for every row, or traced and found to depend on what the words are.
    "{% for m in messages %}{{ m.content | tojson }}{% endfor %}": False,
    "{{ messages | tojson }}": False,
    "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content[:1] }}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content.split() | first }}|{{ m.content.partition('a')[0] }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content.split('a') | length }}|{{ m.content }}{% endfor %}": True,
    "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}": False,
    "{% for m in messages %}{% if m.content is sequence %}!{% endif %}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% set x = m.content ~ 'b' %}{% if 'ab' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content | safe + '<' }}{% endfor %}": False,
    "{% for m in messages %}{{ '<{}>'.format(m.content) }}{% endfor %}": False,
    "{% for m in messages %}{{ '0a'.replace('a', m.content) }}{% endfor %}": False,
    "{% for m in messages %}{{ messages | map(attribute='content') | join('') }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content }}{{ '!' if 'x' in m.content in ['a', 'ab'] }}{% endfor %}": False,
    "{% for m in messages %}{% set x = '%s' % (m.content,) %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% for m in messages %}{% set x = '%s' % m.content %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% for m in messages %}{% if m.content in 'a 0 ab' %}!{% endif %}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% if m.content is in 'a 0 ab' %}!{% endif %}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% if 'ab0a'.startswith(m.content) %}!{% endif %}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% if m.content | int(7) == 7 %}!{% endif %}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% set x = [m.content] | join %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% for m in messages %}{% set x = ''.join([m.content]) %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% for m in messages %}{% set x = m.content + 'b' %}{% if 'ab' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% macro w(x) %}{{ '<' ~ x }}{% endmacro %}"
    "{% for m in messages %}{% set x = w(m.content) %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% macro w(x) %}-{{ x }}{% endmacro %}"
    "{% for m in messages %}{% set x = w(m.content) %}{% if 'a' in x %}!{% endif %}{{ x }}{% endfor %}": False,
    "{% for m in messages %}{% if m.content is in ['a', 'b'] %}!{% endif %}{{ m.content }}{% endfor %}": True,
    "{% set seen = {} %}{% for m in messages %}{% if {m.content: 1} %}{{ m.content }}{% endif %}{% endfor %}": False,
    "{% for m in messages %}{{ m.content if m.content < 'b' else 'B' + m.content }}{% endfor %}": False,
    "{% for m in messages if m.content != messages[0].content or loop.first %}{{ m.content }}{% endfor %}": False,
}


def shown(template: ChatTemplate, turns: Turns, generation: bool) -> str:
    try:
        return template.apply(turns, generation=generation)
    except Unrenderable as error:
        return f"refused: {error}"


def both(template: ChatTemplate, turns: Turns) -> None:
    for generation in (False, True):
        with mock.patch.object(template, "_traced", None):
            run = shown(template, turns, generation)
        assert shown(template, turns, generation) == run


@cache
def template_of(text: str, **variables: object) -> ChatTemplate:
    return ChatTemplate(small_tokenizer(), Rendering(chat_template=text, variables=variables))


def count_runs(template: ChatTemplate, rows: list[Turns]) -> int:
    with mock.patch.object(template, "_render", wraps=template._render) as run:
        for turns in rows:
            shown(template, turns, False)
    return run.call_count


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=50)
@given(data=st.data())
def test_templates(name: str, data: st.DataObject) -> None:
    comparison = data.draw(conversations(system=TEMPLATES[name].system))
    both(renderer_of(name)._template, comparison.prompt + comparison.responses[0].messages)


@settings(max_examples=40)
@given(
    words=st.lists(
        st.one_of(st.sampled_from(["a", "ab", " a", "0", "b", "a\n", "", " "]), texts), min_size=1, max_size=3
    )
)
def test_sly_templates(words: list[str]) -> None:
    for text in SLY:
        both(template_of(text), tuple(Message("user", word) for word in words))


def test_what_can_be_traced_is_run_once() -> None:
    rows = [(Message("user", f"x{i}"), Message("assistant", f"y{i}")) for i in range(10)]
    for text, traced in SLY.items():
        runs = 1 if traced else 10 + (tracing.compiled(text) is not None)
        assert count_runs(ChatTemplate(small_tokenizer(), Rendering(chat_template=text)), rows) == runs, text


def test_variables_and_dates_are_part_of_it() -> None:
    text = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content if loud else m.content | trim }}{% endfor %}"
    one = ChatTemplate(small_tokenizer(), Rendering(chat_template=text, variables={"loud": True}, date="2024-05-01"))
    other = ChatTemplate(small_tokenizer(), Rendering(chat_template=text, variables={"loud": False}, date="2025-05-01"))
    for _ in range(2):
        assert one.apply((Message("user", " a"),)) == "2024 a" and other.apply((Message("user", " a"),)) == "2025a"


def test_real_templates_are_traced(shared: Path, minimind: Any) -> None:
    files = sorted((shared / "data/chat_templates").glob("*.tokenizer_config.json"))
    sources = [None, *(json.loads(file.read_text("utf-8"))["chat_template"] for file in files)]
    assert len(sources) == 3
    for source in sources:
        template = Renderer(minimind, Rendering(chat_template=source))._template
        rows = [(Message("user", f"x{i}"), Message("assistant", f"y{i}")) for i in range(10)]
        assert count_runs(template, rows) == 1

        @settings(max_examples=50)
        @given(conversations())
        def same(comparison: Comparison) -> None:
            both(template, comparison.prompt + comparison.responses[0].messages)  # noqa: B023 (called at once)

        same()
