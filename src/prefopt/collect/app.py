"""The web application of a study: routes and handlers."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from prefopt.collect.markdown import as_html
from prefopt.collect.pictures import picture_of
from prefopt.collect.views import LANGUAGES, REASONS, Form, Lead, field_of, number, read_ballot, view_of
from prefopt.errors import StudyError
from prefopt.studies.annotators import DAY, SESSION_DAYS, Annotator, close_session, invited, open_session, session_of
from prefopt.studies.items import get_item, items_left, items_seen, next_item, was_shown
from prefopt.studies.quality import FAST_SECONDS, FAST_SHARE, FEWEST, ONE_SIDE
from prefopt.studies.study import Study
from prefopt.studies.votes import RefusedVote, latest_ticket, record, shown_order, undo
from prefopt.web.language import language_of
from prefopt.web.security import Buckets, Guard, RateLimit, Refusal, Sessions, address_of, csrf_token, same_secret
from prefopt.web.static_files import StaticFiles

log = logging.getLogger("prefopt.collect")
THEMES = ("auto", "light", "dark")
PREFERENCES = {"language": tuple(LANGUAGES), "theme": THEMES, "keys": ("on", "off")}
STATIC = ("style.css", "vote.js", "icon.svg")
PAGES = ("/", "/lead")
LIMITS = {"seconds": f"{FAST_SECONDS:g}", "share": f"{FAST_SHARE:.0%}", "level": f"{ONE_SIDE:.1%}", "votes": FEWEST}
NOTICES = ("saved", "undone", "nothing to undo", "already stored", "left")


@dataclass(frozen=True, slots=True)
class Site:
    """Addresses of the server: ``origins`` such as ``http://127.0.0.1:8700``; ``secure``: cookies over TLS only."""

    origins: Collection[str]
    secure: bool = False
    rate: RateLimit = RateLimit()


def build_app(study: Study, site: Site) -> ASGIApp:
    """The application inside its :class:`Guard`."""
    pages = _Pages(study, site)
    get = {
        "/": pages.item,
        "/join/{secret}": pages.invitation,
        "/lead": pages.lead,
        "/lead/item/{number:int}": pages.lead_item,
        "/picture/{number:int}/{place:int}": pages.picture,
        "/static/{name}": pages.static,
        "/favicon.ico": pages.static,
    }
    post = {"/vote": pages.vote, "/undo": pages.undo, "/join": pages.join}
    post |= {"/leave": pages.leave, "/display": pages.display}
    routes = [Route(path, handler, methods=["GET"]) for path, handler in get.items()]
    routes += [Route(path, handler, methods=["POST"]) for path, handler in post.items()]
    handlers: dict[Any, Any]
    handlers = {HTTPException: pages.http_error, StudyError: pages.study_error, Exception: pages.error}
    app = Starlette(debug=False, routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, site.origins, pages.sessions, site.rate)


