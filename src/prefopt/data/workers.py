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
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from prefopt.data.prepare import Chunk, Preparer, Row
from prefopt.data.rendering import Rendering
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import Want
from prefopt.errors import DataError, UserError

MOST = 8
"""More than these wait for the one that reads."""
AHEAD = 3
"""Chunks that may be read, for each worker, before the oldest is done: what bounds the memory."""


class CannotStart(Exception):
    """The tokenizer cannot be handed to another process."""


class Workers:
    """Processes that each hold the tokenizer; use it as a context, which ends them at once however it is left."""

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering, want: Want, count: int, *, file: str = "") -> None:
        """Starts them. Raises :class:`CannotStart`, and :class:`UserError` as :class:`Preparer`."""
        if os.name != "posix":
            raise CannotStart("it needs sockets that a process inherits")
        try:
            task = pickle.dumps((tokenizer, rendering, want))
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
                [sys.executable, "-P", "-m", "prefopt.data.workers", str(theirs.fileno())],
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


def _serve(handle: int) -> None:
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


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
