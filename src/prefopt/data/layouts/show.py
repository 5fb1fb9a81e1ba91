"""What a person is told of layouts: in a terminal here, and in docs/formats.md from the same declarations."""

from __future__ import annotations

import json
import textwrap

from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.layout import Layout
from prefopt.data.validate import DataKind

WIDTH = 100
HEADINGS: dict[DataKind, str] = {
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