class _Pages:
    """The handlers. They run in threads, so that a slow disk does not delay other requests."""

    def __init__(self, study: Study, site: Site) -> None:
        self.study, self.site = study, site
        self.statistics = Lead(study)
        self.strangers = Buckets(RateLimit(per_second=2.0, burst=100.0))
        self.cookie = ("__Host-" if site.secure else "") + f"prefopt-{study.settings.id}"
        self.sessions = Sessions(self.cookie, lambda secret: session_of(study, secret) is not None)
        self.templates = Environment(
            loader=PackageLoader("prefopt.collect"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self.templates.globals |= {"settings": study.settings, "languages": LANGUAGES, "themes": THEMES}
        self.templates.filters["number"] = number
        self.instructions = as_html(study.settings.instructions) if study.settings.instructions else None
        self.files = StaticFiles("prefopt.collect", STATIC)

    def annotator(self, request: Request) -> Annotator:
        """Who is signed in. Raises :class:`Refusal`."""
        secret = request.cookies.get(self.cookie, "")
        found = session_of(self.study, secret) if secret else None
        if found is None:
            raise Refusal(401, "no session")
        return found

    def posted(self, request: Request) -> tuple[Annotator, Form]:
        """Who sent a form, and its fields. Raises :class:`Refusal` without the token of their session."""
        return self.annotator(request), self._form(request)

    def _form(self, request: Request) -> Form:
        form: Form = request.scope["form"]
        session = request.cookies.get(self.cookie, "")
        if session and not same_secret(field_of(form, "token"), csrf_token(session)):
            raise Refusal(403, "refused")
        return form

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page in the language and theme of the request."""
        chosen = request.cookies.get("prefopt-language", "")
        language = language_of(LANGUAGES, chosen, request.headers.get("accept-language", ""))
        theme = request.cookies.get("prefopt-theme", "auto")
        secret = request.cookies.get(self.cookie, "")
        notice = request.query_params.get("notice", "")
        common = {
            "t": LANGUAGES[language],
            "language": language,
            "theme": theme if theme in THEMES else "auto",
            "keys": "off" if request.cookies.get("prefopt-keys") == "off" else "on",
            "token": csrf_token(secret) if secret else "",
            "path": request.url.path if request.url.path in PAGES else "",
            "notice": notice if notice in NOTICES else "",
            "annotator": None,
        }
        return HTMLResponse(self.templates.get_template(template).render(common | values), status)

    # -- voting ------------------------------------------------------------------------------------------------

    def item(self, request: Request, problem: str = "", form: Form | None = None) -> Response:
        """The next item, with the ``problem`` of a refused ``form`` where there was one."""
        annotator = self.annotator(request)
        found = next_item(self.study, annotator)
        with self.study.reading() as connection:
            values: dict[str, Any] = {
                "annotator": annotator,
                "last": latest_ticket(connection, annotator),
                "number": (seen := items_seen(connection, annotator)),
                "total": seen + items_left(connection, annotator),
                "instructions": self.instructions,
            }
        if found is None:
            return self.render(request, "done.html", **values)
        values |= {"view": view_of(found.item, found.shown), "ticket": found.ticket, "reasons": REASONS}
        return self.render(request, "vote.html", 422 if problem else 200, **values, problem=problem, given=form or {})

    def vote(self, request: Request) -> Response:
        """Store a vote; it is on the disk before the response is sent."""
        annotator, form = self.posted(request)
        try:
            ticket, active = field_of(form, "ticket"), None
            with suppress(ValueError):  # browsers without scripts send none
                active = float(field_of(form, "active"))
            with self.study.reading() as connection:
                shown = shown_order(connection, annotator, ticket)
            vote = read_ballot(form, shown, self.study.settings.tags)
            outcome = record(self.study, annotator, ticket, vote, active=active)
        except RefusedVote as refused:
            return self.item(request, str(refused), form)
        return _redirect("/", "saved" if outcome == "stored" else outcome)

    def undo(self, request: Request) -> Response:
        annotator, form = self.posted(request)
        done = undo(self.study, annotator, field_of(form, "ticket"))
        return _redirect("/", "undone" if done else "nothing to undo")

    # -- sessions and preferences ------------------------------------------------------------------------------

    def invitation(self, request: Request) -> Response:
        """The page of an invitation. It changes nothing, so that link previews do not use invitations up."""
        secret = request.path_params["secret"]
        annotator = self._invited(request, secret)
        return self.render(request, "join.html", invited=annotator, secret=secret, instructions=self.instructions)

    def join(self, request: Request) -> Response:
        """Exchange an invitation for a session cookie."""
        secret = field_of(request.scope["form"], "secret")
        self._invited(request, secret)
        session = open_session(self.study, secret)
        if session is None:
            raise Refusal(404, "bad invitation")
        self.sessions.remember(session)
        answer = _redirect("/")
        self._set_cookie(answer, self.cookie, session)
        return answer

    def leave(self, request: Request) -> Response:
        self.posted(request)
        close_session(self.study, request.cookies[self.cookie])
        answer = self.render(request, "message.html", text="left")
        answer.delete_cookie(self.cookie, secure=self.site.secure, httponly=True, samesite="strict")
        return answer

    def display(self, request: Request) -> Response:
        """Set language, theme and keyboard shortcuts."""
        form = self._form(request)
        back = field_of(form, "back")
        answer = _redirect(back if back in PAGES else "/")
        for name, known in PREFERENCES.items():
            if field_of(form, name) in known:
                self._set_cookie(answer, f"prefopt-{name}", field_of(form, name))
        return answer

    def _set_cookie(self, answer: Response, name: str, value: str) -> None:
        age = int(SESSION_DAYS * DAY)
        answer.set_cookie(name, value, age, httponly=True, samesite="strict", secure=self.site.secure, path="/")

    def _invited(self, request: Request, secret: str) -> Annotator:
        """The annotator of an invitation. Raises :class:`Refusal`. Wrong secrets count against the address, valid ones
        against the annotator: many may come from one address."""
        address = address_of(request.scope)
        if self.strangers.wait(address):
            raise Refusal(429, "too many")
        annotator = invited(self.study, secret)
        if annotator is None:
            self.strangers.take(address)
            raise Refusal(404, "bad invitation")
        if self.strangers.take(f"annotator {annotator.id}"):
            raise Refusal(429, "too many")
        return annotator

    # -- the lead ----------------------------------------------------------------------------------------------

    def _lead(self, request: Request) -> Annotator:
        annotator = self.annotator(request)
        if not annotator.lead:
            raise Refusal(403, "forbidden")
        return annotator

    def lead(self, request: Request) -> Response:
        annotator = self._lead(request)
        return self.render(request, "lead.html", annotator=annotator, s=self.statistics.summary(), limits=LIMITS)

    def lead_item(self, request: Request) -> Response:
        annotator = self._lead(request)
        found = self.statistics.item(request.path_params["number"])
        if found is None:
            raise Refusal(404, "not found")
        return self.render(request, "item.html", annotator=annotator, **found)

    def picture(self, request: Request) -> Response:
        """A picture of an item that the annotator was shown, or any for a lead."""
        annotator = self.annotator(request)
        number, place = request.path_params["number"], request.path_params["place"]
        with self.study.reading() as connection:
            may = annotator.lead or was_shown(connection, annotator, number)
            item = get_item(connection, number) if may and number < 2**63 else None
        data = picture_of(item, place) if item is not None else None
        if data is None:
            raise Refusal(404, "not found")
        return Response(data, media_type="image/png")

    # -- files and errors --------------------------------------------------------------------------------------

    def static(self, request: Request) -> Response:
        """Script, style and icon."""
        found = self.files.answer(request.path_params.get("name", "icon.svg"))
        if found is None:
            raise Refusal(404, "not found")
        return found

    def http_error(self, request: Request, error: HTTPException) -> Response:
        """Refusals, and unknown routes and methods."""
        known = "not found" if error.status_code == 404 else "refused"
        text = error.detail if isinstance(error, Refusal) else known
        return self.render(request, "message.html", error.status_code, text=text)

    def study_error(self, request: Request, error: StudyError) -> Response:
        """Errors of the disk or the study, without the path."""
        log.error("%s", error)
        if isinstance(error, RefusedVote):
            return self.render(request, "message.html", 400, text="refused")
        why = str(error).removeprefix(f"{self.study.path}: ")
        return self.render(request, "message.html", 503, text="not stored", why=why)

    def error(self, request: Request, error: Exception) -> Response:
        """A bug: its traceback goes to the log, never to the browser."""
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return self.render(request, "message.html", 500, text="broken")


def _redirect(path: str, notice: str = "") -> RedirectResponse:
    return RedirectResponse(f"{path}?notice={notice.replace(' ', '+')}" if notice else path, 303)
