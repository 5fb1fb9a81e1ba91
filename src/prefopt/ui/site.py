"""What all pages of a folder share: its runs, jobs, samples and chat, the session, languages and templates."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from prefopt.ui.chats import Room
from prefopt.ui.feed import Feed
from prefopt.ui.jobs import Jobs
from prefopt.ui.runs import Runs
from prefopt.ui.samples import Samples, spans
from prefopt.web.language import language_of, read_languages
from prefopt.web.security import Refusal, Sessions, csrf_token, same_secret
from prefopt.web.static_files import StaticFiles

LANGUAGES = read_languages("prefopt.ui")
THEMES = ("auto", "light", "dark")
PREFERENCES = {"language": tuple(LANGUAGES), "theme": THEMES}
STATIC = (
    *("style.css", "icon.svg", "page.js", "runs.js", "curves.js", "job.js", "chat.js"),
    "form.js",
)
PAGES = {"/": "runs", "/new": "new run", "/samples": "samples", "/data": "data", "/chat": "chat", "/more": "more"}
"""The pages of the navigation, and the names of their texts."""
YEAR = 365 * 24 * 3600
LONGEST_FIELD = 60_000

Form = Mapping[str, Sequence[str]]


class Workspace:
    """A folder with all that its pages show. ``key`` is in the link that opens the first page."""

    def __init__(self, base: Path, name: str) -> None:
        self.base, self.key = base, secrets.token_urlsafe(24)
        self.feed = Feed()
        self.runs, self.jobs, self.samples = Runs(base), Jobs(base, self.feed.wake), Samples(base)
        self.room = Room(self.feed.wake)
        self.cookie = f"prefopt-ui-{name}"
        self._live: set[str] = set()
        self.sessions = Sessions(self.cookie, self._live.__contains__)
        self.files = StaticFiles("prefopt.ui", STATIC)
        self.templates = Environment(
            loader=PackageLoader("prefopt.ui"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self.templates.globals |= {"languages": LANGUAGES, "themes": THEMES, "pages": PAGES, "base": str(base)}
        self.templates.globals |= {"spans": spans}

    # -- sessions ----------------------------------------------------------------------------------------------

    def enter(self, key: str) -> str | None:
        """A new session for whoever has the link, else None."""
        if not same_secret(key, self.key):
            return None
        session = secrets.token_urlsafe(24)
        self._live.add(session)
        self.sessions.remember(session)
        return session

    def leave(self, session: str) -> None:
        self._live.discard(session)

    def session(self, request: Request) -> str:
        """The session of a request. Raises :class:`Refusal`."""
        found: str = request.cookies.get(self.cookie, "")
        if found not in self._live:
            raise Refusal(401, "no session")
        return found

    def form(self, request: Request) -> Form:
        """The fields of a form. Raises :class:`Refusal` without the token of the session."""
        session, form = self.session(request), request.scope["form"]
        if not same_secret(value_of(form, "token"), csrf_token(session)):
            raise Refusal(403, "refused")
        found: Form = form
        return found

    # -- answers -----------------------------------------------------------------------------------------------

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page in the language and theme of the request."""
        chosen = request.cookies.get("prefopt-language", "")
        language = language_of(LANGUAGES, chosen, request.headers.get("accept-language", ""))
        theme = request.cookies.get("prefopt-theme", "auto")
        session = request.cookies.get(self.cookie, "")
        common = {
            "t": LANGUAGES[language],
            "language": language,
            "theme": theme if theme in THEMES else "auto",
            "signed_in": session in self._live,
            "token": csrf_token(session) if session in self._live else "",
            "path": request.url.path,
            "topics": "",
            "problem": "",
        }
        return HTMLResponse(self.templates.get_template(template).render(common | values), status)

    def show(self, handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        """A handler for signed-in requests alone."""

        def guarded(request: Request) -> Response:
            self.session(request)
            return handler(request)

        return guarded


def value_of(form: Form, name: str) -> str:
    """The first value of a field, with line ends as ``\\n``; empty where there is none."""
    values = form.get(name, ())
    return values[0][:LONGEST_FIELD].replace("\r\n", "\n") if values else ""


def redirect(path: str) -> RedirectResponse:
    return RedirectResponse(path, 303)
