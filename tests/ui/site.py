"""A folder of runs, made up or trained, served for a test."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from collect.site import FAST, Answer, Client, listening_socket, running
from prefopt.ui.app import build_app
from prefopt.ui.site import Workspace
from prefopt.web.server import settings_of


@dataclass
class Served:
    """An address, and the site behind it."""

    port: int
    site: Workspace
    closing: list[Callable[[], object]] = field(default_factory=list)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def link(self) -> str:
        return f"/enter/{self.site.key}"

    def signed_in(self) -> Client:
        client = Client(self.port)
        assert client.get(self.link).status == 200
        return client


def token(page: Answer) -> str:
    """The token of a page's forms."""
    return page.field("token", "/display")


@contextmanager
def served(base: Path) -> Iterator[Served]:
    """The application on a folder, behind a real server in a thread."""
    with listening_socket() as listening:
        port = listening.getsockname()[1]
        site = Workspace(base, str(port))
        server = uvicorn.Server(settings_of(build_app(site, [f"http://127.0.0.1:{port}"], FAST), None))
        found = Served(port, site)
        with running(server, listening, found.closing):
            try:
                yield found
            finally:
                found.closing.append(site.feed.close)
                for job in site.jobs.all():  # none outlives its test
                    if site.jobs.alive(job):
                        os.kill(job.pid, signal.SIGKILL)


def write_run(folder: Path, method: str = "dpo", steps: int = 30, upto: int | None = None, **options: Any) -> Path:
    """A run folder as a training would leave it after ``upto`` of its steps; the loss falls from ln 2."""
    folder.mkdir(parents=True)
    done = steps if upto is None else upto
    record = {
        "status": "finished" if done == steps else "interrupted",
        "method": method,
        "started": f"2026-01-{len(list(folder.parent.iterdir())):02d}T10:00:00+0000",
        "steps": steps,
        "costs": {"seconds": 61.5},
        "rows": {"read": 40, "kept": 40},
        "options": {"model": "m", "data": ["pairs.jsonl"], "output": str(folder), **options},
    }
    (folder / "run.json").write_text(json.dumps(record))
    append_steps(folder, 1, done + 1)
    return folder


def append_steps(folder: Path, first: int, end: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, end):
            loss = math.log(2) * math.exp(-step / 20)
            line: dict[str, float] = {"step": step, "epoch": step / 30, "loss": loss, "rewards/margins": step / 30}
            file.write(json.dumps(line | {"rewards/accuracies": 0.5 + step / 100, "pairs_per_second": 4.0}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "eval_loss": loss + 0.02, "eval_rewards/accuracies": 0.75}) + "\n")


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def some_runs(base: Path) -> Path:
    """Runs of three kinds of loss, samples before and after, and data."""
    for name, beta in (("dpo-a", 0.1), ("dpo-b", 0.5)):
        write_run(base / name, loss="dpo", beta=beta)
    write_run(base / "kto", loss="kto", beta=0.1)
    write_run(base / "nested" / "sft", "sft", upto=12)
    samples: list[Mapping[str, Any]] = [
        {
            "prompt": f"question {n}",
            "responses": [f"before {n} <b>", f"after {n} 你好"],
            "models": ["before training", "after training"],
        }
        for n in range(45)
    ]
    write_rows(base / "dpo-a" / "samples.jsonl", samples)
    write_rows(base / "other.jsonl", [{"prompt": f"question {n}", "responses": [f"elsewhere {n}"]} for n in (3, 2, 77)])
    return base
