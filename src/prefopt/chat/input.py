"""Input of a chat: lines, or several where one ends in a backslash or a block stands in triple quotes; and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

WAKE_SECONDS = 0.1
"""Time between two looks for a signal while input is waited for."""
QUOTES = '"""'
MORE = "... "


class Interrupts:
    """Ctrl-C that ends the answer or the question under way, and nothing else.

    Python raises ``KeyboardInterrupt`` wherever the program happens to be, such as just after an answer that was to be
    stopped. Here it is raised in sections alone; one that comes at another time ends the next section. Whoever catches
    it calls :meth:`taken`.

    >>> interrupts = Interrupts()
    >>> with interrupts.caught():
    ...     signal.raise_signal(signal.SIGINT)  # outside a section: kept
    ...     try:
    ...         with interrupts.section():
    ...             print("not reached")
    ...     except KeyboardInterrupt:
    ...         interrupts.taken()
    """

    def __init__(self) -> None:
        self._open = False
        self._pending = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle SIGINT here. Does nothing outside the main thread, where Python hears no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def section(self) -> Iterator[None]:
        """Raise ``KeyboardInterrupt`` once on Ctrl-C, also on one that came before."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    def check(self) -> None:
        """Raise a pending interrupt: an exception in a callback, such as of the garbage collector, is swallowed."""
        if self._pending:
            self._open = False
            raise KeyboardInterrupt

    def taken(self) -> None:
        """The interrupt was handled."""
        self._pending = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
        if self._open:
            self._open = False  # the handling of this interrupt is not interrupted by the next
            raise KeyboardInterrupt


def interruptible_input(prompt: str) -> str:
    """``input`` that hears a Ctrl-C as soon as the prompt is shown.

    Between the prompt and the first key, ``input`` does not look for signals, so that an early Ctrl-C is delayed until
    a key is pressed (3 of 1500 on a busy machine). The signals of a timer make Python look.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return input(prompt)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, WAKE_SECONDS, WAKE_SECONDS)
    try:
        return input(prompt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class LineReader:
    """Reads from a terminal by ``ask`` (such as ``input``, which shows a prompt), or without it from a file.

    >>> import io
    >>> file = io.StringIO(f"one\\ntwo \\\\\\nthree\\n{QUOTES}four\\n\\nfive{QUOTES}\\n")
    >>> reader = LineReader(file, None)
    >>> reader.read("> "), reader.read("> "), reader.read("> ")
    ('one', 'two \\nthree', 'four\\n\\nfive')
    """

    def __init__(self, file: TextIO, ask: Callable[[str], str] | None) -> None:
        self._file, self._ask = file, ask

    def read(self, prompt: str) -> str:
        """One message. Raises ``EOFError`` at the end of the input, and ``KeyboardInterrupt``."""
        line = self._line(prompt)
        parts = []
        if line.startswith(QUOTES):
            line = line.removeprefix(QUOTES)
            while not line.rstrip().endswith(QUOTES):
                parts.append(line)
                line = self._line(MORE)
            return "\n".join([*parts, line.rstrip().removesuffix(QUOTES)])
        while line.endswith("\\"):
            parts.append(line[:-1])
            line = self._line(MORE)
        return "\n".join([*parts, line])

    def _line(self, prompt: str) -> str:
        if self._ask is not None:
            return self._ask(prompt)
        line = self._file.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n").rstrip("\r")


def terminal_reader() -> LineReader:
    """A reader of standard input, on a terminal with a prompt, line editing and history."""
    if not sys.stdin.isatty():
        return LineReader(sys.stdin, None)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its keys)
    return LineReader(sys.stdin, interruptible_input)
