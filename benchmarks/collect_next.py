"""How long the next item takes in a large study: python benchmarks/collect_next.py [--items 100000] [--annotators 20]

A study of ``--items`` items with an overlap of 3 is voted on by ``--annotators`` in turn, after one of them has voted
on ``--alone`` items (the case in which they have seen most of the queue). Prints the median, the 99th percentile and
the longest time, in milliseconds, of ``next_item`` (with the transaction that reserves the item), of ``record`` (until
the vote is on the disk), and of a page over HTTP. The aim is 50 for the next item.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import uvicorn

from prefopt.collect.app import Site, build_app
from prefopt.studies.annotators import invite, open_session
from prefopt.studies.items import NewItem, ResponseOrigin, add_items, next_item
from prefopt.studies.study import Study, StudySettings
from prefopt.studies.votes import Vote, record
from prefopt.web.security import RateLimit

Found = TypeVar("Found")
WORDS = "a response of some two hundred characters, as people get them from models every day, "


def items(count: int) -> Iterator[NewItem]:
    for n in range(count):
        row = {
            "prompt": [{"role": "user", "content": f"question {n}: {WORDS}"}],
            "responses": [[{"role": "assistant", "content": f"{k} {n} {WORDS * 3}"}] for k in range(2)],
        }
        yield NewItem(
            row, n.to_bytes(16, "little"), [ResponseOrigin("a"), ResponseOrigin("b")], file="made", file_row=n + 1
        )


def timed(times: list[float], act: Callable[[], Found]) -> Found:
    started = time.perf_counter()
    found = act()
    times.append(1000 * (time.perf_counter() - started))
    return found


def told(name: str, times: list[float]) -> dict[str, float]:
    cut = sorted(times)
    found = {"median": statistics.median(cut), "p99": cut[int(0.99 * (len(cut) - 1))], "longest": cut[-1]}
    print(f"{name:28}" + "  ".join(f"{k} {v:8.2f} ms" for k, v in found.items()) + f"  ({len(cut)} times)", flush=True)
    return found


def pages(study: Study, secret: str, count: int) -> list[float]:
    """Milliseconds of GET /, of a person whose item waits for them."""
    times: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        app = build_app(study, Site([f"http://127.0.0.1:{port}"], rate=RateLimit(10_000, 10_000)))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", http="h11"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        for _ in range(count):

            def ask() -> None:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/", headers={"Cookie": f"prefopt-{study.settings.id}={secret}"})
                answer = connection.getresponse()
                assert answer.status == 200 and b"ticket" in answer.read()
                connection.close()

            timed(times, ask)
        server.should_exit = True
        thread.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--alone", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.db"
        study = Study.create(path, StudySettings(title="benchmark", overlap=3))
        started = time.perf_counter()
        add_items(study, items(given.items))
        print(f"{given.items} items added in {time.perf_counter() - started:.1f} s, {path.stat().st_size / 1e6:.0f} MB")
        crowd = [invite(study, f"P{n}") for n in range(given.annotators)]
        results = {}

        def work(who: int, times: tuple[list[float], list[float]]) -> None:
            person = crowd[who][0]
            found = timed(times[0], lambda: next_item(study, person))
            if found is not None:
                ticket = found.ticket
                timed(times[1], lambda: record(study, person, ticket, Vote(((0,), (1,)), 2)))

        alone: tuple[list[float], list[float]] = ([], [])
        for _ in range(given.alone):
            work(0, alone)
        results["next, one person alone"] = told("next, one person alone", alone[0])
        results["record, one person alone"] = told("record, one person alone", alone[1])
        many: tuple[list[float], list[float]] = ([], [])
        for _ in range(given.rounds):
            for who in range(given.annotators):
                work(who, many)
        results["next, in turn"] = told("next, in turn", many[0])
        results["record, in turn"] = told("record, in turn", many[1])
        secret = open_session(study, crowd[-1][1])
        assert secret is not None
        results["page over HTTP"] = told("page over HTTP", pages(study, secret, given.rounds))
        study.close()
    if given.json:
        given.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(given).items()}, "ms": results}, indent=2)
        )


if __name__ == "__main__":
    main()
