"""docs/methods.md and its plots show the losses as they are, and prefopt losses tells the same."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from prefopt.cli import main
from prefopt.losses.common import WEIGHTINGS
from prefopt.losses.declare import LOSSES
from prefopt.losses.published import PUBLISHED, published

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
NAME = re.compile(r"#?[mp][0-9a-f]{10}")  # of a marker or a clipping path: a hash of what it holds


def test_the_page_is_current() -> None:
    page = (DOCS / "methods.md").read_text("utf-8")
    written = runpy.run_path(str(DOCS / "make_methods.py"))["written"]
    assert written(page) == page, "run: python docs/make_methods.py"
    assert written(page.replace("#### simpo", "#### simpoo")) == page
    for name in [*LOSSES, *WEIGHTINGS]:
        assert f"\n#### {name}\n" in page


def test_every_loss_has_a_plot() -> None:
    assert {p.name for p in (DOCS / "plots").glob("*.svg")} == {f"{name}.svg" for name in LOSSES}


@pytest.mark.slow
def test_plots_are_current(tmp_path: Path) -> None:
    """Numbers to a hundredth of a point: their last digits are the machine's."""
    runpy.run_path(str(DOCS / "plot_losses.py"))["draw"](tmp_path)
    drawn, kept = ({p.name for p in folder.glob("*.svg")} for folder in (tmp_path, DOCS / "plots"))
    assert drawn == kept
    for name in sorted(drawn):
        new, old = (NAME.sub("", (folder / name).read_text("utf-8")) for folder in (tmp_path, DOCS / "plots"))
        assert NUMBER.sub("0", new) == NUMBER.sub("0", old), f"{name}: run python docs/make_methods.py"
        numbers = [np.array([float(n) for n in NUMBER.findall(text)]) for text in (new, old)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=0.01, err_msg=f"{name}: run python docs/make_methods.py")


def test_the_list_names_every_loss_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for found in [*LOSSES.values(), *WEIGHTINGS.values()]:
        assert all(part in shown for part in (f" {found.name} ", found.formula, found.when, found.paper))
        for o in found.options:
            assert f"{o.name} " in shown


def test_everything_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name, found in {**LOSSES, **WEIGHTINGS}.items():
        assert main(["losses", name.replace("_", "-")]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert found.formula in shown and found.when in shown, name
        for o in found.options:
            assert f"{o.name}: {o.help}" in shown and o.expects in shown, (name, o.name)


def test_defaults_elsewhere_are_shown_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    known = {name: {o.name for o in found.options} for name, found in {**LOSSES, **WEIGHTINGS}.items()}
    for name, options in PUBLISHED.items():
        assert options.keys() <= known[name], name
    assert main(["losses", "sppo_hard"]) == 0
    assert "default: 0.001; paper: 0.001 (eta 1000); TRL: 0.1)" in " ".join(capsys.readouterr().out.split())
    page = (DOCS / "methods.md").read_text("utf-8")
    assert "| `average` | true or false | false | false | true |" in page, "ipo: the paper's, not TRL's"
    assert published("plackett_luce", "beta") == (None, None)


def test_an_unknown_loss_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "simpoo"]) == 2
    message = capsys.readouterr().err
    assert "'simpoo'; did you mean simpo?" in message and message.count("\n") == 1
