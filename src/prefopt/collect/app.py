"""The web page over a study: routes, and what each of them reads and does."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from prefopt.collect import lead as charts
from prefopt.collect.language import LANGUAGES, language_of
from prefopt.collect.lead import Lead
from prefopt.collect.security import Buckets, Guard, RateLimit, Sessions, address_of, csrf_token, same_secret
from prefopt.collect.text import as_html, view_of
from prefopt.errors import StudyError
from prefopt.records import Tiers
from prefopt.studies.annotators import SESSION_DAYS, Annotator, close_session, invited, open_session, session_of
from prefopt.studies.items import items_seen, next_item
from prefopt.studies.study import Study
from prefopt.studies.votes import RefusedVote, Vote, latest_ticket, on_page, record, shown_order, undo

Form = Mapping[str, Sequence[str]]
REASONS = ("unclear", "outside", "broken", "offensive")
LONGEST_FIELD = 20_000


def one(form: Form, name: str) -> str:
    """The value of a field, or nothing. Raises :class:`RefusedVote` where it is there twice."""
    values = form.get(name, ())
    if len(values) > 1:
        raise RefusedVote(f"the form has {name} twice")
    return values[0][:LONGEST_FIELD] if values else ""


def read_ballot(form: Form, shown: Sequence[int], tags: Sequence[str]) -> Vote:
    """What a form says of the responses ``shown`` [K]. Raises :class:`RefusedVote`.

    ``choice`` is ``a1`` to ``a3`` or ``b1`` to ``b3`` (of two the first or the second is better, by how much), ``tie``,
    ``bad``, ``skip`` (with a ``reason``), or ``rank`` with a rank for each place in ``rank0``, ``rank1``, ...
    """
    choice, count = one(form, "choice"), len(shown)
    rationale = one(form, "rationale").replace("\r\n", "\n").strip()
    given = tuple(dict.fromkeys(form.get("tag", ())))
    if not set(given) <= set(tags):
        raise RefusedVote("the form has a tag that the study does not know")
    more = {"rationale": rationale, "tags": given}
    if choice == "skip":
        reason = one(form, "reason")
        if reason not in REASONS:
            raise RefusedVote("a skipped item needs its reason")
        return Vote(skipped=reason, **more)  # type: ignore[arg-type]
    if choice == "bad":
        return Vote(all_bad=True, **more)  # type: ignore[arg-type]
    if choice == "tie":
        return Vote(on_page(shown, (tuple(range(count)),)), **more)  # type: ignore[arg-type]
    if choice == "rank":
        return Vote(on_page(shown, _ranks(form, count)), **more)  # type: ignore[arg-type]
    if count == 2 and len(choice) == 2 and choice[0] in "ab" and choice[1] in "123":
        best = "ab".index(choice[0])
        return Vote(on_page(shown, ((best,), (1 - best,))), int(choice[1]), **more)  # type: ignore[arg-type]
    raise RefusedVote("choose one of the answers")


def _ranks(form: Form, count: int) -> Tiers:
    """Tiers of places from their ranks; places without a rank are left out."""
    by_rank: dict[int, list[int]] = {}
    for place in range(count):
        text = one(form, f"rank{place}")
        if not text:
            continue
        if not (len(text) == 1 and text in "123456789" and int(text) <= count):
            raise RefusedVote(f"a rank is a number from 1 to {count}")
        by_rank.setdefault(int(text), []).append(place)
    if sum(map(len, by_rank.values())) < 2:
        raise RefusedVote("rank at least two responses")
    return tuple(tuple(by_rank[rank]) for rank in sorted(by_rank))


log = logging.getLogger("prefopt.collect")
KEYS = ("on", "off")
THEMES = ("auto", "light", "dark")
STATIC = {"style.css": "text/css", "vote.js": "text/javascript", "icon.svg": "image/svg+xml"}
PAGES = ("/", "/lead")
NOTICES = ("saved", "undone", "nothing to undo", "already stored", "left")


@dataclass(frozen=True, slots=True)
class Site:
    """How the page is reached: ``origins`` such as ``http://127.0.0.1:8700``; ``secure``: over TLS alone."""

    origins: Collection[str]
    secure: bool = False
    rate: RateLimit = RateLimit()

    @property
    def hosts(self) -> list[str]:
        """What the Host header may be."""
        return [origin.partition("://")[2] for origin in self.origins]


