"""A server with OpenAI's interface on a port of this machine, which answers as a test tells it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """``pieces`` of an answer are sent as events, each after ``pause`` seconds; ``status`` other than 200 is an error.

    ``redirects``: a status and the address of another server, to which every path leads.
    ``events`` are sent as they stand instead. ``requests`` keeps what was asked: path, headers, body.
    """

    pieces: list[str] = field(default_factory=lambda: ["Hel", "lo ", "wörld"])
    models: list[str] = field(default_factory=lambda: ["tiny"])
    status: int = 200
    message: str = ""
    events: list[str] | None = None
    streams: bool = True
    pause: float = 0.0
    limit: int | None = None
    redirects: tuple[int, str] | None = None
    breaks: bool = False
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(**options: Any) -> Iterator[FakeServer]:
    """The server, running."""
    state = FakeServer(**options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers), {}))
            if state.redirects is not None:
                self._redirect(*state.redirects)
                return
            self._json(200, {"data": [{"id": name} for name in state.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, dict(self.headers), body))
            if state.redirects is not None:
                self._redirect(*state.redirects)
            elif state.limit is not None and len(body.get("messages", ())) > state.limit:
                self._json(400, {"error": {"message": "This model's maximum context length is short"}})
            elif state.status != 200:
                self._json(state.status, {"error": {"message": state.message}})
            elif not state.streams:
                self._json(200, {"choices": [{"message": {"content": "".join(state.pieces)}}]})
            else:
                self._stream("text" if self.path.endswith("/completions") and "prompt" in body else "delta")

        def _redirect(self, status: int, url: str) -> None:
            self.send_response(status)
            self.send_header("Location", url + self.path.removeprefix("/v1"))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            lines = state.events
            if lines is None:
                part = [{"text": p} if kind == "text" else {"delta": {"content": p}} for p in state.pieces]
                lines = [": waiting", *(f"data: {json.dumps({'choices': [p]}, ensure_ascii=False)}" for p in part)]
                lines += ['data: {"choices": []}', "data: [DONE]"]
            try:
                for line in lines:
                    data = f"{line}\n\n".encode()
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    self.wfile.flush()
                    time.sleep(state.pause)
                if not state.breaks:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:  # whoever asked has left
                pass
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
