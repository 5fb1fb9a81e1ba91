"""A small Hugging Face Hub on this machine: what is uploaded is kept, and the answers that people meet are given."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prefopt.cli import main

TOKEN = "hf_secret"


@dataclass
class Hub:
    """Repositories by name: their files, and whether they are private. ``refuse`` is a status for every change."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    refuse: int | None = None
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or bytes, headers."""
        self.asked.append(f"{method} {path}")
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}, {}
        if method != "GET" and method != "HEAD":
            if token != TOKEN:
                return 401, {"error": "Invalid username or password."}, {}
            if self.refuse:
                return self.refuse, {"error": "no"}, {}
            return 200, self.change(path, body), {}
        return self.read(path)

    def change(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            if name not in self.repos:
                self.repos[name], self.private[name] = {}, said.get("visibility") == "private"
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":  # the card's front matter
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for f in files
                ]
            }
        if path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = {o["oid"]: {"upload": {"href": f"{self.url}/large/{o['oid']}", "header": {}}} for o in wanted}
            return {"transfer": "basic", "objects": [{**o, "actions": actions[o["oid"]]} for o in wanted]}
        found = re.fullmatch(r"/api/models/(.+)/commit/main", path)
        assert found, path
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repos[found[1]][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repos[found[1]][value["path"]] = self.large[value["oid"]]
        return {"commitUrl": f"{self.url}/{found[1]}/commit/abc", "commitOid": "abc", "pullRequestUrl": None}

    def read(self, path: str) -> tuple[int, Any, dict[str, str]]:
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path)
        name = about[1] if about else ""
        if name in self.gated:
            return 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}
        if name not in self.repos:
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        siblings = [{"rfilename": file} for file in self.repos[name]]
        return 200, {"id": name, "sha": "abc", "private": self.private[name], "siblings": siblings}, {}

    @contextmanager
    def served(self) -> Iterator[Hub]:
        """Answer on a port of this machine."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
                status, said, headers = hub.answer(self.command, self.path, token, body)
                data = json.dumps(said).encode()
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_POST = do_PUT = do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


def prefopt(hub: Hub, patch: pytest.MonkeyPatch, *words: str, token: str | None = TOKEN, offline: bool = False) -> Done:
    """The command, to which this is the Hub; nobody is there to be asked."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    patch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    patch.delenv("HF_TOKEN", raising=False)
    if token:
        patch.setenv("HF_TOKEN", token)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(list(words))
    return Done(status, out.getvalue(), err.getvalue())
