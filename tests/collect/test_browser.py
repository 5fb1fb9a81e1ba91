"""Whole sessions in a real browser: by keys and by mouse, in both languages, with nothing but the server in reach."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from browser import LOCALES, Open, chromium, opened, violations
from collect.hostile import TEXTS
from collect.site import served
from prefopt.collect.views import LANGUAGES
from prefopt.studies.annotators import invite
from prefopt.studies.items import NewItem, ResponseOrigin, add_items
from prefopt.studies.study import Study, StudySettings
from prefopt.studies.votes import StoredVote, stored_votes
from studies.small import new_item, new_study, people, say

__all__ = ["chromium", "opened"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def stored(study: Study) -> list[StoredVote]:
    with study.reading() as connection:
        return list(stored_votes(connection))


def shown_tiers(j: StoredVote) -> list[str]:
    """The vote in the letters of the page."""
    return ["".join(sorted("ABCD"[j.shown.index(k)] for k in tier)) for tier in j.vote.tiers]


@contextmanager
def leaving(page: Any) -> Iterator[None]:
    """What is done inside leads to another item, or to the end of them."""
    ticket = "document.querySelector('#ballot input[name=ticket]')?.value"
    before = page.evaluate(ticket)
    yield
    page.wait_for_function(f"before => document.readyState === 'complete' && {ticket} !== before", arg=before)


def begin(page: Any) -> None:
    """From an invitation to the first item, script and all."""
    with leaving(page):
        page.click("button.primary")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_session_by_keys_alone(language: str, opened: Open, tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 10, title="T", tags=("style",)) as study, served(study) as site:
        page = opened(site, site.link("Ann"), locale=LOCALES[language])
        words = LANGUAGES[language]
        keys = page.keyboard
        for _ in range(6):  # the link past the head, then what is on the page
            keys.press("Tab")
            if page.evaluate("document.activeElement.matches('button.primary')"):
                break
        with leaving(page):
            keys.press("Enter")
        assert page.title().startswith(words["item"].format(number=1)) and words["which"] in page.content()
        for key in "1234567":
            with leaving(page):
                keys.press(key)
        with leaving(page):
            keys.press("x")
        keys.press("r")
        keys.type("because 1 of\nthem", delay=1)  # digits in a text are no votes
        keys.press("Escape")
        with leaving(page):
            keys.press("2")
        keys.press("s")
        keys.press("ArrowDown")
        keys.press("Tab")
        with leaving(page):
            keys.press("Enter")
        assert words["done"] in page.content()
        said = stored(study)
        assert [shown_tiers(j) for j in said[:7]] == [["A", "B"]] * 3 + [["AB"]] + [["B", "A"]] * 3
        assert [j.vote.strength for j in said[:7]] == [3, 2, 1, None, 1, 2, 3]
        assert said[7].vote.all_bad and said[8].vote.rationale == "because 1 of\nthem"
        assert said[9].vote.skipped == "outside"
        assert all(j.active is not None and j.active <= j.seconds + 1 for j in said)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_ranking_by_keys_and_undo(language: str, opened: Open, tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 2, 4) as study, served(study) as site:
        page = opened(site, site.link("Ann"), locale=LOCALES[language])
        begin(page)
        for key in ("c", "d", "Backspace", "a", "=", "b", "c"):
            page.keyboard.press(key)
        assert page.inner_text("#order") == "C > A = B"
        with leaving(page):
            page.keyboard.press("Enter")
        assert [shown_tiers(j) for j in stored(study)] == [["C", "AB"]]
        with leaving(page):
            page.keyboard.press("u")
        assert LANGUAGES[language]["undone"] in page.content() and not stored(study)
        page.keyboard.press("d")
        page.keyboard.press("b")
        with leaving(page):
            page.keyboard.press("Enter")
        assert [shown_tiers(j) for j in stored(study)] == [["D", "B"]]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_a_session_by_mouse(script: bool, language: str, opened: Open, tmp_path: Path) -> None:
    how = {"java_script_enabled": script, "locale": LOCALES[language]}
    with new_study(tmp_path / "s.db", 5, title="T", tags=("style", "safety")) as study, served(study) as site:
        add_items(study, [new_item(50, 4)])
        page = opened(site, site.link("Ann"), **how)
        page.click("button.primary")

        def press(selector: str, number: int) -> None:
            page.click(selector)
            page.wait_for_function("true") if script else None
            page.wait_for_selector(f"text={LANGUAGES[language]['item of'].format(number=number, total=6)} >> nth=0")

        press("button[value=a3]", 2)
        page.click(".why summary")
        page.fill("#rationale", "slower, but right")
        page.check("input[value=safety]")
        press("button[value=b1]", 3)
        press("button[value=tie]", 4)
        press("button[value=bad]", 5)
        page.select_option("#reason", "broken")
        press("button[value=skip]", 6)
        page.check("input[name=rank1][value='1']")
        page.check("input[name=rank3][value='2']")
        page.check("input[name=rank0][value='2']")
        page.click("#save")
        page.wait_for_selector(f"text={LANGUAGES[language]['done']}")
        said = stored(study)
        assert [shown_tiers(j) for j in said] == [["A", "B"], ["B", "A"], ["AB"], [], [], ["B", "AD"]]
        assert (said[1].vote.rationale, said[1].vote.tags) == ("slower, but right", ("safety",))
        assert said[3].vote.all_bad and said[4].vote.skipped == "broken"
        page.click("#undo button")
        page.wait_for_selector(f"text={LANGUAGES[language]['undone']}")
        assert len(stored(study)) == 5
        page.click("footer summary")
        page.select_option("select[name=keys]", "off")
        page.select_option("select[name=language]", "zh" if language == "en" else "en")
        page.select_option("select[name=theme]", "dark")
        page.click("footer .display button")
        page.wait_for_selector("html[data-theme=dark]")
        other = LANGUAGES["zh" if language == "en" else "en"]
        assert other["prompt"] in page.inner_text("main")
        page.click("footer button.quiet")
        page.wait_for_selector(f"text={other['left']}")


def test_a_vote_is_sent_again_until_it_is_stored(opened: Open, tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 2) as study, served(study) as site:
        page = opened(site, site.link("Ann"), quiet=False)
        begin(page)
        lost: list[str] = []

        def broken(route: Any) -> None:
            lost.append(route.request.post_data)
            if len(lost) == 1:
                route.abort()  # it never arrived
            elif len(lost) == 2:
                route.fetch(max_redirects=0)  # it arrived, and the answer was lost
                route.abort()
            else:
                route.continue_()

        page.route("**/vote", broken)
        with leaving(page):
            page.keyboard.press("7")
            page.wait_for_selector("#unsaved:not([hidden])")
        assert len(lost) == 3 and len(stored(study)) == 1
        assert shown_tiers(stored(study)[0]) == ["B", "A"]


def test_keys_can_be_switched_off(opened: Open, tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 2) as study, served(study) as site:
        page = opened(site, site.link("Ann"))
        begin(page)
        page.click("footer summary")
        page.select_option("select[name=keys]", "off")
        page.click("footer .display button")
        page.wait_for_selector("#ballot[data-keys=off]")
        for key in "17xu":
            page.keyboard.press(key)
        page.focus("button[value=b2]")
        with leaving(page):
            page.keyboard.press("Enter")
        assert [shown_tiers(j) for j in stored(study)] == [["B", "A"]]


def test_what_is_refused_is_shown_with_what_was_written(opened: Open, tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 1, 3) as study, served(study) as site:
        page = opened(site, site.link("Ann"), quiet=False)
        begin(page)
        page.click(".why summary")
        page.fill("#rationale", "kept")
        page.click("#save")
        page.wait_for_selector(".problem")
        assert page.input_value("#rationale") == "kept" and not stored(study)
        page.keyboard.press("b")
        page.keyboard.press("a")
        with leaving(page):
            page.keyboard.press("Enter")
        assert shown_tiers(stored(study)[0]) == ["B", "A"]


def test_the_first_key_counts_however_late_the_script_comes(opened: Open, tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 1, 3) as study, served(study) as site:
        page = opened(site, site.link("Ann"), quiet=False)

        def late(route: Any) -> None:
            page.wait_for_timeout(700)
            route.continue_()

        page.route("**/static/vote.js", late)
        page.click("button.primary", no_wait_after=True)
        page.wait_for_selector("#ballot")
        page.keyboard.press("b")
        page.keyboard.press("a")
        with leaving(page):
            page.keyboard.press("Enter")
        assert shown_tiers(stored(study)[0]) == ["B", "A"]


def busy_study(path: Path) -> Study:
    """Text of every kind, a ranking, gold, tools, and votes of several people."""
    study = new_study(path, 6, overlap=3, title="Which is better?", tags=("style",), instructions="Be **fair**.")
    rich = "# Title\n\n- a\n- b\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 1\n```\n\n$$x^2$$\n\n> قال"
    row = {
        "prompt": [{"role": "system", "content": "short"}, {"role": "user", "content": "ما هي؟ 你好"}],
        "responses": [
            [{"role": "assistant", "content": rich, "reasoning_content": "hm"}],
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
                }
            ],
        ],
        "tools": ['{"name": "f"}'],
    }
    add_items(study, [NewItem(row, b"r" * 16, [ResponseOrigin("m"), ResponseOrigin("n")]), new_item(60, 4)])
    for number, person in enumerate(people(study, "Ann", "Bob")):
        for n in range(6):
            say(study, person, *((0, 1) if (n + number) % 3 else (1, 0)), rationale="so")
    return study


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_axe_finds_nothing(language: str, scheme: str, opened: Open, tmp_path: Path) -> None:
    found: list[str] = []

    def look(page: Any, name: str) -> None:
        found.extend(f"{name}: {line}" for line in violations(page))

    with busy_study(tmp_path / "s.db") as study, served(study) as site:
        how = {"locale": LOCALES[language], "color_scheme": scheme, "quiet": False}
        page = opened(site, "/", **how)
        look(page, "signed out")
        page.goto(site.base + site.link("Lee", lead=True))
        look(page, "invitation")
        begin(page)
        for n in range(8):
            for summary in page.query_selector_all("details:not([open]) > summary"):
                summary.click()
            look(page, f"item {n}")
            with leaving(page):
                page.click("button[value=tie]")
        look(page, "done")
        page.goto(site.base + "/lead")
        page.click("text=" + LANGUAGES[language]["models"] + " >> nth=0")
        look(page, "lead")
        page.goto(site.base + "/lead/item/7")
        look(page, "lead's item")
        page.set_viewport_size({"width": 360, "height": 720})
        look(page, "phone")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_page_is_wider_than_its_screen(width: int, opened: Open, tmp_path: Path) -> None:
    with busy_study(tmp_path / "s.db") as study, served(study) as site:
        long = new_item(99, prompt="w" * 3000)
        add_items(study, [long])
        page = opened(site, site.link("Lee", lead=True), viewport={"width": width, "height": 800}, quiet=False)
        begin(page)
        paths = ["/", "/lead", *(f"/lead/item/{n}" for n in (1, 7, 8, 9))]
        for path in paths:
            page.goto(site.base + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path


@pytest.mark.parametrize("language", LOCALES)
def test_a_phone_shows_words_on_buttons_and_every_number_of_the_lead(
    language: str, opened: Open, tmp_path: Path
) -> None:
    t = LANGUAGES[language]
    with busy_study(tmp_path / "s.db") as study, served(study) as site:
        phone = {"viewport": {"width": 375, "height": 812}, "locale": LOCALES[language]}
        page = opened(site, site.link("Lee", lead=True), **phone)
        begin(page)
        words = [small.inner_text() for small in page.locator(".scale small").all()]
        assert words == [t[w] for w in ("much", "better", "slightly", "tie short", "slightly", "better", "much")]
        assert all(small.is_visible() for small in page.locator(".scale small").all())
        total = re.sub(r"\D+", " ", page.locator("nav .number").inner_text()).split()
        assert total[0] == "1" and int(total[1]) > 1
        page.goto(site.base + "/lead")
        cells = page.locator(".stacked td[data-label]")
        assert cells.count() > 8
        outside = "c => c.scrollWidth > c.clientWidth + 1 || c.getBoundingClientRect().right > 375"
        cut = f"cells => cells.filter({outside}).map(c => c.textContent)"
        assert page.eval_on_selector_all(".stacked td, .figures th, .figures td", cut) == []


def test_hostile_texts_in_every_field_execute_nothing(opened: Open, tmp_path: Path) -> None:
    title, instructions = TEXTS[0] + TEXTS[7], "\n\n".join(TEXTS[:24])
    settings = StudySettings(title=title, instructions=instructions, overlap=2, tags=tuple(TEXTS[8:12]), seed="s")
    study = Study.create(tmp_path / "s.db", settings)
    texts = [text for text in TEXTS if text.strip()]
    items = []
    for n in range(0, len(texts), 6):
        part = (texts[n : n + 6] + texts[:6])[:6]
        call = {"function": {"name": part[0], "arguments": part[1]}}
        row = {
            "prompt": [{"role": "system", "content": part[0]}, {"role": "user", "content": part[1]}],
            "responses": [
                [{"role": "assistant", "content": t, "reasoning_content": part[0], "tool_calls": [call]}]
                for t in part[2:]
            ],
            "tools": [part[3]],
        }
        items.append(NewItem(row, b"%16d" % n, [ResponseOrigin(t, {t: t}) for t in part[2:]], None, part[2], 1))
    items += [
        NewItem(
            {"prompt": t, "responses": [t + " a", t + " b"]},
            b"%15dx" % n,
            [ResponseOrigin(t), ResponseOrigin(t)],
            None,
            t,
            1,
        )
        for n, t in enumerate(texts[:6])
    ]
    add_items(study, items)
    with study, served(study) as site:
        evil = "<img src=x onerror=window.pwned=1>\"'"
        page = opened(site, f"/join/{invite(study, evil, lead=True)[1]}")
        assert page.evaluate("window.pwned") is None
        begin(page)
        for n, _ in enumerate(items):
            assert page.evaluate("window.pwned") is None and page.url.startswith(site.base + "/")
            for summary in page.query_selector_all("main details:not([open]) > summary"):
                summary.click()
            if page.query_selector(".why") and page.query_selector("#rationale"):
                page.fill("#rationale", texts[n])
            with leaving(page):
                page.click("button[value=tie]")
        for path in [
            "/lead",
            *(f"/lead/item/{n + 1}" for n in range(len(items))),
            "/?notice=<script>",
            "/static/vote.js",
        ]:
            page.goto(site.base + path)
            assert page.evaluate("window.pwned") is None
        assert len(stored(study)) == len(items)


def test_pages_say_the_same_in_both_languages() -> None:
    for name, text in LANGUAGES["en"].items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", LANGUAGES["zh"][name])), name
    assert LANGUAGES["en"].keys() == LANGUAGES["zh"].keys() and json.dumps(LANGUAGES["zh"])
