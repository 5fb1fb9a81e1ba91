"""The server over one study: one process, one address."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from filelock import FileLock, Timeout
from starlette.types import ASGIApp

from prefopt.collect.app import Site, build_app
from prefopt.collect.connections import Connection
from prefopt.config.collect import LOCAL, CollectServeConfig
from prefopt.core.terminal import tell
from prefopt.errors import ConfigError, Interrupted, StudyError
from prefopt.studies.annotators import invite, live_invitations
from prefopt.studies.study import Study


def serve(config: CollectServeConfig) -> None:
    """Serve until a signal comes, and then raise :class:`Interrupted`.

    Raises :class:`StudyError` where the study is being served already, and :class:`ConfigError` for an address that
    cannot be had, or that others can reach while nobody is invited.
    """
    path = Path(config.study)
    study = Study(path)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        study.close()
        raise StudyError(f"{path}: is being served by another process; stop that one first") from None
    try:
        local = config.host in LOCAL
        if not local and not live_invitations(study):
            raise ConfigError(
                f"--host {config.host} is reached from other machines, and nobody is invited:"
                f" first run prefopt collect invite {path} --name NAME"
            )
        with _stopping(), _listen(config.host, config.port) as listening:
            port = listening.getsockname()[1]
            site = site_of(config, port)
            _tell(study, config, site, port)
            uvicorn.Server(settings_of(build_app(study, site), config.trusted_proxies)).run(sockets=[listening])
    finally:
        study.close()  # which also puts all that stands in the log into the one file
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _stopping() -> Iterator[None]:
    """uvicorn ends in order and then sends itself the signal again, which would end the process on the spot."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped; what was acknowledged is stored", number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(study: Study, config: CollectServeConfig, site: Site, port: int) -> None:
    """What is served, and how to come in."""
    tell(f"{study.path}: {study.settings.title}")
    if config.host in LOCAL:
        _, secret = invite(study, "lead", lead=True)
        tell(f"Your own link, to vote and to see how it goes: {first_origin(config, port)}/join/{secret}")
    else:
        tell(f"serving on {config.host} port {port}, for those who are invited")
        if not site.secure:
            tell("note: without TLS whoever is between can read cookies and votes; put a proxy in front (--url)")
    if site.secure and not config.trusted_proxies:
        tell("note: without --trusted-proxies all who come through the proxy share one address, and its limits")
    tell("Ctrl-C stops; what was acknowledged is stored", flush=True)


def settings_of(app: ASGIApp, trusted_proxies: Sequence[str] | None) -> uvicorn.Config:
    """The server's settings. An address in X-Forwarded-For is believed from ``trusted_proxies`` alone."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies or ()),
        http=Connection,
        ws="none",
        lifespan="off",
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
    )


def site_of(config: CollectServeConfig, port: int) -> Site:
    """The addresses by which browsers may come: others are other sites' tricks."""
    if config.url is not None:
        return Site([config.url.rstrip("/").lower()], secure=config.url.startswith("https://"))
    names = config.allowed_hosts
    if names is None:
        names = ["127.0.0.1", "localhost", "[::1]"] if config.host in LOCAL else [_spelt(config.host)]
    origins = [f"http://{name}" if _has_port(name) else f"http://{name}:{port}" for name in names]
    if port == 80:
        origins += [f"http://{name}" for name in names]
    return Site(origins)


def first_origin(config: CollectServeConfig, port: int) -> str:
    """The address to print."""
    return (config.url or f"http://{_spelt(config.host)}:{port}").rstrip("/")


def _has_port(name: str) -> bool:
    return name.rpartition(":")[2].isdecimal() and not name.endswith("]")


def _spelt(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        what = error.strerror or str(error)
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on ({what}); name another port") from error
