r"""What a person types: a line, or several where a line ends in a backslash or a block stands between triple quotes.

>>> import io
>>> reader = LineReader(io.StringIO('one\\ntwo \\\\\\nthree\\n\"\"\"four\\n\\nfive\"\"\"\\n'), None)
>>> reader.read("> "), reader.read("> "), reader.read("> ")
('one', 'two \\nthree', 'four\\n\\nfive')

Python raises ``KeyboardInterrupt`` wherever the program happens to be: just behind an answer that was to be stopped, or
in the lines that deal with the last one. So here it is raised in sections alone. What comes at another time waits for
the next section and ends that.

>>> interrupts = Interrupts()
>>> with interrupts.caught():
...     signal.raise_signal(signal.SIGINT)  # nothing is asked or answered: it is kept
...     try:
...         with interrupts.section():
...             print("not reached")
...     except KeyboardInterrupt:
...         interrupts.taken()
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

WAKE = 0.1
"""Seconds between two looks for a signal while input is waited for."""


class Interrupts:
    """Whoever catches the ``KeyboardInterrupt`` of a section says so by :meth:`taken`."""

    def __init__(self) -> None:
        self._open = False
        self._pending = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within, Ctrl-C is this object's. Outside the main thread, where Python hears no signals, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._came)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def section(self) -> Iterator[None]:
        """Within, Ctrl-C raises ``KeyboardInterrupt``, once; also one that came before."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    def check(self) -> None:
        """Raise what is still to be taken: an exception in a callback, as the garbage collector's, leads nowhere."""
        if self._pending:
            self._open = False
            raise KeyboardInterrupt

    def taken(self) -> None:
        """The section has ended for it."""
        self._pending = False

    def _came(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
        if self._open:
            self._open = False  # whoever deals with this one is not interrupted by the next
            raise KeyboardInterrupt


def woken_input(prompt: str) -> str:
    """``input``, for a terminal.

    Between showing its prompt and waiting for keys it does not look for signals, so that a Ctrl-C there would be seen
    at the next key only (3 of 1500 that were sent as soon as the prompt was there, on a busy machine). A timer's signal
    ends the waiting, Python looks for all of them, and goes on to wait.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return input(prompt)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, WAKE, WAKE)
    try:
        return input(prompt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


QUOTES = '"""'
MORE = "... "


class LineReader:
    """Reads from a terminal by ``ask`` (such as ``input``, which shows a prompt), or without one from a file."""

    def __init__(self, file: TextIO, ask: Callable[[str], str] | None) -> None:
        self._file, self._ask = file, ask

    def read(self, prompt: str) -> str:
        """One message. Raises ``EOFError`` at the end of the input, and lets ``KeyboardInterrupt`` through."""
        line = self._line(prompt)
        if line.startswith(QUOTES):
            return self._block(line.removeprefix(QUOTES))
        parts = []
        while line.endswith("\\"):
            parts.append(line[:-1])
            line = self._line(MORE)
        return "\n".join([*parts, line])

    def _block(self, line: str) -> str:
        parts = []
        while not line.rstrip().endswith(QUOTES):
            parts.append(line)
            line = self._line(MORE)
        return "\n".join([*parts, line.rstrip().removesuffix(QUOTES)])

    def _line(self, prompt: str) -> str:
        if self._ask is not None:
            return self._ask(prompt)
        line = self._file.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n").rstrip("\r")


def terminal_reader() -> LineReader:
    """Standard input; on a terminal with a prompt, editing and what was typed before."""
    import sys

    if not sys.stdin.isatty():
        return LineReader(sys.stdin, None)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it is what gives input() its keys)
    return LineReader(sys.stdin, woken_input)
