"""Text from data on a page: readable where it is text, inert where it is not."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import hypothesis.strategies as st
from hypothesis import given, settings
from jinja2 import Environment, PackageLoader

from collect.hostile import TEXTS
from prefopt.collect.markdown import _MATH_ATTRIBUTES, _TAGS, as_html, as_plain
from prefopt.collect.views import view_of


class Seen(HTMLParser):
    """Every tag and attribute of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_hostile_text_becomes_nothing_that_runs_or_loads() -> None:
    for text in TEXTS:
        for html in (as_html(text), as_html(f"before {text} after"), as_html(f"> 1. {text}"), as_plain(text)):
            seen = Seen(str(html))
            assert set(seen.tags) <= _TAGS, text
            names = {name for name, _ in seen.attributes}
            assert not any(n.startswith("on") or n in ("href", "src", "style", "id", "name") for n in names), text
            assert "\x00" not in html, text


@settings(max_examples=150)
@given(st.text(alphabet=st.sampled_from("<>&\"'`$\\{}[]()!_*#-=/ \n\tabmtext0scripthref:|~")))
def test_any_text_keeps_to_the_tags_allowed(text: str) -> None:
    seen = Seen(str(as_html(text)))
    assert set(seen.tags) <= _TAGS
    known = {"dir", "tabindex", "start", "class", "title"} | _MATH_ATTRIBUTES
    assert {name for name, _ in seen.attributes} <= known


SHOWN = {
    "**bold** and `code`": '<p dir="auto"><strong>bold</strong> and <code>code</code></p>',
    "| a |\n|---|\n| 1 |": '<td dir="auto">1</td>',
    "```python\nx < 1\n```": '<pre dir="ltr" tabindex="0"><code>x &lt; 1\n</code></pre>',
    "[words](https://example.org/a?b=1&c)": 'words <span class="url">(https://example.org/a?b=1&amp;c)</span>',
    "![a cat](https://example.org/cat.png)": '<span class="image">[a cat]</span>',
    "costs $5 and $6": "costs $5 and $6",
    "a$x$b": 'title="x"',
    r"\(x^2\)": 'title="x^2"',
    "1. a\n2. b": "<ol>",
    "<b>raw</b>": "&lt;b&gt;raw&lt;/b&gt;",
    "`$x$`": "<code>$x$</code>",
}


def test_text_is_shown_as_it_is_meant() -> None:
    for text, html in SHOWN.items():
        assert html in str(as_html(text)), text


def test_formulas_are_mathml_with_their_source_or_the_source_alone() -> None:
    for text in ("$$\nx^2 + 1\n$$", "$$x^2 + 1$$", "\\[\nx^2\n+ 1\n\\]", "text \\[x^2 + 1\\] more"):
        html = str(as_html(text))
        assert "<math" in html and "<msup>" in html and re.search(r'title="x\^2\s\+ 1"', html), text
    for text in (r"$\left($", "$" + "x" * 3000 + "$"):
        html = str(as_html(text))
        assert "<math" not in html and text.strip("$")[:20] in html, text


def test_plain_text_keeps_its_white_space() -> None:
    assert as_plain("a\n  **b** <i>") == '<div class="plain" dir="auto">a\n  **b** &lt;i&gt;</div>'
    assert "plain" in as_html("x" * 200_001)


def test_names_in_charts_are_escaped() -> None:
    charts = Environment(loader=PackageLoader("prefopt.collect"), autoescape=True).get_template("charts.html").module
    drawn = charts.bars([("<script>", 1)], '"><script>')  # type: ignore[attr-defined]
    assert "&lt;script" in drawn and "<script" not in drawn


def test_tools_and_their_calls_are_shown_indented_and_as_they_are_where_they_are_no_json() -> None:
    call = {"function": {"name": "look", "arguments": '{"a": 2}'}}
    row = {
        "prompt": [{"role": "user", "content": "weather?"}],
        "tools": ['{"name": "look", "x": 1}', "not json"],
        "responses": [
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [call],
                }
            ],
            [{"role": "assistant", "content": "sunny"}],
        ],
    }
    view = view_of(SimpleNamespace(row=row, origins=(None, None)), [0, 1])
    assert view.tools == ('{\n "name": "look",\n "x": 1\n}', "not json")
    assert view.responses[0].messages[0].calls == ('look({\n "a": 2\n})',)
    assert view.responses[1].messages[0].calls == ()
