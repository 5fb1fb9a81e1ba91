"""Whole sessions on the local page in a real browser: a real short run from form to chat, curves while a run trains, by
keys alone, on a phone, in both themes and languages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser import LOCALES, Open, chromium, opened, violations
from collect.hostile import TEXTS
from prefopt.runs.history import read_history
from prefopt.ui.site import LANGUAGES
from studies.small import new_study
from ui.site import Served, append_steps, served, some_runs, write_rows, write_run

__all__ = ["chromium", "opened"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORDS = "the a movie film plot good bad great awful acting story ending funny boring really very".split()
LONG = 60_000
"""Milliseconds for what starts a process with torch."""


def pairs(path: Path, count: int = 80) -> Path:
    draw = random.Random(0)
    rows: list[Any] = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=6)),
            "chosen": " " + " ".join(draw.choices(["good", "great", "funny"], k=4)),
            "rejected": " " + " ".join(draw.choices(["bad", "awful", "boring"], k=4)),
        }
        for _ in range(count)
    ]
    return write_rows(path, rows)


def entered(open_page: Open, site: Served, **how: Any) -> Any:
    """From the link to the table of runs."""
    page = open_page(site, site.link, **how)
    page.wait_for_url(site.base + "/")
    return page


def test_a_run_from_the_form_to_a_chat(opened: Open, tmp_path: Path) -> None:
    base = tmp_path / "runs"
    base.mkdir()
    data = pairs(tmp_path / "pairs.jsonl")
    with served(base) as site:
        page = entered(opened, site, quiet=False)
        page.wait_for_selector("#empty:not([hidden]) a")
        page.click("#empty a")
        given = {"model": "prefopt:demo/tiny_imdb", "data": str(data), "batch_size": "4", "eval_fraction": "0.2"}
        for name, text in (given | {"learning_rate": "fast"}).items():
            page.fill(f"#f-{name}", text)
        page.click("#dry-run")
        assert "--learning-rate is 'fast'" in page.inner_text("#problems")
        page.fill("#f-learning_rate", "1e-4")
        page.fill("#find", "epochs")
        assert page.is_visible("#f-epochs") and not page.is_visible("#f-model")
        page.fill("#f-epochs", "12")
        page.click("#dry-run")
        page.wait_for_selector("#state:has-text('ended')", timeout=LONG)
        assert "nothing was trained" in page.inner_text("#log") and page.input_value("#f-epochs") == "12"
        assert not (base / "run-1").exists()

        page.click("#start")
        page.wait_for_selector("#panels polyline", timeout=LONG)
        assert (base / "run-1.yaml").exists()
        first = page.get_attribute("#panels polyline", "points")
        wait_until(page, lambda: page.get_attribute("#panels polyline", "points") != first)
        page.click("#stop")
        page.wait_for_selector("#resume", timeout=LONG)
        run = read_history(base / "run-1")
        assert run.status == "interrupted" and run.steps is not None and 0 < run.step < run.steps
        page.wait_for_selector("#log:has-text('continue with --resume')")

        page.click("#resume")
        page.wait_for_selector("#stop")
        page.goto("about:blank")  # the run goes on when the page is closed
        page.goto(site.base + "/run?name=run-1")
        page.wait_for_selector("#run-status:has-text('finished')", timeout=2 * LONG)
        run = read_history(base / "run-1")
        assert [line["step"] for line in run.training] == list(range(1, (run.steps or 0) + 1))
        chat(page, site, base)


def chat(page: Any, site: Served, base: Path) -> None:
    """The trained model beside the one that it was trained from."""
    page.goto(site.base + "/chat?run=run-1")
    page.fill("#c-against", "prefopt:demo/tiny_imdb")
    page.fill("#c-max_new_tokens", "12")
    page.click("#load")
    page.wait_for_selector("#say:not([hidden])", timeout=LONG)
    page.fill("#text", "the movie was")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelectorAll('.turn.assistant').length === 2 && !document.getElementById('send').disabled",
        timeout=LONG,
    )
    answers = [element.inner_text() for element in page.query_selector_all(".turn.assistant .text")]
    assert all(answers) and page.input_value("#text") == ""
    page.reload()
    page.wait_for_selector(".turn.assistant")
    assert [element.inner_text() for element in page.query_selector_all(".turn.assistant .text")] == answers
    page.click("[data-do=save]")
    page.wait_for_selector("#chat-state:has-text('chat.jsonl')")
    saved = [json.loads(line) for line in (base / "chat.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in saved] == answers


@pytest.mark.parametrize("language", LANGUAGES)
def test_curves_grow_while_a_run_trains_and_keys_reach_all(language: str, opened: Open, tmp_path: Path) -> None:
    base, words = some_runs(tmp_path / "runs"), LANGUAGES[language]
    with served(base) as site:
        page = entered(opened, site, locale=LOCALES[language])
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.wait_for_selector("#runs tbody tr")
        page.focus("#filter")
        page.keyboard.type("DPO-")
        assert words["count of runs"].format(shown=2, all=4) in page.inner_text("#count")
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        while not page.evaluate("() => document.activeElement.dataset.key === 'name'"):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.get_attribute("th:has(button[data-key=name])", "aria-sort") == "ascending"
        names = page.evaluate("() => [...document.querySelectorAll('tbody th')].map((cell) => cell.innerText)")
        assert names == ["dpo-a", "dpo-b", "kto", "nested/sft"]
        for name in ("dpo-a", "kto", "nested/sft"):
            page.focus(f"input[value='{name}']")
            page.keyboard.press("Space")
        page.wait_for_selector("#legend li:nth-child(3)")
        held = page.evaluate("() => [...document.querySelectorAll('figcaption')].map((caption) => caption.innerText)")
        losses = [title for title in held if "Loss" in title]
        assert len(losses) == 3  # dpo, kto and nll: an axis each

        page.focus("figure:first-child input")
        page.keyboard.press("Home")
        assert "1" in page.inner_text("figure:first-child output")
        grown = page.locator("figure:has(.c2) polyline.c2").first
        before = grown.get_attribute("points")
        requests.clear()
        append_steps(base / "nested" / "sft", 13, 25)
        wait_until(page, lambda: grown.get_attribute("points") != before)
        assert page.evaluate("() => document.activeElement.type") == "range"  # where the reader was
        page.wait_for_selector(f"tr:has-text('nested/sft') >> text={words['step of'].format(step=24, steps=30)}")
        write_run(base / "another", loss="dpo")
        page.wait_for_selector("tr:has-text('another')")
        assert requests == []  # all of that came by the one stream


def test_a_page_that_nobody_looks_at_gives_its_stream_back(opened: Open, tmp_path: Path) -> None:
    with served(some_runs(tmp_path / "runs")) as site:
        page = entered(opened, site, quiet=False)
        page.wait_for_selector("#runs tbody tr")
        assert len(site.site.feed._waiting) == 1
        hide = "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
        page.evaluate(hide + " document.dispatchEvent(new Event('visibilitychange')); }", True)
        wait_until(page, lambda: not site.site.feed._waiting)
        page.evaluate(hide + " document.dispatchEvent(new Event('visibilitychange')); }", False)
        wait_until(page, lambda: len(site.site.feed._waiting) == 1)
        site.site.feed.close()  # the server goes
        page.wait_for_selector("#lost:not([hidden])")


def wait_until(page: Any, done: Callable[[], bool]) -> None:
    for _ in range(200):
        if done():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never happened")


def test_data_are_audited_with_their_trained_tokens_and_studies_and_reports_open(opened: Open, tmp_path: Path) -> None:
    base = some_runs(tmp_path / "runs")
    data = pairs(tmp_path / "pairs.jsonl", 12)
    with new_study(base / "votes.db", 3, title="Which is better?"), served(base) as site:
        page = entered(opened, site, quiet=False)
        page.goto(site.base + "/data")
        page.fill("#d-data", str(data))
        page.fill("#d-model", "prefopt:demo/tiny_imdb")
        page.fill("#d-show", "2")
        page.click("#check")
        page.wait_for_selector("#audit", timeout=LONG)
        assert LANGUAGES["en"]["errors"].format(count=0) in page.inner_text("#audit")
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        trained = page.evaluate(
            "() => [...document.querySelectorAll('.rendered mark')].map((mark) => mark.textContent)"
        )
        texts = {f"{row[name]}<|endoftext|>" for row in rows for name in ("chosen", "rejected")}
        assert len(trained) == 4 and set(trained) <= texts

        page.goto(site.base + "/?run=dpo-a&run=kto")
        page.wait_for_selector("#to-report:not([disabled])")
        page.wait_for_selector("input[value=kto]:checked")
        page.click("#to-report")
        page.click(f"text={LANGUAGES['en']['open report']}", timeout=LONG)
        page.wait_for_selector("h1:has-text('dpo-a')")
        page.goto(site.base + "/more")
        assert "Which is better?" in page.inner_text("main")
        page.click(f"button:has-text('{LANGUAGES['en']['serve']}')")
        link = page.wait_for_selector("#log a", timeout=LONG).get_attribute("href")
        assert "/join/" in link
        page.click("#stop")
        page.wait_for_selector("#state:has-text('ended')", timeout=LONG)


def every_page(site: Served) -> list[str]:
    file = "file=dpo-a%2Fsamples.jsonl"
    paths = ["/", "/?run=dpo-a&run=dpo-b&run=kto", "/run?name=dpo-a", "/run?name=nested%2Fsft", "/new"]
    return [
        *paths,
        "/new?verb=ppo",
        f"/samples?{file}&q=after",
        f"/samples?{file}&file=other.jsonl",
        "/data",
        "/chat",
        "/more",
    ]


@pytest.mark.parametrize(("language", "scheme"), [("en", "light"), ("zh", "dark")])
def test_axe_finds_nothing(language: str, scheme: str, opened: Open, tmp_path: Path) -> None:
    found: list[str] = []
    base = some_runs(tmp_path / "runs")
    (base / "reports").mkdir()
    (base / "reports" / "r.html").write_text("<p>report")
    with new_study(base / "votes.db", 3, title="T"), served(base) as site:
        page = entered(opened, site, locale=LOCALES[language], color_scheme=scheme, quiet=False)
        # What differs between languages and themes are words and colours, which a few pages have all of.
        for path in every_page(site) if language == "en" else ["/?run=dpo-a&run=kto", "/run?name=dpo-a", "/data"]:
            page.goto(site.base + path)
            if "run" in path and "new" not in path:
                page.wait_for_selector("figure")
            for summary in page.query_selector_all("details:not([open]) > summary"):
                summary.click()
            page.wait_for_timeout(200)  # colours fade in
            found += [f"{path}: {line}" for line in violations(page)]
        page.set_viewport_size({"width": 360, "height": 720})
        page.goto(site.base + "/?run=kto")
        page.wait_for_selector("figure")
        found += [f"phone: {line}" for line in violations(page)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("width", [320, 1280])
def test_no_page_is_wider_than_its_screen_and_nothing_in_data_is_executed(
    width: int, opened: Open, tmp_path: Path
) -> None:
    base = some_runs(tmp_path / "runs")
    texts = [text for text in TEXTS if text.strip()]
    hostile: list[Any] = [{"prompt": text, "responses": [text, "w" * 900]} for text in texts]
    write_rows(base / "dpo-a" / "samples.jsonl", hostile)
    write_run(base / ("x" * 120 + "<img src=x onerror=window.pwned=1>"), loss="dpo", reference=TEXTS[0])
    with served(base) as site:
        page = entered(opened, site, viewport={"width": width, "height": 800}, quiet=False)
        pages = every_page(site) + [f"/samples?file=dpo-a%2Fsamples.jsonl&start={n}" for n in range(0, len(texts), 20)]
        for path in pages:
            page.goto(site.base + path)
            page.wait_for_timeout(150)
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width, path
            assert page.evaluate("() => window.pwned") is None, path
