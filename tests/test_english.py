"""Phrases that earlier versions had and that no engineer of the field would write: none comes back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt.cli import VERBS
from prefopt.core.options import options

ROOT = Path(__file__).resolve().parents[1]
BANNED = {
    r"\bin the mean\b": "on average",
    r"\broads?\b": "method",
    r"\bcouples?\b": "pairs",
    r"\btell progress\b": "print progress",
    r"\bpeople who judge every item\b": "annotators per item",
    r"\bpart of the (prompts|rows|steps)\b": "fraction",
    r"\bnothing is known of\b": "unknown",
    r"\bstands? there twice\b": "duplicate",
    r"\bhuge number clips\b": "turns clipping off",
    r"\bis nobody's\b": "is excluded",
    r"\banew\b": "again",
    r"\bmend (it|that)\b": "fix it",
    r"\bthe first there is of\b": "the first available of",
}
"""A pattern, and what to write."""
OLD_NAMES = re.compile(r"[\"'`]roads?[\"'`]")
"""Names that files of earlier versions have."""


def found(text: str) -> Iterator[str]:
    """Each banned phrase of a text, with what to write in its place."""
    plain = OLD_NAMES.sub("", text)
    for pattern, better in BANNED.items():
        for match in re.finditer(pattern, plain, re.IGNORECASE):
            yield f"{match[0]!r}: write {better!r}"


def sources() -> Iterator[Path]:
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))
    yield from (ROOT / "docs").glob("*.md")
    yield from (ROOT / "docs/guide").glob("*.md")
    yield from (ROOT / "src/prefopt").rglob("*.py")
    yield from (ROOT / "src/prefopt").rglob("*.j2")


def test_no_page_help_or_message_has_a_banned_phrase() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sources()
        if not path.name.endswith(".zh-CN.md")
        for line in found(path.read_text("utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_help_is_short_and_starts_alike() -> None:
    """No full stop at the end, no sentence with an article at the beginning, and at most 300 characters."""
    for verb, known in VERBS.items():
        for o in options(known.config):
            assert o.help and not o.help.removesuffix("...").endswith("."), f"{verb} {o.flag}"
            assert len(o.help) <= 300, f"{verb} {o.flag}: {len(o.help)} characters"
            assert not re.match(r"[A-Z][a-z]+ (the|a|an)\b", o.help), f"{verb} {o.flag}"


@pytest.mark.parametrize("text", ["0.5 in the mean", "two roads of training", "tokenised anew", "Couples of rows"])
def test_a_banned_phrase_is_found(text: str) -> None:
    assert list(found(text)) and not list(found('the field "road" of a file'))
