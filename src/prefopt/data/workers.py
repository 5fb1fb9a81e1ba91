"""Tokenise rows in chunks, in this process or in several others.

Worker processes are started afresh, because the threads of torch and tokenizers do not survive a fork, and without the
caller's main module, which may not be guarded against a second import. Messages are pickled and travel over a socket
pair. A worker whose parent is gone reads the end of the stream and leaves.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prefopt.data.chat.render import Rendered, Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.group import Group, PicturedIds, pictures_in
from prefopt.data.steps import NOT_STEPWISE, STEPWISE, judged, judged_steps
from prefopt.data.table import Array, TableBuilder
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import DataKind, Problem, Warnings, validate
from prefopt.errors import DataError, UserError
from prefopt.records import Comparison

ParsedRow = Comparison | Problem

# A chunk ends at so many rows, or at so many characters.
CHUNK_ROWS = 256
CHUNK_CHARACTERS = 2_000_000
# More processes would wait for the one that reads.
MAX_WORKERS = 8
# Chunks read per worker before the oldest is done, which bounds the memory.
READ_AHEAD = 3
# A class of the child's main module could not be unpickled by the parent, so serve() is imported.
SERVE = "import sys; from prefopt.data.workers import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True, slots=True)
class Chunk:
    """The groups and problems of ``rows`` rows, in order; ``conversations``: some went through a chat template."""

    rows: int
    columns: dict[str, Array]
    problems: list[Problem]
    warnings: Warnings
    conversations: bool


class Preparer:
    """Makes chunks with one tokenizer. Raises :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`."""

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering, kind: DataKind) -> None:
        self.renderer, self.kind = Renderer(tokenizer, rendering), kind

    def __call__(self, rows: Sequence[ParsedRow]) -> Chunk:
        """Convert, render and tokenise; a row becomes a group or has a problem, independent of the other rows."""
        problems: list[Problem] = []
        good: list[Comparison] = []
        keys: list[bytes] = []  # of the row's prompt: the steps of a trajectory are never split from one another
        for row in rows:
            of_row: dict[Problem, None] = {}  # several steps may have the same
            for step in [row] if isinstance(row, Problem) else self._steps(row):
                found = [step] if isinstance(step, Problem) else validate(step, self.kind)
                if isinstance(found, Comparison):
                    good.append(found)
                    keys.append(row.prompt_key if isinstance(row, Comparison) else b"")
                else:
                    of_row |= dict.fromkeys(found)
            problems += of_row
        builder = TableBuilder()
        for key, rendered in zip(keys, self._rendered(good), strict=True):
            if isinstance(rendered, Problem):
                problems.append(rendered)
                continue
            cuts = rendered.responses_cut or None
            builder.add(rendered.group, prompt_key=key, prompt_cut=rendered.prompt_cut, cuts=cuts)
            for group in rendered.more:
                builder.add(group, prompt_key=key)
        warnings = {what: list(numbers) for what, numbers in self.renderer.warnings.items()}
        self.renderer.warnings.clear()
        problems.sort(key=lambda p: p.row)
        return Chunk(len(rows), builder.columns(), problems, warnings, any(not c.text for c in good))

    def _steps(self, row: Comparison) -> Sequence[Comparison | Problem]:
        """The row, or the turns of it that are judged by themselves."""
        if self.renderer.rendering.compare == "responses" or self.kind == "prompts":
            if judged(row):
                self.renderer.warnings.setdefault(NOT_STEPWISE, []).append(row.row)
            return [row]
        steps = judged_steps(row)
        if isinstance(steps, Problem):
            return [steps]
        self.renderer.warnings.setdefault(STEPWISE, []).append(row.row)
        return steps

    def _rendered(self, good: Sequence[Comparison]) -> Iterator[Rendered | Problem]:
        if self.kind != "prompts":
            yield from self.renderer.render_all(good)
            return
        for comparison, prompt in zip(good, self.renderer.prompts(good), strict=True):
            if isinstance(prompt, Problem):
                yield prompt
            else:
                ids = prompt.ids if isinstance(prompt, PicturedIds) else prompt
                yield Rendered(Group(ids, (), comparison.row, (), pictures=pictures_in(prompt)))


def chunks(rows: Iterable[ParsedRow]) -> Iterator[list[ParsedRow]]:
    """Consecutive rows in lists, shorter ones where rows are long."""
    chunk: list[ParsedRow] = []
    room = CHUNK_CHARACTERS
    for row in rows:
        chunk.append(row)
        if isinstance(row, Comparison):
            room -= sum(len(m.content) for turns in (row.prompt, *(r.messages for r in row.responses)) for m in turns)
            room -= sum(len(picture.data) for picture in row.pictures)
        if len(chunk) == CHUNK_ROWS or room <= 0:
            yield chunk
            chunk, room = [], CHUNK_CHARACTERS
    if chunk:
        yield chunk


class CannotStart(Exception):
    """The tokenizer cannot be sent to another process, or no process can be started."""


class Workers:
    """Processes that hold the tokenizer each; leaving the context ends them at once."""

    def __init__(
        self, tokenizer: Tokenizer, rendering: Rendering, kind: DataKind, count: int, *, file: str = ""
    ) -> None:
        """Raises :class:`CannotStart`, and :class:`UserError` as :class:`Preparer`."""
        if os.name != "posix":
            raise CannotStart("it needs sockets that a process inherits")
        try:
            task = pickle.dumps((tokenizer, rendering, kind))
        except Exception as error:  # whatever an object of the caller's may raise
            raise CannotStart(f"the tokenizer cannot be pickled: {error}") from error
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count)
        try:
            for _ in range(count):
                self._workers.append(_Worker(file))
            list(self._threads.map(lambda worker: worker.ask(task), self._workers))  # raises what a worker raised
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise CannotStart(f"no other process can be started: {error.strerror}") from error
            raise
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
        # A thread that waits for a worker reads the end of its stream.
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.socket.close()

    def map(self, chunks: Iterable[Sequence[ParsedRow]], stop: Callable[[], None] = lambda: None) -> Iterator[Chunk]:
        """Prepare each chunk, in order. ``stop`` is called several times a second and may raise.

        Raises :class:`DataError` where a process ends by itself.
        """
        waiting: deque[Future[Chunk]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._prepare, chunk))
            stop()
            if len(waiting) >= READ_AHEAD * len(self._workers):
                yield _result(waiting.popleft(), stop)
        while waiting:
            yield _result(waiting.popleft(), stop)

    def _prepare(self, chunk: Sequence[ParsedRow]) -> Chunk:
        worker = self._idle.get()
        try:
            found: Chunk = worker.ask(pickle.dumps(chunk))
            return found
        finally:
            self._idle.put(worker)


def _result(future: Future[Chunk], stop: Callable[[], None]) -> Chunk:
    while not wait([future], timeout=0.2).done:
        stop()
    return future.result()


class _Worker:
    """One process and the socket to it."""

    def __init__(self, file: str) -> None:
        self.file = file
        ours, theirs = socket.socketpair()
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *(p for p in sys.path if p and p != package)]
        environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with theirs:
            # Ctrl-C reaches only the parent, which decides what to do: hence the session of its own.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | environment,
                start_new_session=True,
            )
        self.socket: Connection[bytes, bytes] = Connection(ours.detach())

    def ask(self, data: bytes) -> Any:
        """Send a message and wait for the answer; an exception of the worker is raised here."""
        try:
            self.socket.send_bytes(data)
            answer, error = pickle.loads(self.socket.recv_bytes())
        except (EOFError, OSError) as broken:
            status = self.process.wait(timeout=10)
            how = f"was ended by signal {-status} (is memory short?)" if status < 0 else f"ended with status {status}"
            what = f"a process that tokenises {how}; run the command again"
            raise DataError(what, file=self.file or None) from broken
        if error is not None:
            raise error
        return answer


def serve(handle: int) -> None:
    """The loop of a worker: a tokenizer and its options first, then chunks, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[bytes, bytes] = Connection(handle)
    prepare: Preparer | None = None
    with suppress(EOFError, OSError):
        while True:
            data = connection.recv_bytes()
            answer: object = None
            error: Exception | None = None
            try:
                if prepare is None:
                    prepare = Preparer(*pickle.loads(data))
                else:
                    answer = prepare(pickle.loads(data))
            except UserError as known:
                error = known
            except BaseException as bug:  # the parent shows its traceback, or meets it too
                error = RuntimeError(f"in a process that tokenises:\n{traceback.format_exc()}")
                if prepare is None:
                    error = CannotStart(f"the tokenizer cannot be used in another process: {bug}")
            connection.send_bytes(pickle.dumps((answer, error)))
