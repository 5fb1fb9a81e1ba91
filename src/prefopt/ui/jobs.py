"""Commands that the page starts: each ``python -m prefopt`` in a session of its own, so that it goes on when the page
is closed or its server stops. Only what was started here can be stopped here.

A job is a folder below ``.prefopt-ui`` with ``job.json`` and ``log.txt``; ``out.txt`` holds the output apart where a
program reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from prefopt.core.files import remove_folder, write_json
from prefopt.errors import ConfigError
from prefopt.ui.feed import Event

FOLDER = ".prefopt-ui"
KEPT = 20
"""Ended jobs that are kept, apart from runs, whose log may be all that tells of a failure."""
LONGEST_LOG = 200_000
"""Bytes of a log that a page begins with."""


@dataclass(slots=True, kw_only=True)
class RunJob:
    """A command. ``words`` follow ``prefopt``; ``run`` is the output folder of a training; ``about`` is what the page
    needs to show it again. ``status`` is the exit status, None while it runs or where nobody saw the end."""

    id: str
    kind: str
    words: list[str]
    pid: int = 0
    born: float = 0.0
    run: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    status: int | None = None
    ended: bool = False
    stopping: bool = False

    @property
    def command(self) -> str:
        return shlex.join(["prefopt", *self.words])


class Jobs:
    """The jobs of a folder; those of an earlier server are found again."""

    def __init__(self, base: Path, wake: Callable[[], None] = lambda: None) -> None:
        self.base, self.folder, self._wake = base, base / FOLDER / "jobs", wake
        self._jobs: dict[str, RunJob] = {}
        self._turn = threading.Lock()
        for path in sorted(self.folder.glob("*/job.json")):
            with contextlib.suppress(ValueError, TypeError, OSError):
                job = RunJob(**json.loads(path.read_text("utf-8")))
                self._jobs[job.id] = job

    def start(
        self,
        kind: str,
        words: Sequence[str],
        *,
        config: str | None = None,
        run: str | None = None,
        apart: bool = False,
        folder: Path | None = None,
        about: Any = None,
    ) -> RunJob:
        """Start a command, or find the one that trains into the folder ``run`` already. ``config``: the text of a YAML
        file for it. ``apart``: its output goes to a file of its own, for a program. ``folder``: where its relative
        paths are read from, else that of this server. Raises :class:`ConfigError` where it cannot be started."""
        if os.name != "posix":
            raise ConfigError("commands are started from the page on Linux and macOS alone; run them in a terminal")
        with self._turn:
            live = self.live(run) if run is not None else None
            if live is not None:
                return live
            job = RunJob(id=_new_id(), kind=kind, words=list(words), run=run, about=about or {})
            job.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            process = self._launch(job, config, apart, folder)
            self._jobs[job.id] = job
            self._tidy()
        self._write(job)
        threading.Thread(target=self._wait, args=(job, process), daemon=True).start()
        return job

    def live(self, run: str) -> RunJob | None:
        """The job that trains into an output folder now."""
        job = self.of_run(run)
        return job if job is not None and self.alive(job) else None

    def _launch(self, job: RunJob, config: str | None, apart: bool, folder: Path | None) -> subprocess.Popen[bytes]:
        place = self.place(job)
        private_folder(self.base)
        place.mkdir(parents=True)
        if config is not None:
            (place / "options.yaml").write_text(config, "utf-8")
            job.words += ["--config", str((place / "options.yaml").resolve())]
        with (place / "log.txt").open("wb") as log, (place / "out.txt").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefopt", *job.words],
                stdin=subprocess.DEVNULL,
                stdout=out if apart else log,
                stderr=log,
                cwd=folder,
                start_new_session=True,  # a signal to this server is none to the command
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
            )
        job.pid = process.pid
        with contextlib.suppress(psutil.Error):
            job.born = psutil.Process(process.pid).create_time()
        return process

    def get(self, name: str) -> RunJob | None:
        return self._jobs.get(name)

    def all(self) -> list[RunJob]:
        """All jobs, the latest first."""
        return sorted(self._jobs.values(), key=lambda job: job.id, reverse=True)

    def of_run(self, run: str) -> RunJob | None:
        """The last job that trained into an output folder."""
        return next((job for job in self.all() if job.run == run), None)

    def alive(self, job: RunJob) -> bool:
        """Whether its process runs: the number alone may have gone to another one."""
        if job.ended:
            return False
        try:
            process = psutil.Process(job.pid)
            return abs(process.create_time() - job.born) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def stop(self, job: RunJob) -> bool:
        """Ask a job to stop, once: a training writes a checkpoint first, and a second signal would kill it. False
        where it does not run, or was asked before."""
        with self._turn:
            if job.stopping or not self.alive(job):
                return False
            job.stopping = True
            os.kill(job.pid, signal.SIGTERM)
        self._write(job)
        self._wake()
        return True

    def log(self, job: RunJob, start: int) -> tuple[int, str]:
        """What the log holds from a byte on, and where that ends: whole characters, the last part of a long log."""
        try:
            with (self.place(job) / "log.txt").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                start = max(start, size - LONGEST_LOG)
                file.seek(start)
                data = file.read(size - start)
        except OSError:
            return start, ""
        whole = data if size == 0 or self.alive(job) is False else data[: data.rfind(b"\n") + 1]
        return start + len(whole), whole.decode("utf-8", "replace")

    def output(self, job: RunJob) -> str:
        try:
            return (self.place(job) / "out.txt").read_text("utf-8", "replace")
        except OSError:
            return ""

    def place(self, job: RunJob) -> Path:
        return self.folder / job.id

    def state(self, job: RunJob) -> dict[str, Any]:
        """What a page shows of a job."""
        alive = self.alive(job)
        word = ("stopping" if job.stopping else "running") if alive else "ended"
        return {"id": job.id, "state": word, "status": job.status, "command": job.command, "run": job.run}

    def _wait(self, job: RunJob, process: subprocess.Popen[bytes]) -> None:
        job.status = process.wait()
        job.ended = True
        self._write(job)
        self._wake()

    def _write(self, job: RunJob) -> None:
        if self.place(job).exists():
            write_json(self.place(job) / "job.json", asdict(job))

    def _tidy(self) -> None:
        old = [job for job in self.all() if job.run is None and not self.alive(job)][KEPT:]
        for job in old:
            del self._jobs[job.id]
            remove_folder(self.place(job))


def private_folder(base: Path) -> Path:
    """The folder of the page below ``base``: nobody else may read logs, which hold links to voting pages. Raises
    :class:`ConfigError` where it is there and somebody else's."""
    folder = base / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.name == "posix":
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise ConfigError(f"{folder} is a link or another user's, who could read the logs: remove it")
        folder.chmod(0o700)
    (folder / ".gitignore").write_text("*\n")
    return folder


def _new_id() -> str:
    """Names sort by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 1_000_000:06d}-{secrets.token_hex(2)}"


@dataclass(slots=True)
class JobTopic:
    """The log of a job as it grows, and its state when that changes."""

    jobs: Jobs
    job: RunJob
    _at: int = 0
    _state: dict[str, Any] | None = None

    def changes(self) -> list[Event]:
        state, found = self.jobs.state(self.job), list[Event]()
        self._at, text = self.jobs.log(self.job, self._at)
        if text:
            found.append(("log", {"id": self.job.id, "text": plain(text)}))
        if state != self._state:
            self._state = state
            found.append(("job", state))
        return found


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def plain(text: str) -> str:
    """Text of a terminal without colours; of a line that was written over, the last version.

    >>> plain("a\\x1b[1mb\\n10 %\\r20 %\\n")
    'ab\\n20 %\\n'
    """
    return "\n".join(line.rpartition("\r")[2] for line in ESCAPES.sub("", text).replace("\r\n", "\n").split("\n"))
