"""Processes that tokenise: started anew instead of forked, since the threads of torch and tokenizers do not survive
that, and without the caller's main module, which need not be made for being imported twice.

What goes to a worker and comes back is pickled, over a socket that nobody else can open. A worker whose parent is gone
reads the end of it and leaves.
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
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from prefopt.data.chat.render import Rendered, Renderer
from prefopt.data.chat.render_options import Rendering
from prefopt.data.group import Group
from prefopt.data.table import Array, TableBuilder
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import DataKind, Problem, Warnings, check, convert
from prefopt.errors import DataError, UserError
from prefopt.records import Comparison

Row = Comparison | Problem

# Imported by name: a class of the main module could not be unpickled elsewhere.
SERVE = "import sys; from prefopt.data.workers import serve; serve(int(sys.argv[1]))"
CHUNK_ROWS = 256
CHUNK_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became of ``rows`` rows that follow one another: columns of groups, and problems in the order of the rows.

    ``conversations``: some of the groups went through a chat template.
    """

    rows: int
    columns: dict[str, Array]
    problems: list[Problem]
    warnings: Warnings
    conversations: bool


class Preparer:
    """Makes chunks with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering, kind: DataKind) -> None:
        """Raises :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`."""
        self.renderer, self.kind = Renderer(tokenizer, rendering), kind

    def __call__(self, rows: Sequence[Row]) -> Chunk:
        """Every row becomes a group or has a problem, whichever rows it stands with."""
        problems: list[Problem] = []
        good: list[Comparison] = []
        for row in rows:
            found = [row] if isinstance(row, Problem) else check(row, self.kind)
            problems += found
            if isinstance(row, Comparison) and not found:
                converted = convert(row, self.kind)
                assert isinstance(converted, Comparison), "what was checked can be converted"
                good.append(converted)
        builder = TableBuilder()
        for comparison, rendered in zip(good, self._rendered(good), strict=True):
            if isinstance(rendered, Problem):
                problems.append(rendered)
                continue
            builder.add(
                rendered.group,
                prompt_key=comparison.prompt_key,
                prompt_cut=rendered.prompt_cut,
                cuts=rendered.responses_cut or None,
            )
            for group in rendered.more:
                builder.add(group, prompt_key=comparison.prompt_key)
        warnings = {what: list(numbers) for what, numbers in self.renderer.warnings.items()}
        self.renderer.warnings.clear()
        problems.sort(key=lambda p: p.row)
        return Chunk(len(rows), builder.columns(), problems, warnings, any(not c.text for c in good))

    def _rendered(self, good: Sequence[Comparison]) -> Iterator[Rendered | Problem]:
        if self.kind != "prompts":
            yield from self.renderer.render_all(good)
            return
        for comparison, ids in zip(good, self.renderer.prompts(good), strict=True):
            yield ids if isinstance(ids, Problem) else Rendered(Group(ids, (), comparison.row, ()))


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in runs of so many, or fewer where they are long."""
    chunk: list[Row] = []
    room = CHUNK_CHARACTERS
    for row in rows:
        chunk.append(row)
        if isinstance(row, Comparison):
            room -= sum(len(m.content) for turns in (row.prompt, *(r.messages for r in row.responses)) for m in turns)
        if len(chunk) == CHUNK_ROWS or room <= 0:
            yield chunk
            chunk, room = [], CHUNK_CHARACTERS
    if chunk:
        yield chunk


MOST = 8
"""More than these wait for the one that reads."""
AHEAD = 3
"""Chunks that may be read, for each worker, before the oldest is done: what bounds the memory."""


class CannotStart(Exception):
    """The tokenizer cannot be handed to another process."""


class Workers:
    """Processes that each hold the tokenizer; use it as a context, which ends them at once however it is left."""

    def __init__(
        self, tokenizer: Tokenizer, rendering: Rendering, kind: DataKind, count: int, *, file: str = ""
    ) -> None:
        """Starts them. Raises :class:`CannotStart`, and :class:`UserError` as :class:`Preparer`."""
        if os.name != "posix":
            raise CannotStart("it needs sockets that a process inherits")
        try:
            task = pickle.dumps((tokenizer, rendering, kind))
        except Exception as error:  # whatever an object of the caller's may raise
            raise CannotStart(f"the tokenizer cannot be pickled: {error}") from error
        self.file = file
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(count)
        try:
            for _ in range(count):
                try:
                    self._workers.append(_Worker(file))
                except OSError as error:
                    raise CannotStart(f"no other process can be started: {error.strerror}") from error
            for ready in [self._threads.submit(worker.ask, task) for worker in self._workers]:
                if (why := ready.result()) is not None:
                    raise CannotStart(why)
        except BaseException:
            self._end()
            raise
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def map(self, chunks: Iterable[Sequence[Row]], stop: Callable[[], None] | None = None) -> Iterator[Chunk]:
        """Each chunk prepared, in order. ``stop`` is called several times a second and may raise.

        Raises :class:`DataError` where a process ends by itself.
        """
        waiting: deque[Future[Chunk]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._prepare, chunk))
            if len(waiting) >= AHEAD * len(self._workers):
                yield _result(waiting.popleft(), stop)
            elif stop is not None:
                stop()
        while waiting:
            yield _result(waiting.popleft(), stop)

    def _prepare(self, chunk: Sequence[Row]) -> Chunk:
        worker = self._idle.get()
        try:
            found: Chunk = worker.ask(pickle.dumps(chunk))
            return found
        finally:
            self._idle.put(worker)

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()
        # A thread that waits for a worker reads the end of its socket.
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.socket.close()


def _result(future: Future[Chunk], stop: Callable[[], None] | None) -> Chunk:
    while True:
        try:
            return future.result(timeout=0.2)
        except NotYet:
            if future.done():  # the work itself raised it
                raise
            if stop is not None:
                stop()


class _Worker:
    """One process and the socket to it."""

    def __init__(self, file: str) -> None:
        self.file = file
        ours, theirs = socket.socketpair()
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *(p for p in sys.path if p and p != package)]
        environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with theirs:
            # In a session of its own, so that Ctrl-C reaches the one that decides what to do about it, and only that.
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
        """Send a message and wait for the answer; what was raised over there is raised here."""
        try:
            self.socket.send_bytes(data)
            good, answer = pickle.loads(self.socket.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if good:
            return answer
        raise answer if isinstance(answer, UserError) else RuntimeError(f"in a process that tokenises:\n{answer}")

    def _gone(self) -> DataError:
        status = self.process.wait(timeout=10)
        how = f"was ended by signal {-status} (is memory short?)" if status < 0 else f"ended with status {status}"
        return DataError(f"a process that tokenises {how}; run the command again", file=self.file or None)

    def end(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()


def serve(handle: int) -> None:
    """What a worker does until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[bytes, bytes] = Connection(handle)
    prepare: Preparer | None = None
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return
        answer: tuple[bool, object]
        try:
            if prepare is None:
                answer = (True, None)
                try:
                    task = pickle.loads(data)
                except Exception as error:  # its class is not to be found here, say
                    answer = (True, f"the tokenizer cannot be unpickled: {error}")
                else:
                    prepare = Preparer(*task)
            else:
                answer = (True, prepare(pickle.loads(data)))
        except UserError as error:
            answer = (False, error)
        except BaseException:  # a bug, which is told where a person sees it
            answer = (False, traceback.format_exc())
        try:
            connection.send_bytes(pickle.dumps(answer))
        except OSError:
            return
