"""Writes the list of files in docs/architecture.md from the modules' docstrings: python docs/make_architecture.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
PACKAGE = PAGE.parents[1] / "src" / "prefopt"
LIST = re.compile(r"(<!-- files -->\n).*?(<!-- end -->)", re.S)


def written(page: str) -> str:
    """The page with the list between its two marks as the files are now."""
    return LIST.sub(lambda found: f"{found[1]}\n{files()}\n{found[2]}", page)


def files() -> str:
    """Every file with the first sentence of its docstring, by folder."""
    lines: list[str] = []
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        lines.append(f"**{folder.relative_to(PACKAGE.parent)}/**\n")
        for path in sorted(folder.glob("*.py")):
            if text := _first_sentence(path):
                lines.append(f"- `{path.name}`: {text}")
        lines.append("")
    return "\n".join(lines)


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
