"""Leaving cleanly: the first Ctrl-C or SIGTERM asks, the second one kills."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from prefopt.errors import Interrupted


class StopRequest:
    """Inside this context the first SIGINT or SIGTERM only sets ``signal``; work looks at it where it can stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def check(self, where: str = "") -> None:
        """Raise :class:`Interrupted` where a stop was asked for; ``where`` says how far the work is."""
        if self.signal is not None:
            raise Interrupted(f"stopped{where}; what was computed is kept, go on with --resume", self.signal)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
