"""Convert text from data to safe HTML: markdown and formulas, without scripts, external resources or links.

>>> str(as_html("**2** <b>x</b> $a_1$"))[:60]
'<p dir="auto"><strong>2</strong> &lt;b&gt;x&lt;/b&gt; <span '
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import latex2mathml.converter
import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markupsafe import Markup

LONGEST_TEXT = 200_000
LONGEST_FORMULA = 2_000
_BLOCKS = ("paragraph_open", "heading_open", "list_item_open", "blockquote_open", "th_open", "td_open")
_MATH = (
    "math mrow mi mn mo ms mtext mspace msup msub msubsup mfrac msqrt mroot mover munder munderover mtable mtr mtd"
    " mstyle mpadded mphantom menclose mfenced"
).split()
_TAGS = set(
    "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s table thead tbody tr th td span div".split()
) | set(_MATH)
_MATH_ATTRIBUTES = set(
    "display mathvariant stretchy fence form lspace rspace minsize maxsize width height depth linethickness columnalign"
    " rowspacing columnspacing notation open close separators accent accentunder displaystyle scriptlevel movablelimits"
    " largeop symmetric separator".split()
)
_ATTRIBUTES = {
    **{tag: {"dir"} for tag in "p h1 h2 h3 h4 h5 h6 li blockquote th td div".split()},
    "pre": {"dir", "tabindex"},
    "ol": {"start"},
    "span": {"class", "title", "tabindex"},
    **dict.fromkeys(_MATH, _MATH_ATTRIBUTES),
}
_CLASSES = {"math", "source", "url", "image", "block"}


def as_html(text: str) -> Markup:
    """Markdown as HTML. Raw HTML is shown as text, images as their alternative text, links as text and address."""
    return as_plain(text) if len(text) > LONGEST_TEXT else _render(text)


def as_plain(text: str) -> Markup:
    """Text as it is, with its white space."""
    return Markup('<div class="plain" dir="auto">') + _clean(text) + Markup("</div>")


@lru_cache(maxsize=2048)
def _render(text: str) -> Markup:
    try:
        found = _MARKDOWN.render(_clean(text))
    except (RecursionError, ValueError, IndexError):  # text that breaks the parser is shown as it is
        return as_plain(text)
    return Markup(nh3.clean(found, tags=_TAGS, attributes=_ATTRIBUTES, attribute_filter=_filter, link_rel=None))


def _clean(text: str) -> str:
    """Replace lone surrogates and control characters, which are invalid in HTML."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", text)


def _filter(tag: str, name: str, value: str) -> str | None:
    return None if name == "class" and value not in _CLASSES else value


@lru_cache(maxsize=2048)
def formula(source: str, display: bool) -> str:
    """MathML of a LaTeX formula with its source as the title; the source as code where it cannot be converted."""
    title = html.escape(source)
    kind = 'class="block" tabindex="0"' if display else 'class="math"'  # a block may scroll, so keys must reach it
    if len(source) <= LONGEST_FORMULA:
        try:
            found = latex2mathml.converter.convert(source, display="block" if display else "inline")
            return f'<span {kind} title="{title}">{found}</span>'
        except Exception:  # for invalid formulas the converter raises any kind of error
            pass
    return f'<code dir="ltr">{title}</code>'


_MATH_DELIMITERS = ((r"\(", r"\)", False), (r"\[", r"\]", True), ("$$", "$$", True))


def _inline_math(state: StateInline, silent: bool) -> bool:
    """``$x$``, ``$$x$$``, ``\\(x\\)`` and ``\\[x\\]``. A dollar before a space, or closing before a digit, is money."""
    text, at = state.src, state.pos
    for opening, closing, display in _MATH_DELIMITERS:
        if text.startswith(opening, at):
            end = text.find(closing, at + len(opening))
            if end > at + len(opening):
                return _push_math(state, silent, text[at + len(opening) : end], end + len(closing), display)
            return False
    if text[at] != "$" or not (found := re.compile(r"\$(?![\s$])((?:\\.|[^$\\\n])+?)(?<!\s)\$(?!\d)").match(text, at)):
        return False
    return _push_math(state, silent, found[1], found.end(), False)


def _push_math(state: StateInline, silent: bool, source: str, end: int, display: bool) -> bool:
    if not source.strip():
        return False
    if not silent:
        token = state.push("math", "span", 0)
        token.content, token.meta = source.strip(), {"display": display}
    state.pos = end
    return True


def _block_math(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula on its own lines, between ``$$`` or ``\\[`` and ``\\]``."""
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]].strip()
    closing = {"$$": "$$", "\\[": "\\]"}.get(first[:2])
    if closing is None or state.is_code_block(start):
        return False
    lines, line = [first[2:]], start
    while not lines[-1].rstrip().endswith(closing):
        line += 1
        if line >= end:
            return False
        lines.append(state.src[state.bMarks[line] : state.eMarks[line]])
    source = "\n".join(lines).rstrip()[: -len(closing)].strip()
    if not source or closing in source:
        return False
    if not silent:
        token = state.push("math_block", "div", 0)
        token.content, token.map = source, [start, line + 1]
    state.line = line + 1
    return True


def _link_close(self: RendererHTML, tokens: Sequence[Token], at: int, *_: object) -> str:
    """The address of a link as text, not to be followed."""
    opening = next(t for t in reversed(tokens[:at]) if t.type == "link_open")
    address = str(opening.attrGet("href") or "")
    return f' <span class="url">({html.escape(address)})</span>' if address else ""


def _code(self: RendererHTML, tokens: Sequence[Token], at: int, *_: object) -> str:
    return f'<pre dir="ltr" tabindex="0"><code>{html.escape(tokens[at].content)}</code></pre>\n'


def _directed(state: Any) -> None:
    """Each block detects its own writing direction."""
    for token in state.tokens:
        if token.type in _BLOCKS:
            token.attrs = {"dir": "auto"}


def _parser() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"])
    markdown.inline.ruler.before("escape", "math", _inline_math)
    markdown.block.ruler.before("fence", "math", _block_math, {"alt": ["paragraph", "blockquote", "list"]})
    markdown.core.ruler.push("directed", _directed)
    markdown.validateLink = lambda url: True  # type: ignore[method-assign]  # an address becomes text
    rules: dict[str, Callable[..., str]] = {
        "image": lambda self, tokens, at, *_: (
            f'<span class="image">[{html.escape(tokens[at].content or "image")}]</span>'
        ),
        "link_open": lambda *_: "",
        "link_close": _link_close,
        **dict.fromkeys(("fence", "code_block"), _code),
        "math": lambda self, tokens, at, *_: formula(tokens[at].content, bool(tokens[at].meta["display"])),
        "math_block": lambda self, tokens, at, *_: f"<div>{formula(tokens[at].content, True)}</div>\n",
    }
    for name, rule in rules.items():
        markdown.add_render_rule(name, rule)
    return markdown


_MARKDOWN = _parser()
