"""The server of a study: one process, one address."""

from __future__ import annotations

import ssl
from pathlib import Path

import uvicorn
from filelock import Timeout

from prefopt.collect.app import Site, build_app
from prefopt.config.collect import LOCAL, CollectServeConfig
from prefopt.core.terminal import tell
from prefopt.errors import ConfigError, StudyError
from prefopt.studies.annotators import invite, live_invitations
from prefopt.studies.served import forget_address, lock_of, note_address
from prefopt.studies.study import Study
from prefopt.web.server import in_url, listen, settings_of, stopping


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
        with stopping("stopped; acknowledged votes are stored"), listen(config.host, config.port) as listening:
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
        return f"{'https' if site.secure else 'http'}://{in_url(config.host)}:{port}"
    return next(iter(site.origins))


def _check_certificate(config: CollectServeConfig) -> None:
    """Raises :class:`ConfigError` for a certificate or key that cannot be used."""
    if config.certfile is None:
        return
    given = " ".join(
        f"{flag} {file}" for flag, file in (("--certfile", config.certfile), ("--keyfile", config.keyfile)) if file
    )

    def refuse() -> str:
        raise ConfigError(f"{given}: the key has a password; give one without a password")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.certfile, config.keyfile, password=refuse)
    except ssl.SSLError as error:
        what = "no certificate with its key, in PEM"
        raise ConfigError(f"{given}: is {what} ({error.reason or error}); give both files") from None
    except OSError as error:
        raise ConfigError(f"{given}: {error.strerror}; check the path") from None


def site_of(config: CollectServeConfig, port: int) -> Site:
    """The addresses that browsers may use; requests with other Host headers are refused."""
    if config.url is not None:
        return Site([config.url.rstrip("/").lower()], secure=config.url.startswith("https://"))
    names = config.allowed_hosts
    if names is None:
        names = ["127.0.0.1", "localhost", "[::1]"] if config.host in LOCAL else [in_url(config.host)]
    with_port = {name for name in names if name.rpartition(":")[2].isdecimal()}  # [::1] ends in a bracket
    scheme, usual = ("http", 80) if config.certfile is None else ("https", 443)
    origins = [f"{scheme}://{name}" if name in with_port else f"{scheme}://{name}:{port}" for name in names]
    return Site(origins + [f"{scheme}://{name}" for name in names if port == usual], secure=scheme == "https")
