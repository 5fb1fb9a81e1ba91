"""Fifty people vote while the server is killed at random moments: what was acknowledged is there, and there once."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from collect.site import Client
from prefopt.studies.annotators import invite, open_session
from prefopt.studies.study import Study
from studies.small import new_study

PEOPLE, ITEMS, OVERLAP, KILLS = 50, 60, 5, 6


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def start(path: Path, port: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "prefopt", "collect", "serve", str(path), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    for line in process.stdout:
        if b"Ctrl-C" in line:
            return process
    raise AssertionError(f"the server did not start: {process.wait()}")


def stop(server: subprocess.Popen[bytes]) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    assert server.stdout is not None
    server.stdout.close()


class Person(threading.Thread):
    """Votes until nothing is left; a vote is sent again until it is acknowledged."""

    def __init__(self, client: Client, seed: int, give_up: float) -> None:
        super().__init__()
        self.client, self.draw, self.give_up = client, random.Random(seed), give_up
        self.acknowledged: list[str] = []
        self.again = 0

    def run(self) -> None:
        while time.monotonic() < self.give_up:
            page = self.asked(lambda: self.client.get("/"))
            ticket = page.field("ticket") if page else ""
            if not page or not ticket:
                return
            choice = self.draw.choice(["a1", "a2", "a3", "tie", "b1", "b2", "b3", "bad"])
            if self.asked(lambda page=page, choice=choice: self.client.vote(page, choice)):  # type: ignore[misc]
                self.acknowledged.append(ticket)

    def asked(self, request):  # type: ignore[no-untyped-def]
        while time.monotonic() < self.give_up:
            try:
                answer = request()
            except (OSError, http.client.HTTPException):
                self.again += 1
            else:
                if answer.status in (200, 303):
                    return answer
                assert answer.status == 429, answer.text
            time.sleep(0.1 + 0.2 * self.draw.random())
        return None


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_no_acknowledged_vote_is_lost_and_none_is_stored_twice(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    study = new_study(path, ITEMS, overlap=OVERLAP)
    port, crowd = free_port(), []
    for n in range(PEOPLE):
        secret = open_session(study, invite(study, f"P{n}")[1])
        assert secret is not None
        crowd.append(Person(Client(port, {f"prefopt-{study.settings.id}": secret}), n, time.monotonic() + 200))
    study.close()
    draw = random.Random(7)
    server = start(path, port)
    try:
        for person in crowd:
            person.start()
        for _ in range(KILLS):
            time.sleep(0.3 + draw.random())
            stop(server)
            server = start(path, port)
        for person in crowd:
            person.join()
    finally:
        stop(server)
    acknowledged = [ticket for person in crowd for ticket in person.acknowledged]
    with Study(path) as study:
        stored = Counter(r[0] for r in study.connection.execute("SELECT ticket FROM event WHERE kind = 'vote'"))
        twice = study.connection.execute(
            "SELECT count(*) FROM event WHERE kind = 'vote' GROUP BY annotator, item HAVING count(*) > 1"
        ).fetchall()
        votes = [r[0] for r in study.connection.execute("SELECT votes FROM queue")]
        assert study.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert sum(person.again for person in crowd) > KILLS  # the kills were felt
    assert len(acknowledged) == len(set(acknowledged)) and set(acknowledged) == set(stored)
    assert set(stored.values()) == {1} and not twice and votes == [OVERLAP] * ITEMS


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_asked_to_stop_leaves_one_file(number: int, tmp_path: Path) -> None:
    new_study(tmp_path / "s.db").close()
    server = start(tmp_path / "s.db", free_port())
    server.send_signal(number)
    assert server.wait(30) == 128 + number
    assert server.stdout is not None
    server.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["s.db"]
