"""Text from data as safe HTML: markdown and formulas, nothing that runs, loads or leads elsewhere.

>>> str(as_html("**2** <b>x</b> $a_1$"))[:60]
'<p dir="auto"><strong>2</strong> &lt;b&gt;x&lt;/b&gt; <span '
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

from prefopt.studies.items import Item

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
    "p": {"dir"},
    **{tag: {"dir"} for tag in ("h1", "h2", "h3", "h4", "h5", "h6", "li", "blockquote", "th", "td", "div")},
    "pre": {"dir", "tabindex"},
    "ol": {"start"},
    "span": {"class", "title", "tabindex"},
    **dict.fromkeys(_MATH, _MATH_ATTRIBUTES),
}
_CLASSES = {"math", "source", "url", "image", "block"}


def as_html(text: str) -> Markup:
    """Markdown as HTML for a page. Raw HTML is shown as text, images as their words, links as text and address."""
    if len(text) > LONGEST_TEXT:
        return as_plain(text)
    return _cached(text)


def as_plain(text: str) -> Markup:
    """Text as it stands, white space and all."""
    return Markup('<div class="plain" dir="auto">') + _clean(text) + Markup("</div>")


@lru_cache(maxsize=2048)
def _cached(text: str) -> Markup:
    try:
        found = _MARKDOWN.render(_clean(text))
    except (RecursionError, ValueError, IndexError):  # a text made to break the parser is shown as it stands
        return as_plain(text)
    return Markup(nh3.clean(found, tags=_TAGS, attributes=_ATTRIBUTES, attribute_filter=_filter, link_rel=None))


def _clean(text: str) -> str:
    """Without halves of surrogate pairs and control characters, which HTML cannot say."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", text)


def _filter(tag: str, name: str, value: str) -> str | None:
    return None if name == "class" and value not in _CLASSES else value


@lru_cache(maxsize=2048)
def formula(source: str, display: bool) -> str:
    """MathML of a LaTeX formula with its source as the title; the source as code where it cannot be read."""
    title = html.escape(source)
    kind = 'class="block" tabindex="0"' if display else 'class="math"'  # what may scroll can be reached by keys
    if len(source) <= LONGEST_FORMULA:
        try:
            found = latex2mathml.converter.convert(source, display="block" if display else "inline")
            return f'<span {kind} title="{title}">{found}</span>'
        except Exception:  # the converter raises whatever it meets, for any text that is no formula
            pass
    return f'<code dir="ltr">{title}</code>'


# -- formulas in markdown ------------------------------------------------------------------------------------------

_PAIRS = ((r"\(", r"\)", False), (r"\[", r"\]", True), ("$$", "$$", True))


def _inline_math(state: StateInline, silent: bool) -> bool:
    """``$x$``, ``$$x$$``, ``\\(x\\)`` and ``\\[x\\]``. A dollar before a space, or one that closes before a digit, is
    money."""
    text, at = state.src, state.pos
    for opening, closing, display in _PAIRS:
        if text.startswith(opening, at):
            end = text.find(closing, at + len(opening))
            if end > at + len(opening):
                return _found(state, silent, text[at + len(opening) : end], end + len(closing), display)
            return False
    if text[at] != "$" or not (found := re.compile(r"\$(?![\s$])((?:\\.|[^$\\\n])+?)(?<!\s)\$(?!\d)").match(text, at)):
        return False
    return _found(state, silent, found[1], found.end(), False)


def _found(state: StateInline, silent: bool, source: str, end: int, display: bool) -> bool:
    if not source.strip():
        return False
    if not silent:
        token = state.push("math", "span", 0)
        token.content, token.meta = source.strip(), {"display": display}
    state.pos = end
    return True


