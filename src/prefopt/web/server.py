"""A server of local pages: one process, one address, and a bounded number of connections. Those without a request are
closed when places run out, so that some are served while others hold connections open."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefopt.errors import ConfigError, Interrupted
from prefopt.web.security import HEADERS, address_of, refusal, with_policy

PLACES = 500
PLACES_OF_ONE = 250
"""Connections per address, except that of a trusted proxy."""
HEADER_SECONDS = 10.0
"""From the first byte of a request (for the first request, from the connection) to the end of its headers."""


@contextmanager
def stopping(what: str) -> Iterator[None]:
    """uvicorn shuts down and then repeats the signal, which by default would kill the process: here it raises
    :class:`Interrupted` that says ``what``."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(what, number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settings_of(
    app: ASGIApp, trusted_proxies: Sequence[str] | None, certfile: str | None = None, keyfile: str | None = None
) -> uvicorn.Config:
    """The settings of uvicorn. X-Forwarded-For is accepted from ``trusted_proxies`` alone."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies or ()),
        http=Connection,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
        ws="none",
        lifespan="off",
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
    )


def in_url(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises :class:`ConfigError` for an address that is unavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        what = error.strerror or str(error)
        raise ConfigError(f"--host {host} --port {port}: is unavailable ({what}); choose another port") from error


# -- connections ---------------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """One HTTP connection; uvicorn creates them."""

    since = 0.0
    _late: asyncio.TimerHandle | None = None

    @property
    def address(self) -> str:
        """The peer: a proxy itself, not the clients that it forwards."""
        return address_of({"client": self.client})

    @property
    def answering(self) -> bool:
        """Whether a request has no complete response yet."""
        return self.cycle is not None and not self.cycle.response_complete

    # uvicorn declares a narrower transport than asyncio.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place; where there is none, the connection that has waited longest is closed."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        own = [c for c in others if c.address == self.address]
        crowded = len(own) >= PLACES_OF_ONE and not _trusts(self.config.forwarded_allow_ips, self.client)
        if (crowded or len(others) >= PLACES) and not _make_room(own if crowded else others):
            self.app = _full

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive a part of a request; start or stop the timer of its headers."""
        super().data_received(data)
        if self.answering:
            self._in_time()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP, with the headers of every response."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store", "Connection": "close"}
            response = h11.Response(status_code=400, headers=list((HEADERS | text).items()), reason=b"Bad Request")
            for event in (response, h11.Data(data=msg.encode("ascii") + b"\n"), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if not self.answering:
            self.transport.close()


def _make_room(connections: Iterable[Connection]) -> bool:
    """Close the connection that has waited longest, first one without any request; False where none waits."""
    # Without a request, or with one whose body is incomplete.
    waiting = [c for c in connections if not c.answering or c.conn.their_state is h11.SEND_BODY]
    if not waiting:
        return False
    oldest = min(waiting, key=lambda c: (c.cycle is not None, c.since))
    oldest.transport.abort()
    oldest.connections.discard(oldest)
    return True


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    answer = refusal(503, "Too many connections; try again in a moment.", {"Connection": "close", "Retry-After": "5"})
    await answer(scope, receive, with_policy(send))


def _trusts(proxies: Sequence[str] | None, client: tuple[str, int] | None) -> bool:
    known = [ipaddress.ip_network(proxy) for proxy in proxies or ()]
    return client is not None and any(ipaddress.ip_address(client[0]) in network for network in known)
