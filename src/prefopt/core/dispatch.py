"""Requests spread over servers: so many in flight at each, tried again, and given to others where a server is lost."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Generic, Protocol, TypeVar

from prefopt.core.endpoint import Flags, ServerRefusal, Unreachable
from prefopt.errors import RunError

ATTEMPTS = 4
PAUSE = 0.5
"""Seconds before the second attempt, doubled before every other."""
LOOK_EVERY = 0.2
"""Seconds between two looks at whether to stop, where no answer comes."""
DRAIN = 30.0
"""Most seconds to wait, after an error, for answers on their way."""


BUSY = (408, 425, 429)
"""Statuses below 500 after which another attempt may help."""
AGAIN = "start one again and continue with --resume"


class ServersLost(RunError):
    """No server is left. What was finished before is kept, and the run can be resumed."""


class ServerFailed(RunError):
    """A request that may succeed when it is sent again, or to another server."""

    def __init__(self, what: str, kind: str = "retries") -> None:
        """``kind``: what it is counted as."""
        self.kind = kind
        super().__init__(what)


class Losable(Protocol):
    """A server. ``lost``: why it is not asked any more; empty where it is."""

    lost: str

    @property
    def place(self) -> str:
        """Host and port."""
        ...


Server = TypeVar("Server", bound=Losable)
Answer = TypeVar("Answer")


def refuse_none_left(servers: Sequence[Losable], flag: str, remedy: str = AGAIN) -> None:
    """Raise :class:`ServersLost` where no server is left; ``flag`` is the option that names them."""
    if all(server.lost for server in servers):
        reasons = "; ".join(dict.fromkeys(server.lost for server in servers))
        raise ServersLost(f"no server of {flag} is left ({reasons}); {remedy}")


@contextmanager
def failures(flags: Flags, advice: Callable[[str], str] = lambda what: "") -> Iterator[None]:
    """In this block errors of an endpoint are :class:`ServerFailed` where another attempt may help, and else a
    :class:`RunError` that names the option with its URL, with ``advice`` on what the server said, or on its status."""
    try:
        yield
    except Unreachable as error:
        raise ServerFailed(str(error)) from error
    except ServerRefusal as error:
        if error.status >= 500 or error.status in BUSY:
            raise ServerFailed(str(error)) from error
        raise RunError(f"{flags.url} {error}{advice(error.what) or _on_status(error.status, flags)}") from error


def _on_status(status: int, flags: Flags) -> str:
    """What to do about a refusal by its HTTP status, as the end of a line."""
    if status in (401, 403):
        return f"; check {flags.key}, the environment variable with the key"
    return f"; check {flags.model}, and the path in {flags.url}" if status == 404 else ""


class Dispatch(Generic[Server, Answer]):
    """Answers to ``number`` requests, numbered from 0; ``ask`` sends one to a server, in a thread.

    A request that raises :class:`ServerFailed` is sent again after a pause, to the same server; after :data:`ATTEMPTS`
    in a row that server is lost and the request goes to another. Any other error ends the whole. ``count`` is told what
    failed, from any thread. ``remedy``: what to do where no server is left.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        number: int,
        ask: Callable[[Server, int], Answer],
        *,
        flag: str,
        concurrency: int,
        pause: float = PAUSE,
        count: Callable[[str], None] = lambda kind: None,
        remedy: str = AGAIN,
    ) -> None:
        self.remedy = remedy
        self.servers, self.number, self.ask, self.flag = servers, number, ask, flag
        self.concurrency, self.pause, self.count = concurrency, pause, count
        self._waiting = deque(range(number))
        self._left = number
        self._asking = 0  # requests that threads are at
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._answers: queue.Queue[tuple[int, Answer] | BaseException] = queue.Queue()

    def run(self, progress: Callable[[Answer | None], None] = lambda answer: None) -> list[Answer]:
        """All answers, in the order of the requests. ``progress`` is called with each as it comes, and with None now
        and then; what it raises ends the whole. After an error, answers on their way are still waited for, at most
        :data:`DRAIN` seconds: they may be paid for. Raises :class:`ServersLost`."""
        found: dict[int, Answer] = {}
        try:
            for server in self.servers:
                for _ in range(0 if server.lost else min(self.concurrency, self.number)):
                    threading.Thread(target=self._work, args=(server,), daemon=True).start()
            while len(found) < self.number:
                answer = self._next_answer()
                if isinstance(answer, BaseException):
                    self._drain(progress)
                    raise answer
                if answer is not None:
                    found[answer[0]] = answer[1]
                progress(None if answer is None else answer[1])
        finally:
            self._over.set()
            with self._changed:
                self._changed.notify_all()
        return [found[n] for n in range(self.number)]

    def _drain(self, progress: Callable[[Answer | None], None]) -> None:
        """Ask nothing more, and wait for the answers on their way, which ``ask`` may keep."""
        self._over.set()
        until = time.monotonic() + DRAIN
        with self._changed:
            while self._asking and time.monotonic() < until:
                self._changed.wait(LOOK_EVERY)
                progress(None)

    def _next_answer(self) -> tuple[int, Answer] | BaseException | None:
        lost = all(server.lost for server in self.servers)  # before the look: who is lost gives no further answer
        with suppress(queue.Empty):
            return self._answers.get(timeout=LOOK_EVERY)
        if lost:
            refuse_none_left(self.servers, self.flag, self.remedy)
        return None

    def _work(self, server: Server) -> None:
        """What a thread does: one request after the other, until there is none left, or the server is lost."""
        while (n := self._take(server)) is not None:
            try:
                answer = self._tried(server, n)
            except BaseException as error:  # told by the thread that waits
                with self._changed:
                    self._asking -= 1
                self._answers.put(error)
                return
            with self._changed:
                self._asking -= 1
                if answer is None:
                    self._waiting.appendleft(n)
                else:
                    self._left -= 1
                    self._answers.put((n, answer[0]))
                self._changed.notify_all()

    def _take(self, server: Server) -> int | None:
        """The next request. Those in flight may still come back, from servers that are lost."""
        with self._changed:
            while not (self._waiting or self._over.is_set() or server.lost or not self._left):
                self._changed.wait()
            if self._over.is_set() or server.lost or not self._waiting:
                return None
            self._asking += 1
            return self._waiting.popleft()

    def _tried(self, server: Server, n: int) -> tuple[Answer] | None:
        """The answer, in a tuple; None where the server is lost, or all is over."""
        for attempt in range(ATTEMPTS):
            if server.lost or self._over.is_set():
                return None
            try:
                return (self.ask(server, n),)
            except ServerFailed as error:
                self.count(error.kind)
                if attempt == ATTEMPTS - 1:
                    server.lost = server.lost or f"{server.place}: {error}"
                    return None
            self._over.wait(self.pause * 2**attempt)
        return None
