"""The one stream of events that a page reads: what has changed since it last heard, of the topics that it shows.

Topics are asked while somebody listens and at no other time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

log = logging.getLogger("prefopt.ui")
PACE = 1.0
"""Seconds between two looks at files."""
REST = 0.05
"""Least seconds between two answers, however fast tokens come."""
BEAT = 15.0
"""Seconds of silence after which a comment keeps the connection alive."""

Event = tuple[str, Any]
"""A name, and a value that is sent as JSON."""


class Topic(Protocol):
    """Something that one page follows. The first call gives all of it."""

    def changes(self) -> Iterable[Event]:
        """What is new since the last call."""


class Feed:
    """All streams of a server."""

    def __init__(self) -> None:
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[asyncio.Event] = set()

    def wake(self) -> None:
        """Let every stream look now. Any thread may call it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for event in self._waiting:
            event.set()

    def close(self) -> None:
        """End all streams: the server is stopping."""
        self.closed = True
        self.wake()

    async def stream(self, topics: Sequence[Topic]) -> AsyncIterator[bytes]:
        """Server-sent events of the topics, until the page goes or the server stops."""
        self._loop, woken, heard = asyncio.get_running_loop(), asyncio.Event(), time.monotonic()
        self._waiting.add(woken)
        try:
            yield b"retry: 2000\n\n"
            while not self.closed:
                woken.clear()
                if events := await run_in_threadpool(_changes, topics):
                    yield b"".join(map(written, events))
                    heard = time.monotonic()
                elif time.monotonic() - heard > BEAT:
                    yield b": still here\n\n"
                    heard = time.monotonic()
                await asyncio.sleep(REST)
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), PACE)
        finally:
            self._waiting.discard(woken)


def written(event: Event) -> bytes:
    """An event on the wire; JSON has no line ends, so that it is one line.

    >>> written(("log", {"text": "a"}))
    b'event: log\\ndata: {"text": "a"}\\n\\n'
    """
    name, value = event
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=True)}\n\n".encode()


def _changes(topics: Sequence[Topic]) -> list[Event]:
    found: list[Event] = []
    for topic in topics:
        try:
            found += topic.changes()
        except Exception:  # one topic that fails does not silence the others
            log.exception("%s failed", type(topic).__name__)
    return found
