"""What stands before the pages: who may ask, how much and how often, and what every answer carries.

A page on this machine can be reached by every site that a browser has open. So a request must name a host that is
ours, a post must come from a page of ours and carry a token that only such a page knows, and no answer may run, load,
frame or send anything that is not ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefopt.errors import StudyError

log = logging.getLogger("prefopt.collect")
LARGEST_BODY = 64 * 1024
LARGEST_QUERY = 2048
BODY_SECONDS = 15.0
MOST_FIELDS = 200

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " frame-ancestors 'none'; base-uri 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # A policy that hid the origin altogether would hide it from our own check as well.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Requests that one session or address may make: ``burst`` at once, ``per_second`` in the long run."""

    per_second: float = 50.0
    burst: float = 200.0


@dataclass(slots=True)
class Buckets:
    """Token buckets by name; those that are full again are forgotten."""

    rate: RateLimit
    _held: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, name: str, at: float | None = None) -> float:
        """Zero where a request may go on, else the seconds to wait."""
        now = time.monotonic() if at is None else at
        level = self._level(name, now)
        if len(self._held) > 10_000:
            full = self.rate.burst / self.rate.per_second
            self._held = {n: held for n, held in list(self._held.items()) if now - held[1] < full}
        self._held[name] = (level if level < 1 else level - 1, now)
        return self._wait(level)

    def wait(self, name: str) -> float:
        """The same without taking anything."""
        return self._wait(self._level(name, time.monotonic()))

    def _level(self, name: str, now: float) -> float:
        level, since = self._held.get(name, (self.rate.burst, now))
        return min(self.rate.burst, level + (now - since) * self.rate.per_second)

    def _wait(self, level: float) -> float:
        return 0.0 if level >= 1 else (1 - level) / self.rate.per_second


@dataclass(slots=True)
class Sessions:
    """The sessions that were live a short while ago: each has its own share of requests, from whatever address.

    Only limits rest on this memory. Who may see and do what is asked of the study at every request.
    """

    cookie: str
    live: Callable[[str], bool]
    seconds: float = 600.0
    _known: dict[str, float] = field(default_factory=dict)

    def secret(self, scope: Scope) -> str:
        """What a request carries, live or not; empty where it carries nothing."""
        return Request(scope).cookies.get(self.cookie, "")

    def known(self, secret: str) -> bool:
        """Whether it was live a short while ago; asks nobody."""
        now = time.monotonic()
        if now - self._known.get(secret, -self.seconds) >= self.seconds:
            return False
        self._known[secret] = now
        return True

    def remember(self, secret: str) -> None:
        """It is live now."""
        now = time.monotonic()
        self._known = {s: at for s, at in list(self._known.items()) if now - at < self.seconds} | {secret: now}

    async def found(self, secret: str) -> bool:
        """Whether it is live, as the study says."""
        try:
            live = await run_in_threadpool(self.live, secret)
        except StudyError:  # the page that was asked for will say it
            return False
        if live:
            self.remember(secret)
        return live


def address_of(scope: Scope) -> str:
    """The client's address; of IPv6 the /64 network, all of which one household has."""
    host: str = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.IPv6Network((address.packed, 64), strict=False))


def csrf_token(session: str) -> str:
    """What a form of this session carries: it follows from the cookie, which other sites cannot read."""
    return hmac.new(session.encode("utf-8", "replace"), b"prefopt collect form", hashlib.sha256).hexdigest()


def same_secret(one: str, other: str) -> bool:
    """Whether two secrets are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


class Guard:
    """Middleware around everything. A post that is let through has its fields in ``scope["form"]``: name to values."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str],
        origins: Collection[str],
        sessions: Sessions,
        rate: RateLimit | None = None,
    ) -> None:
        """``hosts`` are what the Host header may be (``127.0.0.1:8700``), ``origins`` what Origin may be."""
        self.app = app
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(origin.lower() for origin in origins)
        self.sessions = sessions
        self.buckets, self.looked_up = Buckets(rate or RateLimit()), Buckets(rate or RateLimit())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            answered = True
            await with_policy(send)(message)

        try:
            await self._answer(scope, receive, answer)
        except Exception:  # Starlette answers an unforeseen error, and raises it again: it is logged already
            log.log(logging.DEBUG if answered else logging.ERROR, "%s failed", scope["path"], exc_info=True)
            if not answered:
                await refusal(500, "Something broke; stored votes are safe.")(scope, receive, answer)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = await self._refused(scope)
        if refused is None and scope["method"] == "POST":
            body = await _body(receive)
            refused = _read_form(scope, body)

            async def receive_none() -> Message:
                return {"type": "http.request", "body": b"", "more_body": False}

            receive = receive_none
        await (refused or self.app)(scope, receive, send)

    async def _wait(self, scope: Scope) -> float:
        """Seconds to wait for whoever asks: a live session, else an address.

        Looking a secret up reads the study, so that an address may do that no more often than it may ask.
        """
        address, secret = address_of(scope), self.sessions.secret(scope)
        if secret and (
            self.sessions.known(secret) or (not self.looked_up.take(address) and await self.sessions.found(secret))
        ):
            return self.buckets.take(f"session {secret}")
        return self.buckets.take(address)

    async def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return refusal(421, "This server does not answer to that name.")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return refusal(405, "Only GET and POST.", {"Allow": "GET, HEAD, POST"})
        if len(scope.get("query_string", b"")) > LARGEST_QUERY or len(scope.get("raw_path", b"")) > LARGEST_QUERY:
            return refusal(414, "The address is too long.")
        if wait := await self._wait(scope):
            return refusal(429, "Too many requests; wait a moment.", {"Retry-After": str(int(wait) + 1)})
        if scope["method"] != "POST":
            return None
        origins = headers.getlist("origin")
        if len(origins) != 1 or origins[0].lower() not in self.origins:
            return refusal(403, "The request does not come from a page of this server.")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return refusal(403, "The request does not come from a page of this server.")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
            return refusal(415, "Only forms.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > LARGEST_BODY:
            return refusal(413, "The form is too large.")
        return None


async def _body(receive: Receive) -> bytes | None:
    """The body, or None where it is too large or too slow."""
    held = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                held += message.get("body", b"")
                if len(held) > LARGEST_BODY:
                    return None
                if not message.get("more_body"):
                    return bytes(held)
    except TimeoutError:
        return None


def _read_form(scope: Scope, body: bytes | None) -> Response | None:
    if body is None:
        return refusal(413, "The form is too large, or came too slowly.")
    try:
        scope["form"] = parse_qs(
            body.decode("ascii", "replace"), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace"
        )
    except ValueError:
        return refusal(400, "The form cannot be read.")
    return None


def with_policy(send: Send) -> Send:
    """Send with the headers that every answer carries."""

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return guarded


def refusal(status: int, what: str, headers: dict[str, str] | None = None) -> Response:
    """A short answer in plain text."""
    return PlainTextResponse(what + "\n", status, headers)
