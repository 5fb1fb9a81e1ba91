"""The web application on a folder of runs: routes, sessions, the stream of events, files and errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from prefopt.errors import UserError
from prefopt.ui.chat_pages import ChatPages
from prefopt.ui.chats import ChatTopic
from prefopt.ui.feed import Topic
from prefopt.ui.file_pages import FilePages
from prefopt.ui.jobs import JobTopic
from prefopt.ui.run_pages import RunPages
from prefopt.ui.runs import CurvesTopic, TableTopic
from prefopt.ui.site import PAGES, PREFERENCES, YEAR, Workspace, redirect, value_of
from prefopt.web.security import Guard, RateLimit, Refusal

log = logging.getLogger("prefopt.ui")
MOST_CURVES = 7
"""Runs laid over each other: as many as there are colours."""

Handler = Callable[[Request], Any]


def build_app(site: Workspace, origins: Collection[str], rate: RateLimit | None = None) -> ASGIApp:
    """The application inside its :class:`prefopt.web.security.Guard`."""
    entry, runs, files, chat = _Entry(site), RunPages(site), FilePages(site), ChatPages(site)
    get: dict[str, Handler] = {
        "/enter/{key}": entry.enter,
        "/static/{name}": entry.static,
        "/favicon.ico": entry.static,
    }
    get |= {path: site.show(handler) for path, handler in {**runs.get, **files.get, **chat.get}.items()}
    post: dict[str, Handler] = {
        "/display": entry.display,
        "/leave": entry.leave,
        **runs.post,
        **files.post,
        **chat.post,
    }
    routes = [Route(path, handler, methods=["GET"]) for path, handler in get.items()]
    routes += [Route(path, handler, methods=["POST"]) for path, handler in post.items()]
    routes.append(Route("/events", entry.events, methods=["GET"]))
    handlers: dict[Any, Any]
    handlers = {HTTPException: entry.http_error, UserError: entry.user_error, Exception: entry.error}
    app = Starlette(debug=False, routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, origins, site.sessions, rate or RateLimit())


class _Entry:
    """The handlers of no page: entering, settings, events, files and errors."""

    def __init__(self, site: Workspace) -> None:
        self.site = site

    def enter(self, request: Request) -> Response:
        """Exchange the key of the link for a session. The next page is opened by a page of ours and not by a redirect:
        after a link from another site the browser would send no cookie with that."""
        session = self.site.enter(request.path_params["key"])
        if session is None:
            raise Refusal(404, "bad key")
        answer = self.site.render(request, "enter.html")
        answer.set_cookie(self.site.cookie, session, httponly=True, samesite="strict", path="/")
        return answer

    def leave(self, request: Request) -> Response:
        self.site.form(request)
        self.site.leave(self.site.session(request))
        answer = self.site.render(request, "message.html", text="left", signed_in=False)
        answer.delete_cookie(self.site.cookie, httponly=True, samesite="strict")
        return answer

    def display(self, request: Request) -> Response:
        """Set language and theme."""
        form = self.site.form(request)
        back = value_of(form, "back")
        answer = redirect(back if back in PAGES else "/")
        for name, known in PREFERENCES.items():
            if (chosen := value_of(form, name)) in known:
                answer.set_cookie(f"prefopt-{name}", chosen, YEAR, httponly=True, samesite="strict", path="/")
        return answer

    async def events(self, request: Request) -> Response:
        """The one stream of a page: of the topics that its address names."""
        self.site.session(request)
        query, site = request.query_params, self.site
        topics: list[Topic] = []
        if query.get("runs"):
            topics.append(TableTopic(site.runs))
        if curves := query.getlist("curve")[:MOST_CURVES]:
            topics.append(CurvesTopic(site.runs, curves, "epoch" if query.get("x") == "epoch" else "step"))
        for name in query.getlist("job")[:2]:
            if (job := site.jobs.get(name)) is not None:
                topics.append(JobTopic(site.jobs, job))
        if query.get("chat"):
            topics.append(ChatTopic(site.room))
        return StreamingResponse(site.feed.stream(topics), media_type="text/event-stream")

    def static(self, request: Request) -> Response:
        """Script, style and icon."""
        found = self.site.files.answer(request.path_params.get("name", "icon.svg"))
        if found is None:
            raise Refusal(404, "not found")
        return found

    def http_error(self, request: Request, error: HTTPException) -> Response:
        """Refusals, and unknown routes and methods."""
        known = "not found" if error.status_code == 404 else "refused"
        text = error.detail if isinstance(error, Refusal) else known
        return self.site.render(request, "message.html", error.status_code, text=text)

    def user_error(self, request: Request, error: UserError) -> Response:
        """A mistake that the page did not show beside its field."""
        return self.site.render(request, "message.html", 422, text="not done", why=str(error))

    def error(self, request: Request, error: Exception) -> Response:
        """A bug: its traceback goes to the log, never to the browser."""
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return self.site.render(request, "message.html", 500, text="broken")
