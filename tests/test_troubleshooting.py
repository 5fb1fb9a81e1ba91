"""docs/guide/troubleshooting.md names lines that prefopt prints."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "troubleshooting.md"
HEADINGS = re.findall(r"^### `(.+)`$", PAGE.read_text("utf-8"), re.M)


def messages() -> str:
    """The source with texts that go over several lines in one piece, and what is put into them as a blank."""
    source = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    joined = re.sub(r'(Diverged\(\s*f?"[^"]*)",\s*"', r"\1; ", joined)  # which puts its reason and its remedy together
    return " ".join(re.sub(r"\{[^{}]*\}", " ", joined).split())


def test_what_it_explains_is_what_is_printed() -> None:
    printed = messages()
    assert len(HEADINGS) > 20
    parts = [part.strip() for heading in HEADINGS for part in heading.split("...")]
    lines = [" ".join(re.sub(r"\bnan\b", " ", part).split()) for part in parts]
    assert not [line for line in lines if line not in printed], "nothing prints these"
