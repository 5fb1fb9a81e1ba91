"""A voting server under many people and many connections: whoever votes is served, whatever others do."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from collect.site import Client, Served, served
from prefopt.collect import serve
from prefopt.collect.security import HEADERS, RateLimit
from prefopt.config.collect import CollectServeConfig
from prefopt.errors import ConfigError
from studies.small import new_study

SLOW = RateLimit(per_second=1.0, burst=40)
PROXY = ("127.0.0.1",)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Served]:
    with new_study(tmp_path / "s.db", 60, overlap=40) as study, served(study, SLOW) as site:
        yield site


def raw(site: Served, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", site.port), timeout=20)
    connection.sendall(data)
    return connection


def all_of(connection: socket.socket) -> str:
    found = b""
    while part := connection.recv(1 << 16):
        found += part
    return found.decode()


def test_people_behind_one_address_have_a_share_each(site: Served) -> None:
    """Thirty people ask three times as often as one address may, through a proxy that nobody declared."""
    people = [site.signed_in(f"Person {n}") for n in range(30)]
    for _ in range(2):
        for person in people:
            assert person.vote(person.get("/"), "a3").status == 303
    stranger = Client(site.port, {f"prefopt-{site.study.settings.id}": "made up"})
    statuses = [stranger.get("/").status for _ in range(60)]
    assert statuses[0] == 401 and 429 in statuses, "a cookie that is none has no share"
    assert people[0].get("/").status == 200


def test_addresses_are_those_that_a_declared_proxy_forwards(tmp_path: Path) -> None:
    def asked(site: Served, count: int) -> list[int]:
        client = Client(site.port)
        return [client.get("/", {"X-Forwarded-For": f"203.0.113.{n}"}).status for n in range(count)]

    with new_study(tmp_path / "s.db") as study:
        with served(study, SLOW, PROXY) as behind:
            assert set(asked(behind, 90)) == {401}
        with served(study, SLOW) as direct:  # whoever is no declared proxy may say what they like
            assert 429 in asked(direct, 90)


def test_idle_connections_keep_nobody_out(site: Served) -> None:
    ann = site.signed_in("Ann")
    with ExitStack() as held:
        for n in range(serve.PLACES + 20):
            held.enter_context(raw(site, b"GET / HTTP/1.1\r\n" if n % 2 else b""))
        before = time.monotonic()
        assert ann.get("/").status == 200 and time.monotonic() - before < 5


def test_headers_that_never_end_are_cut_off(site: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.3)
    with raw(site) as nothing, raw(site, b"GET / HTTP/1.1\r\nHost: ") as half:
        assert nothing.recv(10) == b"" and half.recv(10) == b""
    with raw(site, f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n\r\n".encode()) as kept:
        assert kept.recv(12) == b"HTTP/1.1 401"
        kept.sendall(b"GET / HTTP/1.1\r\n")  # the second request of a connection that is kept
        assert "HTTP/1.1" not in all_of(kept)


def test_what_the_server_says_by_itself_carries_the_policy(site: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(answer: str, status: str) -> None:
        head = answer.partition("\r\n\r\n")[0].split("\r\n")
        assert head[0].startswith(f"HTTP/1.1 {status}"), head[0]
        names = [line.partition(":")[0].lower() for line in head[1:]]
        for name, value in HEADERS.items():
            assert names.count(name.lower()) == 1 and any(line.endswith(value) for line in head), name

    with raw(site, b"this is no HTTP\r\n\r\n") as broken:
        check(all_of(broken), "400")
    ask = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nConnection: close\r\n\r\n".encode()
    with monkeypatch.context() as patch:
        patch.setattr(serve, "PLACES", 0)
        patch.setattr(serve, "_make_room", lambda _: False)
        with raw(site, ask) as full:
            check(all_of(full), "503")
    monkeypatch.setattr("prefopt.collect.app._Pages.annotator", lambda *_: 1 / 0)
    with raw(site, ask) as failed:
        check(all_of(failed), "500")


@pytest.mark.parametrize("proxy", ["proxy.example.org", "0.0.0.0/0", "10.0.0.1/8"])
def test_a_proxy_is_an_address_or_a_network(proxy: str) -> None:
    with pytest.raises(ConfigError, match="--trusted-proxies"):
        CollectServeConfig(study="s.db", trusted_proxies=[proxy])
