"""Pages in a real browser: Debian's Chromium, driven by playwright, with nothing but the server in reach."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, Protocol

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOCALES = {"en": "en-US", "zh": "zh-CN"}
Open = Callable[..., Any]


class Reachable(Protocol):
    """An address; ``closing`` is called before its server goes."""

    closing: list[Callable[[], object]]

    @property
    def base(self) -> str: ...


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Open]:
    """Opens a page of a context of its own. In the end nothing was asked elsewhere and nothing complained of."""
    said: list[str] = []

    def open_page(site: Reachable, link: str, *, quiet: bool = True, **how: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, "locale": "en-US", **how})
        site.closing.append(context.close)
        page = context.new_page()
        page.set_default_timeout(20_000)

        def routed(route: Any) -> None:
            if route.request.url.startswith(site.base + "/"):
                route.continue_()
            else:
                said.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", routed)
        page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        if quiet:
            page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.goto(site.base + link)
        return page

    yield open_page
    assert not said


def violations(page: Any) -> list[str]:
    """What axe finds wrong with a page as it is now, a line each."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{found['impact']} {found['id']} {[node['html'][:120] for node in found['nodes'][:3]]}"
        for found in result["violations"]
    ]
