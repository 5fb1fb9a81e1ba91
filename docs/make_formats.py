"""Writes the descriptions of layouts in docs/formats.md, from the layouts themselves: python docs/make_formats.py."""

from __future__ import annotations

import re
from pathlib import Path

from prefopt.data.layouts import LAYOUTS, example, families
from prefopt.data.layouts.layout import Layout

PAGE = Path(__file__).with_name("formats.md")
MARKS = re.compile(r"(<!-- (layouts|precedence) -->\n).*?(<!-- end -->)", re.S)


def written(page: str) -> str:
    """The page with the text between its marks made from the layouts."""
    precedence = " > ".join(f"`{name}`" for name in LAYOUTS) + "\n"
    layouts = "\n".join(_family(*family) for family in families(LAYOUTS.values()).items())
    parts = {"layouts": layouts, "precedence": precedence}
    return MARKS.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}", page)


def _family(heading: str, layouts: list[Layout]) -> str:
    lines = [f"### {heading}\n", "| layout | columns | may have | a row is | from |", "| --- | --- | --- | --- | --- |"]
    for x in layouts:
        columns, more = ", ".join(_called(x)), ", ".join(f"`{name}`" for name in x.optional)
        lines.append(f"| `{x.name}` | {columns} | {more} | {x.description} | {x.origin} |")
    blocks = [f"`{x.name}`\n\n```json\n{example(x)}\n```\n" for x in layouts]
    return "\n".join([*lines, "", *blocks])


def _called(x: Layout) -> list[str]:
    """The fields, each with its other names."""
    others = {name: [a for a, of in x.aliases.items() if of == name] for name in x.fields}
    return [" or ".join(f"`{called}`" for called in (name, *others[name])) for name in x.fields]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
