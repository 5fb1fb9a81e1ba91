"""Every layout of rows that is read, by name. Their order is their precedence.

Where a row has the fields of two, the one that stands first is meant: those with more fields come before those with
fewer, and of two with the same fields the one whose shape says more. A row that lacks a field of its file's layout
may still have all fields of a lesser one; :func:`prefopt.data.layouts.recognise.recognise` says what becomes of it.
"""

from __future__ import annotations

import json
import textwrap

from prefopt.core.options import nearest
from prefopt.data.kinds import Want
from prefopt.data.layouts import canonical, llama_factory, providers, public, questions, responses, trl, two_responses
from prefopt.data.layouts.layout import Layout
from prefopt.errors import ConfigError

_ORDER = (
    canonical.BY_INDEX_LAYOUT,
    responses.RANKS,
    canonical.CANONICAL,
    providers.PREFERENCE,
    llama_factory.V1_PAIR,
    *public.PUBLIC,
    responses.SIDES,
    llama_factory.SHAREGPT_RANKING,
    llama_factory.ALPACA_RANKING,
    responses.PAIR,
    trl.PREFERENCE_CHAT,
    trl.PREFERENCE_TEXT,
    llama_factory.MESSAGES_RANKING,
    providers.TRANSCRIPTS,
    trl.IMPLICIT_CHAT,
    trl.IMPLICIT_TEXT,
    two_responses.TWO_CHAT,
    two_responses.TWO_TEXT,
    trl.UNPAIRED_CHAT,
    trl.UNPAIRED_TEXT,
    llama_factory.SHAREGPT_KTO,
    llama_factory.ALPACA_KTO,
    responses.RATING,
    responses.GENERATIONS,
    responses.OUTPUTS,
    responses.COMPLETIONS,
    questions.PAIR_LABELS,
    questions.SOLUTIONS,
    trl.COMPLETION_CHAT,
    trl.COMPLETION_TEXT,
    llama_factory.CONVERSATION,
    llama_factory.DEMONSTRATION,
    llama_factory.V1_MESSAGES,
    providers.MESSAGES,
    questions.ANSWER,
    questions.RAW_TEXT,
    trl.PROMPT_CHAT,
    trl.PROMPT_TEXT,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ORDER}


def named_layout(name: str) -> Layout:
    """The layout of ``--format``; dashes, spaces and underscores are one. Raises :class:`ConfigError`."""
    plain = "-".join(name.replace("_", " ").replace("-", " ").split()).lower()
    if plain not in LAYOUTS:
        known = list(LAYOUTS)
        guess = nearest(plain, known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"{name!r} is no layout{guess}")
    return LAYOUTS[plain]


WIDTH = 100
HEADINGS: dict[Want, str] = {
    "pairs": "Pairs: one response preferred to another",
    "ranking": "K responses: orders, scores, votes, right and wrong",
    "labels": "Labels: a response that is desirable or not",
    "demonstrations": "Demonstrations: a response to learn",
    "prompts": "Prompts alone",
}


def families() -> dict[str, list[Layout]]:
    """All layouts under headings, by what their rows can be used for."""
    return {heading: [x for x in LAYOUTS.values() if x.gives == gives] for gives, heading in HEADINGS.items()}


def list_layouts() -> str:
    """Every layout in two lines: its name and columns, what it holds and who writes it."""
    parts = []
    for heading, layouts in families().items():
        parts.append(heading)
        for x in layouts:
            parts.append(f"  {x.name:24}{columns(x)}")
            parts += textwrap.wrap(f"{x.says} ({x.origin})", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        parts.append("")
    parts.append("Layouts are recognised from all rows of a file, or named with --format NAME; --columns NAME=COLUMN")
    parts.append("names columns. prefopt data layouts NAME shows a row of one.")
    return "\n".join(parts)


def describe_layout(layout: Layout) -> str:
    """All that is known of one layout, with a row of it."""
    lines = [
        f"{layout.name}: {layout.says} ({layout.origin})",
        f"columns: {', '.join(layout.fields)}",
        f"may have: {', '.join(layout.optional) or 'no others that are read'}",
    ]
    for title, names in (("also called", layout.aliases), ("--columns also knows", layout.words)):
        if names:
            lines.append(f"{title}: {', '.join(f'{name} for {field}' for name, field in names.items())}")
    wrapped = [line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    return "\n".join([*wrapped, "a row:", example(layout)])


def columns(layout: Layout) -> str:
    """The columns that a row must have."""
    return ", ".join(layout.fields)


def example(layout: Layout) -> str:
    """The example row as JSON, a column to a line."""
    parts = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in layout.example.items()]
    return "{" + ",\n ".join(parts) + "}"
