"""Words that earlier versions used for things that have a usual name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefopt.cli import VERBS
from prefopt.core.options import options

ROOT = Path(__file__).parents[1]
BANNED = {
    r"in the mean": "on average",
    r"couples? of (rows|responses|answers)": "pairs",
    r"stands? there": "is, or occurs",
    r"people who judge every item": "annotators per item",
    r"pull (to|towards) the reference": "KL penalty",
    r"earns? nothing": "is clipped",
    r"anew": "again",
    r"likewise": "in the same way",
    r"what (stands|lies) (?!for)\w+": "the text, the rows, the files",
    r"of another make": "that something else wrote",
    r"(cannot|can not) begin": "failed to start",
    r"part of the (prompts|rows)": "fraction of the prompts, of the rows",
    r"a huge number": "a number, or none",
    r"tell progress": "report progress",
    r"(is|are) nobody's": "is not counted",
    r"roads?": "method",
    r"the first there is of": "the first available of",
    r"in spite of": "despite",
    r"something else than": "something other than",
    r"otherwise than": "differently from",
    r"draw equally many": "draw the same number",
    r"most tokens of": "maximum tokens of",
    r"beyond all measure": "too large",
    r"(put (it|them|the \w+) back|go on with it by)": "restore, continue with",
    r"make room": "free some space",
    r"(its )?bytes (do not|of \w+ do not) give the checksum": "the checksum does not match",
    r"run away from": "diverged from",
    r"handed the weights": "sent the weights",
    r"(and|,) \S+ \S+ is none: leave it out": "is not one of them",
}
BANNED_ON_PAGES = {
    r"once, ever": "once",
    r"(go|goes|going|went|gone) on (with|by|from|to|until|where)": "continue",
    r"likel(ier|iest)": "more likely, most likely",
    r"in the place of": "instead of",
    r"folded in": "merged",
    r"made-up": "generated",
    r"pulls? (most|hardly|to)": "has the largest weight",
    r"what (moves|breaks|trains|fits)": "a heading that names the subject",
    r"which model fits": "GPU memory by model",
    r"by us|of our own": "the passive, or the tests' own",
    r"beside what": "and",
}
"""Words of documentation pages; ``src`` and the pages made from it have them in other meanings."""
KEPT = {"src/prefopt/sweeps/points.py", "src/prefopt/core/options.py"}
"""Files that read the names of earlier versions."""
FILES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("src/prefopt/**/*.py", "src/prefopt/**/*.j2", "docs/**/*.md", "examples/**/*.py", "README.md")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("phrase", BANNED)
def test_usual_words_are_used(phrase: str) -> None:
    found = []
    for name in FILES:
        if name in KEPT:
            continue
        text = (ROOT / name).read_text("utf-8")
        found += [f"{name}: {match[0]}" for match in re.finditer(rf"\b{phrase}\b", text, re.IGNORECASE)]
    assert not found, f"write {BANNED[phrase]}: {found}"


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in ("architecture", "cli", "methods")),
    *sorted((ROOT / "docs/guide").glob("*.md")),
]


def test_pages_are_in_plain_words() -> None:
    found = []
    for path in PAGES:
        text = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S))
        for phrase, better in BANNED_ON_PAGES.items():
            found += [
                f"{path.name}: {match[0]!r}, write {better}"
                for match in re.finditer(rf"\b({phrase})\b", text, re.IGNORECASE)
            ]
    assert not found, "\n".join(found)


def test_help_has_no_full_stop_and_is_no_paragraph() -> None:
    for verb, known in VERBS.items():
        for o in options(known.config):
            assert o.help and not o.help.removesuffix("...").endswith("."), f"{verb} {o.flag}"
            assert len(o.help) <= 300, f"{verb} {o.flag}: {len(o.help)} characters"
