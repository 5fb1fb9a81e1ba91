"""Connections, of which there are only so many: those that keep a place without asking anything give it up.

A person is served at once while others hold connections open whose requests never end.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Sequence
from functools import lru_cache

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefopt.collect.security import HEADERS, address_of, refusal, with_policy

PLACES = 500
PLACES_OF_ONE = 250
"""Connections from one address, that of a proxy which is trusted excepted."""
HEADER_SECONDS = 10.0
"""From the first byte of a request (from the connection, for the first one) to the end of its headers."""


class Connection(H11Protocol):
    """One connection, given to uvicorn as ``http``."""

    since = 0.0
    _late: asyncio.TimerHandle | None = None

    @property
    def address(self) -> str:
        """Where it comes from: a proxy itself, not those for whom it asks."""
        return address_of({"client": self.client})

    @property
    def answering(self) -> bool:
        """Whether there is a request without its whole answer."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether it has its place for nothing, so far: no request, or one whose body has not come."""
        return not self.answering or self.conn.their_state is h11.SEND_BODY

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, which another one may have to give up."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        own = [c for c in others if c.address == self.address]
        crowded = len(own) >= PLACES_OF_ONE and not _trusts(self.config.forwarded_allow_ips, self.client)
        if (crowded or len(others) >= PLACES) and not _make_room(own if crowded else others):
            self.app = _full

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in part of a request; its headers are late where they do not end in time."""
        super().data_received(data)
        if self.answering:
            self._in_time()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, with the headers that every answer carries."""
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
    """End the one that has waited longest, one that never asked anything first; False where all are being answered."""
    waiting = [c for c in connections if c.waits]
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
    if not proxies or client is None:
        return False
    return any(ipaddress.ip_address(client[0]) in network for network in _networks(tuple(proxies)))


@lru_cache
def _networks(proxies: tuple[str, ...]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(proxy) for proxy in proxies]
