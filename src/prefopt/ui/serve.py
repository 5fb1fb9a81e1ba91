"""The server of a folder of runs: one process, on this machine alone."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from types import FrameType

import uvicorn

from prefopt.config.tools import UiConfig
from prefopt.core.terminal import tell
from prefopt.errors import RunError
from prefopt.ui.app import build_app
from prefopt.ui.feed import Feed
from prefopt.ui.jobs import private_folder
from prefopt.ui.site import Workspace
from prefopt.web.server import listen, settings_of, stopping

HOST = "127.0.0.1"


class Server(uvicorn.Server):
    """uvicorn, which waits for open streams when it stops: they are ended first."""

    def __init__(self, settings: uvicorn.Config, feed: Feed) -> None:
        super().__init__(settings)
        self._feed = feed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._feed.close()
        super().handle_exit(sig, frame)


def serve(config: UiConfig) -> None:
    """Serve a folder until a signal arrives, then raise :class:`prefopt.errors.Interrupted`.

    Raises :class:`RunError` for an absent folder, and :class:`prefopt.errors.ConfigError` for a port in use."""
    base = Path(config.folder)
    if not base.is_dir():
        raise RunError(f"{base}: no such folder; name one with runs, or an empty one for new runs")
    with stopping("stopped; runs that were started go on"), listen(HOST, config.port) as listening:
        port = listening.getsockname()[1]
        site = Workspace(base, str(port))
        origins = [f"http://{name}:{port}" for name in (HOST, "localhost")]
        link = f"http://{HOST}:{port}/enter/{site.key}"
        tell(f"{base}: open {link}")
        tell("Ctrl-C stops the page; runs that were started go on", flush=True)
        if config.open:
            threading.Timer(0.5, webbrowser.open, [_leading_to(link, base)]).start()
        Server(settings_of(build_app(site, origins), None), site.feed).run(sockets=[listening])


def _leading_to(link: str, base: Path) -> str:
    """The address of a file that leads to ``link``: the words of a command, such as a browser's, are seen by all users
    of a machine."""
    path = private_folder(base).resolve() / "open.html"
    path.write_text(f'<meta charset="utf-8"><meta http-equiv="refresh" content="0; url={link}">', "utf-8")
    return path.as_uri()
