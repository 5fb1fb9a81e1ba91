"""A study served for a test, and a client that sends what it is told to, forged or not."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from urllib.parse import urlencode

import uvicorn

from prefopt.collect.app import Site, build_app
from prefopt.studies.annotators import invite
from prefopt.studies.study import Study
from prefopt.web.security import RateLimit
from prefopt.web.server import settings_of

FAST = RateLimit(per_second=10_000, burst=10_000)


@dataclass
class Served:
    """An address, and the study behind it. ``closing`` is called before the server goes: browsers are to go first."""

    port: int
    study: Study
    closing: list[Callable[[], object]] = field(default_factory=list)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def link(self, name: str, *, lead: bool = False) -> str:
        return f"/join/{invite(self.study, name, lead=lead)[1]}"

    def signed_in(self, name: str, *, lead: bool = False) -> Client:
        client = Client(self.port)
        secret = self.link(name, lead=lead).removeprefix("/join/")
        assert client.post("/join", {"secret": secret}).status == 303
        return client


@contextmanager
def served(study: Study, rate: RateLimit = FAST, trusted_proxies: Sequence[str] = ()) -> Iterator[Served]:
    """The application behind a real server, in a thread."""
    with listening_socket() as listening:
        port = listening.getsockname()[1]
        app = build_app(study, Site([f"http://127.0.0.1:{port}"], rate=rate))
        found = Served(port, study)
        with running(uvicorn.Server(settings_of(app, trusted_proxies)), listening, found.closing):
            yield found


def listening_socket() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@contextmanager
def running(
    server: uvicorn.Server, listening: socket.socket, closing: Sequence[Callable[[], object]]
) -> Iterator[None]:
    """A server in a thread; in the end ``closing`` are called, and it stops."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield
    finally:
        for close in closing:
            close()
        server.should_exit = True
        thread.join()


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str
    data: bytes = b""

    def field(self, name: str, form: str = "/vote") -> str:
        """A hidden field of a form, as a browser reads it."""
        inside = re.search(rf'<form[^>]*action="{form}".*?</form>', self.text, re.S)
        found = re.search(rf'name="{name}" value="([^"]*)"', inside[0]) if inside else None
        return unescape(found[1]) if found else ""


@dataclass
class Client:
    """A browser without script: it keeps cookies and says where a form came from."""

    port: int
    cookies: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.send("GET", path, headers=headers)

    def post(self, path: str, fields: object = (), headers: Mapping[str, str] | None = None) -> Answer:
        body = urlencode(fields, doseq=True, errors="replace")  # type: ignore[call-overload]
        own = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/x-www-form-urlencoded"}
        return self.send("POST", path, body.encode(), own | dict(headers or {}))

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        given = dict(headers or {})
        if self.cookies and "Cookie" not in given:
            given["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {k: v for k, v in given.items() if v is not None})
            answer = connection.getresponse()
            data = answer.read()
            text = data.decode("utf-8", "replace")
        finally:
            connection.close()
        for line in answer.headers.get_all("Set-Cookie") or ():
            name, _, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value
        return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, text, data)

    def vote(self, page: Answer, choice: str, **more: str | Sequence[str]) -> Answer:
        """Send the page's form with a choice."""
        fields = {"token": page.field("token"), "ticket": page.field("ticket"), "active": "", "choice": choice}
        return self.post("/vote", fields | more)