class Refusal(Exception):
    """A request that is answered by a page with a message: ``status`` and the name of the text."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(text)


def build_app(study: Study, site: Site) -> ASGIApp:
    """The application, guarded."""
    pages = _Pages(study, site)
    routes = [
        Route("/", pages.item, methods=["GET"]),
        Route("/vote", pages.vote, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        Route("/join/{secret}", pages.invitation, methods=["GET"]),
        Route("/join", pages.join, methods=["POST"]),
        Route("/leave", pages.leave, methods=["POST"]),
        Route("/display", pages.display, methods=["POST"]),
        Route("/lead", pages.lead, methods=["GET"]),
        Route("/lead/item/{number:int}", pages.lead_item, methods=["GET"]),
        Route("/static/{name}", pages.static, methods=["GET"]),
        Route("/favicon.ico", pages.icon, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {
        Refusal: pages.refusal,
        HTTPException: pages.http_error,
        StudyError: pages.study_error,
        Exception: pages.error,
    }
    app = Starlette(debug=False, routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, site.hosts, site.origins, pages.sessions, site.rate)


class _Pages:
    """The handlers. They run in threads, so that a slow disk keeps nobody else waiting."""

    def __init__(self, study: Study, site: Site) -> None:
        self.study, self.site = study, site
        self.numbers = Lead(study)
        self.strangers = Buckets(RateLimit(per_second=2.0, burst=100.0))
        self.cookie = ("__Host-" if site.secure else "") + f"prefopt-{study.settings.id}"
        self.sessions = Sessions(self.cookie, lambda secret: session_of(study, secret) is not None)
        self.templates = Environment(
            loader=PackageLoader("prefopt.collect"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self.templates.globals |= {
            "charts": charts,
            "settings": study.settings,
            "languages": LANGUAGES,
            "themes": THEMES,
        }
        self.instructions = as_html(study.settings.instructions) if study.settings.instructions else None
        folder = files("prefopt.collect") / "static"
        self.files = {name: (folder / name).read_bytes() for name in STATIC}

    # -- who asks ----------------------------------------------------------------------------------------------

    def person(self, request: Request) -> Annotator:
        """Who is signed in. Raises :class:`Refusal`."""
        secret = request.cookies.get(self.cookie, "")
        found = session_of(self.study, secret) if secret else None
        if found is None:
            raise Refusal(401, "no session")
        return found

    def posted(self, request: Request) -> tuple[Annotator, Form]:
        """Who sent a form, and its fields, where it carries the token of their session. Raises :class:`Refusal`."""
        person = self.person(request)
        form: Form = request.scope["form"]
        if not same_secret(one(form, "token"), csrf_token(request.cookies[self.cookie])):
            raise Refusal(403, "refused")
        return person, form

    def render(self, request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page in the person's language and colours."""
        language = language_of(request.cookies.get("prefopt-language", ""), request.headers.get("accept-language", ""))
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
            "person": None,
        }
        page = self.templates.get_template(name).render(common | values)
        return HTMLResponse(page, status)

    # -- voting ------------------------------------------------------------------------------------------------

    def item(self, request: Request) -> Response:
        """The next item, or that there is none."""
        return self._item(request, self.person(request))

    def _item(self, request: Request, person: Annotator, problem: str = "", form: Form | None = None) -> Response:
        found = next_item(self.study, person)
        with self.study.reading() as connection:
            last = latest_ticket(connection, person)
            number = items_seen(connection, person)
        shared: dict[str, Any] = {"person": person, "last": last, "number": number, "instructions": self.instructions}
        if found is None:
            return self.render(request, "done.html", **shared)
        values = {
            "view": view_of(found.item, found.shown),
            "ticket": found.ticket,
            "reasons": REASONS,
            "problem": problem,
            "given": form or {},
        }
        return self.render(request, "vote.html", 422 if problem else 200, **shared, **values)

    def vote(self, request: Request) -> Response:
        """Store a vote; on the disk before the answer goes out."""
        person, form = self.posted(request)
        try:
            ticket = one(form, "ticket")
            with self.study.reading() as connection:
                shown = shown_order(connection, person, ticket)
            vote = read_ballot(form, shown, self.study.settings.tags)
            outcome = record(self.study, person, ticket, vote, active=_seconds(one(form, "active")))
        except RefusedVote as refused:
            return self._item(request, person, str(refused), form)
        return _to("/", "saved" if outcome == "stored" else outcome)

    def undo(self, request: Request) -> Response:
        """Take the latest vote back."""
        person, form = self.posted(request)
        done = undo(self.study, person, one(form, "ticket"))
        return _to("/", "undone" if done else "nothing to undo")

    # -- coming and going --------------------------------------------------------------------------------------

    def invitation(self, request: Request) -> Response:
        """Who is invited. Opening a link changes nothing, so that what previews links uses none up."""
        secret = request.path_params["secret"]
        person = self._invited(request, secret)
        return self.render(request, "join.html", invited=person, secret=secret, instructions=self.instructions)

    def join(self, request: Request) -> Response:
        """Exchange an invitation for a cookie."""
        form: Form = request.scope["form"]
        self._invited(request, one(form, "secret"))
        session = open_session(self.study, one(form, "secret"))
        if session is None:
            raise Refusal(404, "bad invitation")
        self.sessions.remember(session)
        answer = _to("/")
        self._set(answer, self.cookie, session)
        return answer

    def leave(self, request: Request) -> Response:
        """End the session."""
        self.posted(request)
        close_session(self.study, request.cookies[self.cookie])
        answer = self.render(request, "message.html", text="left", status=200)
        answer.delete_cookie(self.cookie, secure=self.site.secure, httponly=True, samesite="strict")
        return answer

    def display(self, request: Request) -> Response:
        """Language, colours, and whether single keys vote."""
        form: Form = request.scope["form"]
        secret = request.cookies.get(self.cookie, "")
        if secret and not same_secret(one(form, "token"), csrf_token(secret)):
            raise Refusal(403, "refused")
        back = one(form, "back")
        answer = _to(back if back in PAGES else "/")
        for name, known in (("language", tuple(LANGUAGES)), ("theme", THEMES), ("keys", KEYS)):
            if one(form, name) in known:
                self._set(answer, f"prefopt-{name}", one(form, name))
        return answer

    def _set(self, answer: Response, name: str, value: str) -> None:
        age = int(SESSION_DAYS * 86400)
        answer.set_cookie(name, value, age, httponly=True, samesite="strict", secure=self.site.secure, path="/")

    def _invited(self, request: Request, secret: str) -> Annotator:
        """Whom an invitation is for. Raises :class:`Refusal`.

        Invitations cannot be tried out in numbers; those that hold do not count, for many may come from one address.
        """
        address = address_of(request.scope)
        if self.strangers.wait(address):
            raise Refusal(429, "too many")
        person = invited(self.study, secret)
        if person is None:
            self.strangers.take(address)
            raise Refusal(404, "bad invitation")
        if self.strangers.take(f"annotator {person.id}"):
            raise Refusal(429, "too many")
        return person

    # -- the lead's pages --------------------------------------------------------------------------------------

    def _leading(self, request: Request) -> Annotator:
        person = self.person(request)
        if not person.lead:
            raise Refusal(403, "forbidden")
        return person

    def lead(self, request: Request) -> Response:
        """Progress, agreement, and what is disputed."""
        person = self._leading(request)
        return self.render(request, "lead.html", person=person, s=self.numbers.summary())

    def lead_item(self, request: Request) -> Response:
        """One item with what everybody said of it."""
        person = self._leading(request)
        found = self.numbers.item(request.path_params["number"])
        if found is None:
            raise Refusal(404, "not found")
        return self.render(request, "item.html", person=person, **found)

    # -- files and failures ------------------------------------------------------------------------------------

    def static(self, request: Request) -> Response:
        """Our own script, style and icon, from memory: no path leads anywhere else."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise Refusal(404, "not found")
        return Response(self.files[name], media_type=STATIC[name], headers={"Cache-Control": "no-cache"})

    def icon(self, request: Request) -> Response:
        """What browsers ask for by themselves."""
        return Response(self.files["icon.svg"], media_type=STATIC["icon.svg"])

    def refusal(self, request: Request, error: Exception) -> Response:
        """A page that says why not."""
        assert isinstance(error, Refusal)
        return self.render(request, "message.html", text=error.text, status=error.status)

    def http_error(self, request: Request, error: Exception) -> Response:
        """Routes that are not there."""
        assert isinstance(error, HTTPException)
        return self.render(
            request,
            "message.html",
            text="not found" if error.status_code == 404 else "refused",
            status=error.status_code,
        )

    def study_error(self, request: Request, error: Exception) -> Response:
        """The disk or the file: in words, without a path."""
        log.error("%s", error)
        said = str(error).removeprefix(f"{self.study.path}: ")
        if isinstance(error, RefusedVote):
            return self.render(request, "message.html", text="refused", status=400)
        return self.render(request, "message.html", text="not stored", why=said, status=503)

    def error(self, request: Request, error: Exception) -> Response:
        """A bug: told in the log, never to the browser."""
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return self.render(request, "message.html", text="broken", status=500)


def _to(path: str, notice: str = "") -> RedirectResponse:
    return RedirectResponse(f"{path}?notice={notice.replace(' ', '+')}" if notice else path, 303)


def _seconds(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