def _block_math(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula on lines of its own, between ``$$`` or ``\\[`` and ``\\]``."""
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]].strip()
    closing = {"$$": "$$", "\\[": "\\]"}.get(first[:2])
    if closing is None or state.is_code_block(start):
        return False
    lines, line = [first[2:]], start
    while not (lines[-1].rstrip().endswith(closing)):
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


def _image(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Mapping[str, Any]) -> str:
    words = html.escape(tokens[at].content or "image")
    return f'<span class="image">[{words}]</span>'


def _link_close(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Mapping[str, Any]) -> str:
    """The address behind the words of a link, to be read and not to be followed."""
    opening = next(t for t in reversed(tokens[:at]) if t.type == "link_open")
    address = str(opening.attrGet("href") or "")
    return f' <span class="url">({html.escape(address)})</span>' if address else ""


def _plain_fence(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Mapping[str, Any]) -> str:
    return f'<pre dir="ltr" tabindex="0"><code>{html.escape(tokens[at].content)}</code></pre>\n'


def _directed(state: Any) -> None:
    """Every block finds its own direction of writing."""
    for token in state.tokens:
        if token.type in _BLOCKS:
            token.attrs = {"dir": "auto"}


def _any_link(url: str) -> bool:
    """No link is ever followed: its address is text."""
    return True


def _built() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"])
    markdown.inline.ruler.before("escape", "math", _inline_math)
    markdown.block.ruler.before("fence", "math", _block_math, {"alt": ["paragraph", "blockquote", "list"]})
    markdown.core.ruler.push("directed", _directed)
    markdown.validateLink = _any_link  # type: ignore[method-assign]
    rules = {
        "image": _image,
        "link_open": lambda *_: "",
        "link_close": _link_close,
        "fence": _plain_fence,
        "code_block": _plain_fence,
        "math": lambda self, tokens, at, *_: formula(tokens[at].content, bool(tokens[at].meta["display"])),
        "math_block": lambda self, tokens, at, *_: f"<div>{formula(tokens[at].content, True)}</div>\n",
    }
    for name, rule in rules.items():
        markdown.add_render_rule(name, rule)
    return markdown


_MARKDOWN = _built()


LETTERS = "ABCDEFGHI"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: ``role``, its words as HTML, its reasoning, and the functions it calls as text."""

    role: str
    html: Markup
    reasoning: Markup | None
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """A response on the page: ``place`` counts from 0, ``letter`` is its name there, ``source`` its text as it is."""

    place: int
    letter: str
    turns: tuple[Turn, ...]
    source: str


@dataclass(frozen=True, slots=True)
class ItemView:
    """A prompt and its responses in the order shown."""

    prompt: tuple[Turn, ...]
    tools: tuple[str, ...]
    sides: tuple[Side, ...]


def view_of(item: Item, shown: Sequence[int]) -> ItemView:
    """What a page shows of an item."""
    row = item.row
    given = row["prompt"]
    plain = isinstance(given, str)
    prompt = (_plain_turn("user", given),) if plain else tuple(_turn(m) for m in given)
    sides = []
    for place, number in enumerate(shown):
        response = row["responses"][number]
        turns = (_plain_turn("assistant", response),) if plain else tuple(_turn(m) for m in response)
        source = response if plain else "\n\n".join(str(m.get("content") or "") for m in response)
        sides.append(Side(place, LETTERS[place], turns, source))
    tools = tuple(_pretty(tool) for tool in row.get("tools") or ())
    return ItemView(tuple(t for t in prompt if t.html or t.calls or t.reasoning), tools, tuple(sides))


def _turn(message: Mapping[str, Any]) -> Turn:
    reasoning = message.get("reasoning_content")
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        calls.append(f"{function.get('name', '')}({_pretty(function.get('arguments', ''))})")
    content = str(message.get("content") or "")
    return Turn(
        str(message["role"]),
        as_html(content) if content else Markup(),
        as_html(reasoning) if reasoning else None,
        tuple(calls),
    )


def _plain_turn(role: str, text: str) -> Turn:
    return Turn(role, as_plain(text) if text else Markup(), None, ())


def _pretty(text: str) -> str:
    try:
        return json.dumps(json.loads(text), indent=1, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
