"""Limits for each session, and for each address behind a proxy that is declared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from collect.site import Client, Served, served
from prefopt.collect.security import RateLimit, address_of
from prefopt.config.collect import CollectServeConfig
from prefopt.errors import ConfigError
from studies.small import new_study

PEOPLE = 100
RATE = RateLimit(per_second=2, burst=12)


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


def test_a_hundred_annotators_behind_a_declared_proxy(tmp_path: Path) -> None:
    with (
        new_study(tmp_path / "s.db", 4, overlap=PEOPLE) as study,
        served(study, RATE, ["127.0.0.1", "10.0.0.0/8"]) as site,
        ThreadPoolExecutor(8) as pool,
    ):
        # what somebody says of themselves stands before the address that the proxy saw
        people = [person(site, n, f"1.1.1.1, 192.0.2.{n}, 10.1.2.3") for n in range(PEOPLE)]
        stranger = Behind(site.port)
        stranger.forwarded = "203.0.113.9"
        assert 429 in [stranger.get(f"/join/guess{n}").status for n in range(30)]
        assert all(found == [200, 303] * 4 for found in pool.map(votes, people))


def test_a_hundred_annotators_behind_a_proxy_that_nobody_declared(tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 4, overlap=PEOPLE) as study:
        with served(study) as site:
            people = [site.signed_in(f"P{n}") for n in range(PEOPLE)]
        with served(study, RateLimit(per_second=20, burst=PEOPLE)) as site, ThreadPoolExecutor(8) as pool:
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


def test_addresses() -> None:
    assert address_of({"client": ("192.0.2.1", 5)}) == address_of({"client": ("::ffff:192.0.2.1", 5)}) == "192.0.2.1"
    assert address_of({"client": ("2001:db8::1", 5)}) == address_of({"client": ("2001:db8::ffff:2", 5)})
    assert address_of({"client": ("2001:db8:0:1::1", 5)}) != address_of({"client": ("2001:db8::1", 5)})
    assert address_of({"client": ("unknown" * 100, 0)}) == ("unknown" * 100)[:64] and address_of({}) == ""


@pytest.mark.parametrize("proxy", ["*", "0.0.0.0/0", "proxy.example.org", "10.0.0.1/8", "::/0", ""])
def test_proxies_are_addresses(proxy: str) -> None:
    with pytest.raises(ConfigError, match="--trusted-proxies"):
        CollectServeConfig(study="s.db", trusted_proxies=[proxy])
    CollectServeConfig(study="s.db", trusted_proxies=["127.0.0.1", "10.0.0.0/8", "::1"])
