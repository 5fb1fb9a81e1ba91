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
}
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


def test_help_has_no_full_stop_and_is_no_paragraph() -> None:
    for verb, known in VERBS.items():
        for o in options(known.config):
            assert o.help and not o.help.removesuffix("...").endswith("."), f"{verb} {o.flag}"
            assert len(o.help) <= 300, f"{verb} {o.flag}: {len(o.help)} characters"
