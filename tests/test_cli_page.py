"""docs/cli.md shows the options as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

from prefopt.cli import VERBS
from prefopt.core.options import options

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_tables_of_options_are_current() -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    written = runpy.run_path(str(DOCS / "make_cli.py"))["written"]
    assert written(page) == page, "run: python docs/make_cli.py"
    for verb in VERBS:
        assert not options(VERBS[verb].config) or f"<!-- options of prefopt {verb} -->" in page, verb
    assert written(page.replace("| `--beta` |", "| `--betta` |")) == page


def test_the_list_of_files_is_current() -> None:
    page = (DOCS / "architecture.md").read_text("utf-8")
    written = runpy.run_path(str(DOCS / "make_architecture.py"))["written"]
    assert written(page) == page, "run: python docs/make_architecture.py"
