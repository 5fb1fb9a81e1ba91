"""A server behind an OpenAI-compatible URL: requests and answers in JSON, and one line on what went wrong.

>>> endpoint = Endpoint("http://localhost:8000")
>>> endpoint.url, endpoint.root
('http://localhost:8000/v1', 'http://localhost:8000')
"""

from __future__ import annotations

import functools
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple

from prefopt.errors import ConfigError, RunError

EXAMPLE = "http://localhost:8000/v1"
TIMEOUT = 300.0
"""Seconds of silence after which a server counts as gone."""


class ServerRefusal(RunError):
    """The server answered with an error: ``status`` is that of HTTP, ``what`` its message in one line."""

    def __init__(self, url: str, status: int, what: str) -> None:
        self.status, self.what = status, what
        super().__init__(f"{url}: the server answers {status} ({what})")


class Unreachable(RunError):
    """The server did not answer, or its answer broke off."""


class Flags(NamedTuple):
    """The options that give a server's URL, its key and the name of a model there, for messages."""

    url: str = "--url"
    key: str = "--url-key"
    model: str = "--url-model"


URL_FLAGS = Flags()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error of the server: followed, it would take the key to another host, and turn a POST into a
    GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirects)


class Reply(NamedTuple):
    """The JSON ``body`` of an answer (a dict), and its ``headers``, names in lower case."""

    body: Mapping[str, Any]
    headers: Mapping[str, str]


class Endpoint:
    """``url`` ends with the path of the interface (``/v1``), ``root`` is the address of the server alone."""

    def __init__(
        self, url: str, *, key_variable: str | None = None, flag: str = "--url", key_flag: str = "--url-key"
    ) -> None:
        """``key_variable`` names an environment variable with a key. ``flag`` and ``key_flag`` are the options that
        gave them. Raises :class:`ConfigError`."""
        self.url = base_url(url, flag)
        parts = urllib.parse.urlsplit(self.url)
        self.root, self.place = f"{parts.scheme}://{parts.netloc}", parts.netloc
        self.headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if key_variable is not None:
            if not (key := os.environ.get(key_variable, "").strip()):
                raise ConfigError(f"{key_flag} {key_variable}: there is no such environment variable, or it is empty")
            if not all("!" <= character <= "~" for character in key):
                raise ConfigError(
                    f"{key_flag} {key_variable}: the key in this environment variable contains a space, a line"
                    " break or a character outside ASCII, which no server accepts; set it again"
                )
            self.headers["Authorization"] = f"Bearer {key}"

    def open(
        self, path: str, body: bytes | None, *, root: bool = False, timeout: float = TIMEOUT, **headers: str
    ) -> HTTPResponse:
        """The answer to a request, to be read by the caller. A path that begins at the ``root`` is none of OpenAI's.

        Raises :class:`ServerRefusal` and :class:`Unreachable`.
        """
        address = f"{self.root if root else self.url}/{path}"
        request = urllib.request.Request(address, data=body, headers={**self.headers, **headers})
        try:
            response: HTTPResponse = _opener().open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                target = error.headers.get("Location") if 300 <= error.code < 400 else None
                what = message_of(_read(error)) if target is None else _elsewhere(address, target, path)
            raise ServerRefusal(self.url, error.code, what or str(error.reason)) from error
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{self.url} cannot be reached ({reason_of(error)}); is the server running?") from error
        return response

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, root: bool = False, timeout: float = TIMEOUT
    ) -> Reply:
        """The whole answer to a request, a POST where there is a ``body``. Raises as :meth:`open`; an answer that
        breaks off, or is no JSON, is :class:`Unreachable`, too."""
        data = None if body is None else json.dumps(body).encode()
        with self.open(path, data, root=root, timeout=timeout) as response:
            try:
                read = response.read()
                found = json.loads(read) if read.strip() else {}
            except (OSError, HTTPException, ValueError) as error:
                raise Unreachable(f"{self.url}: the answer broke off ({reason_of(error)})") from error
            headers = {name.lower(): value for name, value in response.headers.items()}
        return Reply(found if isinstance(found, dict) else {"answer": found}, headers)

    def models(self, flag: str = "--url-model") -> list[dict[str, Any]]:
        """What the server says of its models, each with an ``id``. ``flag`` is the option that names one. Raises as
        :meth:`ask`."""
        listed = self.ask("models").body.get("data")
        found = [dict(m) for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else None
        if found is None:
            raise Unreachable(f"{self.url}: it does not list its models; name one with {flag}")
        return found

    def only_model(self, flag: str = "--url-model") -> str:
        """The name of the server's model, adapters on it aside. Raises :class:`ConfigError` where there are several."""
        names = [str(m["id"]) for m in self.models(flag) if m.get("parent") is None]
        if len(names) != 1:
            raise ConfigError(f"{flag} is missing: {self.url} has {', '.join(names) or 'no model'}")
        return names[0]


def is_url(name: str) -> bool:
    """Whether a name is the address of a server.

    >>> is_url("https://localhost:8000"), is_url("org/model")
    (True, False)
    """
    return name.startswith(("http://", "https://"))


def base_url(url: str, flag: str = "--url") -> str:
    """The URL of the interface without the path of a single call. Raises :class:`ConfigError`."""
    said = f"{flag} {url}" if "@" not in url else flag  # before it there may be a password
    try:
        parts = urllib.parse.urlsplit(url)
        named, host = "@" in parts.netloc, parts.netloc
        if not named and not host.isascii():
            host = str(parts.hostname).encode("idna").decode() + ("" if parts.port is None else f":{parts.port}")
        valid = parts.hostname is not None and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, half an IPv6 address, a name that cannot be one
        raise ConfigError(f"{said} is not the address of a server; give one such as {EXAMPLE}") from None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{said} should begin with http:// or https://, such as {EXAMPLE}")
    if named:
        raise ConfigError(
            f"{flag}: the address contains a user name or password before the @; leave them out: the key is read"
            " from an environment variable"
        )
    if not valid:
        raise ConfigError(f"{said} is not the address of a server; give one such as {EXAMPLE}")
    path = urllib.parse.quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    for ending in ("/chat/completions", "/completions"):
        path = path.removesuffix(ending)
    return f"{parts.scheme}://{host}{path or '/v1'}"


def message_of(answer: Any) -> str:
    """A server's error message in one line, from the body of its answer or the JSON in it."""
    found = answer
    if isinstance(answer, bytes):
        try:
            found = json.loads(answer)
        except ValueError:
            found = answer.decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return " ".join(str(found or "").split())[:300]


def reason_of(error: Exception) -> str:
    """Why a connection failed, in a few words."""
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or " ".join(str(reason).split()) or type(error).__name__


def _elsewhere(address: str, target: str, path: str) -> str:
    target = urllib.parse.urljoin(address, target).removesuffix(f"/{path}")
    return f"it redirects to {' '.join(target.split())[:300]}; name that URL"


def _read(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, HTTPException):  # it broke off: the status remains
        return b""
