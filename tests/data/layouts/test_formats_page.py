"""docs/formats.md says what there is: every layout with a row that is read, every kind of problem."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from prefopt import cli
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/formats.md"


def test_the_page_is_written_from_the_layouts() -> None:
    written = runpy.run_path(str(ROOT / "docs/make_formats.py"))["written"]
    page = PAGE.read_text("utf-8")
    assert written(page) == page, "run: python docs/make_formats.py"


def test_every_row_on_the_page_is_read_as_the_layout_it_stands_under() -> None:
    blocks = re.findall(r"^`([a-z0-9-]+)`\n\n```json\n(.*?)\n```$", PAGE.read_text("utf-8"), re.S | re.M)
    assert [name for name, _ in blocks] != [] and {name for name, _ in blocks} == set(LAYOUTS)
    for name, text in blocks:
        reading = parse_comparisons([json.loads(text)], "page")
        assert reading.layout == name and len(reading.comparisons) == 1


def test_every_kind_of_problem_is_on_the_page() -> None:
    folder = ROOT / "src/prefopt/data"
    source = "\n".join(path.read_text("utf-8") for path in sorted(folder.rglob("*.py")))
    kinds = set(re.findall(r'(?:BadRow|Problem|_Impossible)\(\s*"([a-z ]+)"', source))
    kinds |= set(re.findall(r'yield "([a-z ]+)", ', (folder / "validate.py").read_text("utf-8")))
    rows = re.findall(r"^\| ([a-z ,]+) \|", PAGE.read_text("utf-8"), re.M)
    assert len(kinds) > 20 and not kinds - {kind.strip() for row in rows for kind in row.split(",")}


def test_the_verb_lists_layouts_and_tells_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "layouts"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {re.escape(name)} +\S", listed, re.M) for name in LAYOUTS)
    assert cli.main(["data", "layouts", "Alpaca KTO"]) == 0
    told = capsys.readouterr().out
    assert json.loads(told[told.index("{") :]) == LAYOUTS["alpaca-kto"].example
    assert "also called: kto_tag for label" in told
    assert cli.main(["data", "layouts", "alpaka"]) == 2
    assert capsys.readouterr().err == "prefopt: error: 'alpaka' is not a layout; did you mean alpaca?\n"
