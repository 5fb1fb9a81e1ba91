"""Guard of the pages: allowed hosts and origins, limits of size and rate, and the headers of every response.

Every site open in a browser can send requests to a server on this machine. Requests must therefore name one of our
hosts, posts must come from one of our pages and carry its token, and no response may run, load, frame or send anything
that is not ours.
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
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefopt.errors import UserError

log = logging.getLogger("prefopt.web")
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
    # "no-referrer" would make browsers send "Origin: null", which our own check refuses.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class Refusal(HTTPException):
    """A request that is answered by a message page: HTTP status and the name of its text."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Requests per session or address: ``burst`` at once, ``per_second`` on average."""

    per_second: float = 50.0
    burst: float = 200.0


@dataclass(slots=True)
class Buckets:
    """Token buckets by name; full ones are dropped."""

    rate: RateLimit
    _held: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, name: str, at: float | None = None) -> float:
        """Take a token and return 0, or the seconds to wait for one."""
        now = time.monotonic() if at is None else at
        level = self._level(name, now)
        if len(self._held) > 10_000:
            full = self.rate.burst / self.rate.per_second
            self._held = {n: held for n, held in list(self._held.items()) if now - held[1] < full}
        self._held[name] = (level if level < 1 else level - 1, now)
        return max(0.0, 1 - level) / self.rate.per_second

    def wait(self, name: str) -> float:
        """The seconds to wait for a token."""
        return max(0.0, 1 - self._level(name, time.monotonic())) / self.rate.per_second

    def _level(self, name: str, now: float) -> float:
        level, since = self._held.get(name, (self.rate.burst, now))
        return min(self.rate.burst, level + (now - since) * self.rate.per_second)


@dataclass(slots=True)
class Sessions:
    """Recently live sessions: each has its own rate limit, whatever its address. Only rate limits use this cache;
    permissions are looked up at every request."""

    cookie: str
    live: Callable[[str], bool]
    seconds: float = 600.0
    _known: dict[str, float] = field(default_factory=dict)

    def known(self, secret: str) -> bool:
        """Whether the session was live recently, from the cache alone."""
        now = time.monotonic()
        if now - self._known.get(secret, -self.seconds) >= self.seconds:
            return False
        self._known[secret] = now
        return True

    def remember(self, secret: str) -> None:
        """Mark a session as live now."""
        now = time.monotonic()
        self._known = {s: at for s, at in list(self._known.items()) if now - at < self.seconds} | {secret: now}

    async def found(self, secret: str) -> bool:
        """Whether the session is live, by looking it up."""
        try:
            live = await run_in_threadpool(self.live, secret)
        except UserError:  # the requested page reports it
            return False
        if live:
            self.remember(secret)
        return live


def address_of(scope: Scope) -> str:
    """The client's address; for IPv6 its /64 network, which usually belongs to one household."""
    host: str = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.IPv6Network((address.packed, 64), strict=False))


def csrf_token(session: str) -> str:
    """The form token of a session, derived from its cookie, which other sites cannot read."""
    return hmac.new(session.encode("utf-8", "replace"), b"prefopt form", hashlib.sha256).hexdigest()


def same_secret(one: str, other: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


class Guard:
    """Middleware that checks every request. Accepted posts have their fields in ``scope["form"]``: name to values."""

    def __init__(self, app: ASGIApp, origins: Collection[str], sessions: Sessions, rate: RateLimit) -> None:
        """``origins`` (``http://127.0.0.1:8700``) are the allowed Origin headers; Host headers must match one."""
        self.app, self.sessions = app, sessions
        self.origins = frozenset(origin.lower() for origin in origins)
        self.hosts = frozenset(origin.partition("://")[2] for origin in self.origins)
        self.buckets, self.looked_up = Buckets(rate), Buckets(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        except Exception:  # Starlette has answered and logged the error before it raises it again
            log.log(logging.DEBUG if answered else logging.ERROR, "%s failed", scope["path"], exc_info=True)
            if not answered:
                await refusal(500, "Something broke; what is stored is safe.")(scope, receive, answer)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = await self._refused(scope)
        if refused is None and scope["method"] == "POST":
            refused = await _read_form(scope, receive)
        await (refused or self.app)(scope, receive, send)

    async def _wait(self, scope: Scope) -> float:
        """Seconds that a live session, or else an address, has to wait.

        Looking up a secret may read the disk, so lookups per address are limited as well.
        """
        address, secret = address_of(scope), Request(scope).cookies.get(self.sessions.cookie, "")
        if secret and (
            self.sessions.known(secret) or (not self.looked_up.take(address) and await self.sessions.found(secret))
        ):
            return self.buckets.take(f"session {secret}")
        return self.buckets.take(address)

    async def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return refusal(421, "Unknown host name.")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return refusal(405, "Only GET and POST.", {"Allow": "GET, HEAD, POST"})
        if len(scope.get("query_string", b"")) > LARGEST_QUERY or len(scope.get("raw_path", b"")) > LARGEST_QUERY:
            return refusal(414, "The address is too long.")
        if wait := await self._wait(scope):
            return refusal(429, "Too many requests; wait a moment.", {"Retry-After": str(int(wait) + 1)})
        if scope["method"] != "POST":
            return None
        origins, site = headers.getlist("origin"), headers.get("sec-fetch-site", "same-origin")
        if len(origins) != 1 or origins[0].lower() not in self.origins or site != "same-origin":
            return refusal(403, "The request does not come from a page of this server.")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
            return refusal(415, "Only forms.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > LARGEST_BODY:
            return refusal(413, "The form is too large.")
        return None


async def _read_form(scope: Scope, receive: Receive) -> Response | None:
    """Read the form, or refuse one that is too large, too slow or invalid."""
    refused, held, more = refusal(413, "The form is too large, or came too slowly."), bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                held += message.get("body", b"")
                more = message.get("more_body", False)
                if message["type"] != "http.request" or len(held) > LARGEST_BODY:
                    return refused
    except TimeoutError:
        return refused
    text = held.decode("ascii", "replace")
    try:
        scope["form"] = parse_qs(text, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace")
    except ValueError:
        return refusal(400, "The form cannot be read.")
    return None


def with_policy(send: Send) -> Send:
    """Wrap ``send`` to add the headers of every response."""

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)  # a page of others' contents brings a stricter policy of its own
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return guarded


def refusal(status: int, what: str, headers: dict[str, str] | None = None) -> Response:
    return PlainTextResponse(what + "\n", status, headers)
