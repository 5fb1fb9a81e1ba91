"""Templates of strangers: bounded in time and memory, and in ordinary use what transformers makes of them."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from data.templates import TEMPLATES
from prefopt.data.chat import sandbox
from prefopt.data.chat.template import ChatTemplate, Rendering, Unrenderable
from prefopt.errors import ModelError
from prefopt.records import Message

DOUBLED = 40
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that shows": "{% set x = 'a' * 1000000 %}{% for i in range(90000) %}{{ x }}{% endfor %}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "a macro without end": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(3) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "times": "{{ 'A' * 3000000000 }}",
    "times, from the right": "{% set n = 3000000000 %}{{ n * ['a', 'b'] }}",
    "powers": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set x = 3 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "doubled by ~": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * DOUBLED + "{{ x }}",
    "doubled by +": "{% set x = 'ab' %}" + "{% set x = x + x %}" * DOUBLED + "{{ x }}",
    "doubled by blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * DOUBLED + "{{ x }}",
    "doubled lists": "{% set x = [1] %}" + "{% set x = x + x %}" * DOUBLED + "{{ x | length }}",
    "shared lists": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "shared lists as text": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x | tojson | length }}",
    "shared lists compared": "".join(f"{{% set {v} = [1] %}}" + f"{{% set {v} = [{v}, {v}] %}}" * 60 for v in "xy")
    + "{{ x == y }}",
    "shared tuples as a key": "{% set x = (1,) %}" + "{% set x = (x, x) %}" * 60 + "{{ {x: 1} | length }}",
    "shared lists that are tested": "".join(
        f"{{% set {v} = [1] %}}" + f"{{% set {v} = [{v}, {v}] %}}" * 60 for v in "xy"
    )
    + "{{ x is eq y }}",
    "sorted texts": "{% set b = 'A' * 9000000 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(1000) %}{% set ns.l = ns.l + [b] %}{% endfor %}{{ ns.l | map('string') | sort | length }}",
    "%": "{{ '%999999999d' % 1 }}",
    "% with a width": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format with a width": "{{ '{:{}}'.format(1, 999999999) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "indent": "{{ ('\n' * 1000000) | indent('x' * 1000000) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "a filter that replaces": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ range(99999) | map('string') | join('a' * 100000) }}",
    "a method that joins": "{{ ('a' * 100000).join(range(99999) | map('string') | list) }}",
    "wordwrap": "{{ ('a' * 60000) | wordwrap(1, wrapstring='b' * 60000) }}",
    "sum": "{% set b = range(99999) | list %}{{ ([b] * 30000) | sum(start=[]) | length }}",
    "slices that are kept": "{% set b = range(99999) | list %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(99999) %}{% set ns.l = [ns.l, b[:]] %}{% endfor %}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "round": "{{ 5 | round(10 ** 8, 'ceil') }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "json": "{{ {'a': 'b'} | tojson(indent=10 ** 9) }}",
    "a date": "{{ strftime_now('%Y' * 100000) }}",
    "translate": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "negations": "{{ " + "not " * 20000 + "1 }}",
}


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """A gigabyte more than now, so that what is not bounded fails here and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(small_tokenizer(), Rendering(chat_template=source))


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_without_end_is_refused_soon(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source != ENDLESS["loops in loops"]:  # that one shows how long all steps take
        monkeypatch.setattr(sandbox, "STEPS", sandbox.STEPS // 10)
    asked = (Message("user", "q"), Message("assistant", "a"))
    start = time.monotonic()
    with pytest.raises((Unrenderable, ModelError)) as caught:
        template("{{ messages[0].content }}" + source).apply(asked)
    assert time.monotonic() - start < 10 and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_template_that_never_ends_does_not_cost_seconds_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "STEPS", 1000)
    endless = template(
        "{{ messages[0].content }}{% if 'row' in messages[0].content %}"
        "{% for a in range(99999) %}{% endfor %}{% endif %}"
    )
    with pytest.raises(ModelError, match="--chat-template"):
        for n in range(10):
            with pytest.raises(Unrenderable):
                endless.apply((Message("user", f"row {n}"),))


def test_a_clock_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.01)
    with pytest.raises(ModelError, match="seconds"):
        template("{% for a in range(99999) %}{{ messages }}{% endfor %}").apply((Message("user", "q"),))


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize("test", ["x == y", "'b' in x", "'b' is in x", "x is eq y", "x is lower", "l == m"])
def test_long_steps_of_a_loop_do_not_outlast_the_clock(test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    values = "{% set x = 'a' * 30000000 %}{% set y = 'a' * 29999999 ~ 'a' %}"
    values += "{% set l = range(99999) | list %}{% set m = range(99999) | list %}"
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"seconds|steps"):
        body = f"{{% if {test} %}}{{% endif %}}{{{{ messages }}}}"
        template(values + f"{{% for i in range(99999) %}}{body}{{% endfor %}}").show((Message("user", "q"),))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("source", [t.text for t in TEMPLATES.values()], ids=TEMPLATES.keys())
def test_ordinary_templates_give_what_transformers_gives(source: str) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"a <b> é {n}\n" * 3} for n in range(5)]
    given: dict[str, Any] = {"messages": turns, "tools": None, "bos_token": "<s>", "eos_token": "</s>"}

    def made(render: Any) -> str:
        try:
            return str(render())
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    for generation in (True, False):
        given["add_generation_prompt"] = generation
        known = made(lambda: _compile_jinja_template(source).render(**given))
        assert made(lambda: sandbox.render(sandbox.compiled(source), **given)) == known


def test_what_bounds_touch_gives_what_jinja_gives() -> None:
    """Everything that is taken over, in ordinary use."""
    source = (
        "{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ none ~ [1] }}{{ loop.last }}{{ loop.length }}{% endfor %}"
        "{% for x in 'abc' if x != 'b' %}{{ loop.index }}{{ x }}{% else %}none{% endfor %}"
        "{% for x in missing %}{% else %}nothing{% endfor %}{{ [1, 2, 3][1:] }}{{ 'abc'[:-1] }}{{ 'x' * 3 }}"
        "{% for x in [1, 2, 3] | map('string') %}{{ x }}{% if loop.last %}!{% endif %}{% endfor %}"
        "{{ 7 % 4 }}{{ '%s-%03d' % ('a', 5) }}{{ '{}{:>4}'.format('a', 'b') }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 1.5 * 2 }}"
        "{{ ['a', 'b'] | join(', ') }}{{ 'ab' | replace('a', 'xx') }}{{ 'a' | center(5) }}"
        "{{ {'k': [1]} | tojson(indent=2) }}"
        "{{ [1, 2] | sum }}{{ [[1], [2]] | sum(start=[]) }}{{ 'a\nb' | indent(2) }}{{ [1, 2, 3] | batch(2, 0) | list }}"
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}c{% endcall %}"
        "{% set ns = namespace(x=1) %}{% for i in range(3) %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}"
        "{{ 'a' in 'cat' }}{{ [1] == [1] }}{{ 'a,b'.split(',') }}{{ 3.14159 | round(2) }}"
        "{% generation %}g{% endgeneration %}"
    )
    from transformers.utils.chat_template_utils import _compile_jinja_template

    assert sandbox.render(sandbox.compiled(source)) == _compile_jinja_template(source).render()
