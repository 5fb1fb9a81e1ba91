"""The server of a study: one process, one address, and a bounded number of connections. Those without a request are
closed when places run out, so that annotators are served while others hold connections open."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from filelock import Timeout
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefopt.collect.app import Site, build_app
from prefopt.collect.security import HEADERS, address_of, refusal, with_policy
from prefopt.config.collect import LOCAL, CollectServeConfig
from prefopt.core.terminal import tell
from prefopt.errors import ConfigError, Interrupted, StudyError
from prefopt.studies.annotators import invite, live_invitations
from prefopt.studies.served import forget_address, lock_of, note_address
from prefopt.studies.study import Study

PLACES = 500
PLACES_OF_ONE = 250
"""Connections per address, except that of a trusted proxy."""
HEADER_SECONDS = 10.0
"""From the first byte of a request (for the first request, from the connection) to the end of its headers."""


def serve(config: CollectServeConfig) -> None:
    """Serve a study until a signal arrives, then raise :class:`Interrupted`.

    Raises :class:`StudyError` for a study that is being served already, and :class:`ConfigError` for an address that is
    unavailable, or is reachable from other machines while no annotator is invited.
    """
    path = Path(config.study)
    _check_certificate(config)
    study = Study(path)
    lock = lock_of(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        study.close()
        raise StudyError(f"{path}: is being served by another process; stop it first") from None
    try:
        if config.host not in LOCAL and not live_invitations(study):
            raise ConfigError(
                f"--host {config.host} is reachable from other machines, and no annotator is invited;"
                f" first run prefopt collect invite {path} --name NAME"
            )
        with _stopping(), _listen(config.host, config.port) as listening:
            port = listening.getsockname()[1]
            site = site_of(config, port)
            note_address(path, _address(config, site, port))
            _announce(study, config, site, port)
            settings = settings_of(build_app(study, site), config.trusted_proxies, config.certfile, config.keyfile)
            uvicorn.Server(settings).run(sockets=[listening])
    finally:
        study.close()  # merges SQLite's log into the file
        forget_address(path)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _stopping() -> Iterator[None]:
    """uvicorn shuts down and then repeats the signal, which by default would kill the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped; acknowledged votes are stored", number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(study: Study, config: CollectServeConfig, site: Site, port: int) -> None:
    tell(f"{study.path}: {study.settings.title}")
    if config.host in LOCAL:
        _, secret = invite(study, "lead", lead=True)
        tell(f"Your own link, to vote and to see progress: {_address(config, site, port)}/join/{secret}")
    else:
        tell(f"serving on {config.host} port {port}, for invited annotators")
        if not site.secure:
            what = "use a certificate (--certfile), or a proxy with TLS (--url)"
            tell(f"note: without TLS cookies and votes can be read on the network; {what}")
    if site.secure and config.certfile is None and not config.trusted_proxies:
        tell("note: without --trusted-proxies all clients of the proxy share one address and its limits")
    tell("Ctrl-C stops; acknowledged votes are stored", flush=True)


def _address(config: CollectServeConfig, site: Site, port: int) -> str:
    """What links to the server begin with."""
    if config.url is not None:
        return config.url.rstrip("/")
    if config.host in LOCAL:
        return f"{'https' if site.secure else 'http'}://{_in_url(config.host)}:{port}"
    return next(iter(site.origins))


def _check_certificate(config: CollectServeConfig) -> None:
    """Raises :class:`ConfigError` for a certificate or key that cannot be used."""
    if config.certfile is None:
        return
    given = " ".join(
        f"{flag} {file}" for flag, file in (("--certfile", config.certfile), ("--keyfile", config.keyfile)) if file
    )

    def refuse() -> str:
        raise ConfigError(f"{given}: the key has a password; give one without")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.certfile, config.keyfile, password=refuse)
    except ssl.SSLError as error:
        what = "no certificate with its key, in PEM"
        raise ConfigError(f"{given}: is {what} ({error.reason or error}); give both files") from None
    except OSError as error:
        raise ConfigError(f"{given}: {error.strerror}; check the path") from None


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


def site_of(config: CollectServeConfig, port: int) -> Site:
    """The addresses that browsers may use; requests with other Host headers are refused."""
    if config.url is not None:
        return Site([config.url.rstrip("/").lower()], secure=config.url.startswith("https://"))
    names = config.allowed_hosts
    if names is None:
        names = ["127.0.0.1", "localhost", "[::1]"] if config.host in LOCAL else [_in_url(config.host)]
    with_port = {name for name in names if name.rpartition(":")[2].isdecimal()}  # [::1] ends in a bracket
    scheme, usual = ("http", 80) if config.certfile is None else ("https", 443)
    origins = [f"{scheme}://{name}" if name in with_port else f"{scheme}://{name}:{port}" for name in names]
    return Site(origins + [f"{scheme}://{name}" for name in names if port == usual], secure=scheme == "https")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
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
