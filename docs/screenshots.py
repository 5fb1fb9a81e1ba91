"""Write the pictures of the local pages into docs/plots: ``python docs/screenshots.py``.

The study and the runs are made up, from one seed. Needs playwright and Debian's chromium.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from playwright.sync_api import sync_playwright  # noqa: E402

from collect.site import served as served_study  # noqa: E402
from prefopt.studies.annotators import Annotator, invite  # noqa: E402
from prefopt.studies.items import NewItem, ResponseOrigin, add_items, next_item  # noqa: E402
from prefopt.studies.quality import FAST_SECONDS  # noqa: E402
from prefopt.studies.study import Study, StudySettings  # noqa: E402
from prefopt.studies.votes import Vote, record  # noqa: E402
from studies.small import new_item  # noqa: E402
from ui.site import served as served_runs  # noqa: E402
from ui.site import write_run  # noqa: E402

PLOTS = ROOT / "docs/plots"
DESKTOP = {"viewport": {"width": 1100, "height": 690}}
TALL = {"viewport": {"width": 1280, "height": 920}}
CIRCLE = (
    "The area is $A = \\pi r^2$. In Python:\n\n```python\ndef area(radius: float) -> float:\n"
    '    """The area of a circle."""\n    return math.pi * radius**2\n```\n\n'
    "It follows from the integral\n\n$$\\int_0^r 2 \\pi t \\, dt = \\pi r^2$$"
)
RINGS = (
    "Cut the circle into thin rings.\n\n1. A ring at distance $t$ has the length $2 \\pi t$.\n"
    "2. Its area is $2 \\pi t \\, dt$.\n3. Adding all rings gives $\\pi r^2$.\n\n"
    "| r | area |\n| --- | --- |\n| 1 | 3.14 |\n| 2 | 12.57 |"
)
"""Two answers with formulas, code and a table."""
PEOPLE = {"Ann Lee": 21.0, "Bo Chen": 23.0, "Cas Öztürk": 25.0, "دينا": 24.0, "Eve": 1.1}
"""Annotators, with their median seconds for an item; the last one clicks."""
ITEMS, GOLD, ROUNDS = 80, 6, 40


def first_item() -> NewItem:
    asked = "How do I compute the area of a circle, and why is it $\\pi r^2$?"
    answers = [[{"role": "assistant", "content": text}] for text in (CIRCLE, RINGS)]
    row = {"prompt": [{"role": "user", "content": asked}], "responses": answers}
    return NewItem(row, b"circle".ljust(16, b"."), [ResponseOrigin(f"model-{k}", {}) for k in (0, 1)], None, "p", 1)


def study(path: Path, *items: NewItem) -> Study:
    made = Study.create(path, StudySettings(seed="s", title="Which answer helps more?", overlap=3, gold_every=8))
    add_items(made, items)
    return made


def vote_once(made: Study, person: Annotator, seconds: float, rng: np.random.Generator, better_I: Any) -> None:
    """Vote on the next item, if there is one, by how much its first response is better; one who is fast clicks on what
    is shown first."""
    if (found := next_item(made, person)) is None:
        return
    took = float(seconds * math.exp(rng.normal(0, 0.4)))
    if seconds < FAST_SECONDS:
        vote = Vote(((found.shown[0],), (found.shown[1],)), 3)
    elif rng.random() < 0.04:
        vote = Vote(skipped="unclear")
    else:
        better = 2.0 if found.item.gold is not None else better_I[found.item.id % ITEMS] + rng.normal(0, 0.5)
        if abs(better) < 0.2:
            vote = Vote(((0, 1),))
        else:
            best = int(better < 0)
            vote = Vote(((best,), (1 - best,)), int(1 + (abs(better) > 0.7) + (abs(better) > 1.4)))
    record(made, person, found.ticket, vote, active=took, at=found.since + took)


def voted(path: Path) -> Study:
    gold = [new_item(900 + n, gold=[[0], [1]]) for n in range(GOLD)]
    made = study(path, *(new_item(n) for n in range(ITEMS)), *gold)
    rng = np.random.default_rng(0)
    better_I = rng.normal(0.4, 1.2, ITEMS)
    invited = {name: invite(made, name)[0] for name in PEOPLE}
    for _ in range(ROUNDS):
        for name, seconds in PEOPLE.items():
            vote_once(made, invited[name], seconds, rng, better_I)
    return made


def slower(run: Path, factor: float) -> None:
    """Let the loss of a run fall, and its margin rise, more slowly, with some noise."""
    rng, path = np.random.default_rng(int(1000 * factor)), run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for name in line:
            if name.removeprefix("eval_") == "loss":
                line[name] = math.log(2) * (line[name] / math.log(2)) ** factor + rng.normal(0, 0.01)
            elif name.endswith("margins"):
                line[name] *= factor
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def shot(browser: Any, site: Any, link: str, name: str, how: dict[str, Any], *then: str, whole: bool = False) -> None:
    """A picture of a page after each of ``then``: an address to open, or a selector to wait for and click on."""
    context = browser.new_context(locale="en-US", **how)
    page = context.new_page()
    page.goto(site.base + link)
    for step in then:
        if step.startswith("/"):
            page.goto(site.base + step)
        else:
            page.locator(step).first.wait_for()
            for place in page.locator(step).all():
                place.click()
        page.wait_for_load_state()
    page.wait_for_timeout(1000)
    page.screenshot(path=PLOTS / f"{name}.png", full_page=whole)
    context.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        base = Path(folder)
        with (
            study(base / "vote.db", first_item(), *(new_item(n) for n in range(10))) as made,
            served_study(made) as site,
        ):
            shot(browser, site, site.link("Ann"), "collect-vote", DESKTOP, "button.primary")
        with voted(base / "lead.db") as made, served_study(made) as site:
            shot(
                browser,
                site,
                site.link("lead", lead=True),
                "collect-lead",
                DESKTOP,
                "button.primary",
                "/lead",
                whole=True,
            )
        runs = base / "runs"
        runs.mkdir()
        for beta in (0.05, 0.1, 0.3):
            slower(write_run(runs / f"dpo-{beta:g}", steps=60, beta=beta), 1 - beta)
        slower(write_run(runs / "dpo-long", steps=120, upto=45, beta=0.1), 0.4)
        with served_runs(runs) as workspace:
            shot(browser, workspace, workspace.link, "ui-runs", TALL, "tbody input[type=checkbox]")
        browser.close()


if __name__ == "__main__":
    main()
