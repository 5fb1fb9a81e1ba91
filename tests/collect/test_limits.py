"""Limits of requests per session and address, and of connections: annotators are served, whatever others do."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from collect.site import Client, Served, served
from prefopt.config.collect import CollectServeConfig
from prefopt.errors import ConfigError
from prefopt.web import server
from prefopt.web.security import HEADERS, RateLimit, address_of
from studies.small import new_study

ANNOTATORS = 40
RATE = RateLimit(per_second=2, burst=12)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Served]:
    with new_study(tmp_path / "s.db") as study, served(study) as site:
        yield site


class Behind(Client):
    """A client whose requests a proxy hands on."""

    forwarded = ""

    def send(self, method, path, body=None, headers=None):  # type: ignore[no-untyped-def]
        return super().send(method, path, body, dict(headers or {}) | {"X-Forwarded-For": self.forwarded})


def person(site: Served, number: int, forwarded: str) -> Behind:
    client = Behind(site.port)
    client.forwarded = forwarded
    secret = site.link(f"P{number}").removeprefix("/join/")
    assert client.get(f"/join/{secret}").status == 200
    assert client.post("/join", {"secret": secret}).status == 303
    return client


def votes(client: Client) -> list[int]:
    found = []
    for _ in range(4):
        page = client.get("/")
        found += [page.status, client.vote(page, "a1").status]
    return found


def test_many_annotators_behind_a_declared_proxy(tmp_path: Path) -> None:
    with (
        new_study(tmp_path / "s.db", 4, overlap=ANNOTATORS) as study,
        served(study, RATE, ["127.0.0.1", "10.0.0.0/8"]) as site,
        ThreadPoolExecutor(8) as pool,
    ):
        # what somebody says of themselves stands before the address that the proxy saw
        people = [person(site, n, f"1.1.1.1, 192.0.2.{n}, 10.1.2.3") for n in range(ANNOTATORS)]
        stranger = Behind(site.port)
        stranger.forwarded = "203.0.113.9"
        assert 429 in [stranger.get(f"/join/guess{n}").status for n in range(30)]
        assert all(found == [200, 303] * 4 for found in pool.map(votes, people))


def test_many_annotators_behind_a_proxy_that_nobody_declared(tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 4, overlap=ANNOTATORS) as study:
        with served(study) as site:
            people = [site.signed_in(f"P{n}") for n in range(ANNOTATORS)]
        with served(study, RateLimit(per_second=20, burst=ANNOTATORS)) as site, ThreadPoolExecutor(8) as pool:
            for client in people:  # a server that was started anew looks each session up once
                client.port = site.port
                assert client.get("/static/style.css").status == 200
            spoofing = Behind(site.port)
            statuses = []
            for n in range(200):
                spoofing.forwarded = f"192.0.2.{n}"
                statuses.append(spoofing.get("/").status)
            assert 429 in statuses  # the header of one who is no proxy is nothing
            assert all(found == [200, 303] * 4 for found in pool.map(votes, people))


def test_a_session_has_limits_too_and_an_invented_one_has_no_share(tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db") as study, served(study, RATE) as site:
        ann = site.signed_in("Ann")
        assert 429 in [ann.get("/static/style.css").status for _ in range(40)]
        name = next(iter(ann.cookies))
        statuses = [Client(site.port, {name: f"made-up-{n}"}).get("/").status for n in range(40)]
        assert set(statuses) <= {401, 429} and statuses[-1] == 429


def test_invited_people_do_not_wait_for_each_other_but_one_of_them_cannot_join_without_end(tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db") as study, served(study) as site:
        for n in range(120):
            site.signed_in(f"P{n}")
        link = site.link("Ann")
        assert 429 in [Client(site.port).get(link).status for _ in range(150)]


def raw(site: Served, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", site.port), timeout=20)
    connection.sendall(data)
    return connection


def all_of(connection: socket.socket) -> str:
    found = b""
    while part := connection.recv(1 << 16):
        found += part
    return found.decode()


def test_idle_connections_keep_nobody_out(site: Served) -> None:
    ann = site.signed_in("Ann")
    with ExitStack() as held:
        for n in range(server.PLACES + 20):
            held.enter_context(raw(site, b"GET / HTTP/1.1\r\n" if n % 2 else b""))
        before = time.monotonic()
        assert ann.get("/").status == 200 and time.monotonic() - before < 5


def test_headers_that_never_end_are_cut_off(site: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
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
        patch.setattr(server, "PLACES", 0)
        patch.setattr(server, "_make_room", lambda _: False)
        with raw(site, ask) as full:
            check(all_of(full), "503")
    monkeypatch.setattr("prefopt.collect.app._Pages.annotator", lambda *_: 1 / 0)
    with raw(site, ask) as failed:
        check(all_of(failed), "500")


def test_addresses() -> None:
    assert address_of({"client": ("192.0.2.1", 5)}) == address_of({"client": ("::ffff:192.0.2.1", 5)}) == "192.0.2.1"
    assert address_of({"client": ("2001:db8::1", 5)}) == address_of({"client": ("2001:db8::ffff:2", 5)})
    assert address_of({"client": ("2001:db8:0:1::1", 5)}) != address_of({"client": ("2001:db8::1", 5)})
    assert address_of({"client": ("unknown" * 100, 0)}) == ("unknown" * 100)[:64] and address_of({}) == ""


def test_proxies_are_addresses_or_networks() -> None:
    for proxy in ("*", "0.0.0.0/0", "proxy.example.org", "10.0.0.1/8", "::/0", ""):
        with pytest.raises(ConfigError, match="--trusted-proxies"):
            CollectServeConfig(study="s.db", trusted_proxies=[proxy])
    CollectServeConfig(study="s.db", trusted_proxies=["127.0.0.1", "10.0.0.0/8", "::1"])
