"""The report in a real browser without network, and under html-validate: nothing is run, asked for or complained of."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import prefopt
from collect.hostile import TEXTS
from evaluate.small import write_run
from evaluate.test_report import compared, sweep
from train.small import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
pytest.importorskip("matplotlib")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MORE = [
    "\u202eright to left",
    "\ud800 half a pair",
    "\x1b[31m\x07\x00",
    "w" * 50_000,
    "字" * 3000,
    "$\\frac{$ _x",
    "a\n" * 900,
]


def hostile_report(tmp_path: Path) -> Path:
    """Texts that were written to run, load or break, in every place that a report shows."""
    texts = [*TEXTS, *MORE]
    for name in "ab":
        rows = [{"prompt": f"{i} {t}", "responses": [t + name]} for i, t in enumerate(texts)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    whole = " ".join(t for t in texts[:30] if len(t) < 90)
    run = write_run(
        tmp_path / "run", options={"model": whole, "data": texts[:9]}, record={"environment": {whole: {"x": whole}}}
    )
    swept = sweep(tmp_path / "swept", whole)
    found = prefopt.compare(
        tmp_path / "a.jsonl", tmp_path / "b.jsonl", judge="length", output=str(tmp_path / "judged.jsonl"), json=True
    ).to_dict()
    text = json.dumps(found | {"judge": whole, "notes": texts[:40], "command": whole})
    (tmp_path / "c.json").write_text(text.replace(json.dumps(str(tmp_path / "a.jsonl"))[1:-1], json.dumps(whole)[1:-1]))
    # Every pair is shown, so that every text is.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.reports.comparison.SHOWN", 1000)
        return prefopt.report([run, swept], comparisons=[tmp_path / "c.json"], output=tmp_path / "r.html", title=whole)


def plain_report(tmp_path: Path) -> Path:
    runs = [write_run(tmp_path / str(rate), options={"learning_rate": rate}) for rate in (1e-6, 5e-6)]
    return prefopt.report(
        [*runs, sweep(tmp_path / "swept")], comparisons=compared(tmp_path, 40), output=tmp_path / "r.html"
    )


REPORTS = {"plain": plain_report, "hostile": hostile_report}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_browser_runs_nothing_and_asks_for_nothing(kind: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    page_file = REPORTS[kind](tmp_path)
    said: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, script in ((1100, True), (390, True), (1100, False)):
            context = browser.new_context(
                viewport={"width": width, "height": 900}, offline=True, java_script_enabled=script
            )
            page: Any = context.new_page()
            page.on("console", lambda message: said.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: said.append(f"error: {error}"))
            page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
            page.on("request", lambda r: said.append(r.url) if r.url != page_file.as_uri() else None)
            page.goto(page_file.as_uri())
            assert page.inner_text("h2 >> nth=0").startswith("Compared by")
            if script:
                # What is clicked, hovered or focused runs nothing either, and the page is no wider than the screen.
                page.evaluate("document.querySelectorAll('*').forEach(e => { e.click?.(); e.focus?.(); })")
                assert page.evaluate("[window.pwned ?? 0, document.documentElement.scrollWidth]") == [0, width]
                assert page.evaluate("document.querySelectorAll('svg').length") >= 6
            context.close()
        browser.close()
    assert not said


@pytest.mark.parametrize("kind", REPORTS)
def test_html_validate_finds_nothing(kind: str, tmp_path: Path) -> None:
    program = shutil.which("html-validate")
    if program is None:
        pytest.skip("needs html-validate: npm install --global html-validate@9")
    page_file = REPORTS[kind](tmp_path)
    rules = {"long-title": "off"}  # it counts an escaped letter as five
    config = {"root": True, "extends": ["html-validate:recommended"], "rules": rules}
    (tmp_path / ".htmlvalidate.json").write_text(json.dumps(config))
    done = subprocess.run([program, page_file.name], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
