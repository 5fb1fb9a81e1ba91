"""A program in a terminal of its own, typed to and read from as a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

# What editing and bracketed paste send between the characters.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")
SECONDS = 90.0


class Terminal:
    """``seen`` is all that was shown so far; ``at`` how much of it was waited for."""

    def __init__(self, process: subprocess.Popen[bytes], handle: int) -> None:
        self.process, self._handle = process, handle
        self._raw = b""
        self.at = 0

    @property
    def seen(self) -> str:
        return _ESCAPES.sub("", self._raw.decode("utf-8", "replace"))

    def wait(self, text: str) -> str:
        """Until ``text`` is shown, behind what was waited for before; what stands between."""
        deadline = time.monotonic() + SECONDS
        while (found := self.seen.find(text, self.at)) < 0:
            assert time.monotonic() < deadline and self._read(), f"no {text!r} in {self.seen[self.at :]!r}"
        between = self.seen[self.at : found]
        self.at = found + len(text)
        return between

    def type(self, text: str) -> None:
        os.write(self._handle, text.encode())

    def enter(self, line: str) -> None:
        """Type a line and wait for its echo."""
        self.type(line + "\n")
        self.wait(line)

    def end(self) -> int:
        """Read what is left; the exit status."""
        while self._read():
            pass
        return self.process.wait(SECONDS)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._handle], [], [], SECONDS)
        try:
            data = os.read(self._handle, 65536) if ready else b""
        except OSError:  # the other side is closed
            data = b""
        self._raw += data
        return bool(data)


def terminal(*words: str) -> AbstractContextManager[Terminal]:
    """``prefopt`` with these words."""
    return python_in_terminal("-m", "prefopt", *words)


@contextmanager
def python_in_terminal(*words: str) -> Iterator[Terminal]:
    """Python with these words in a terminal that is its own, so that Ctrl-C reaches it as it does a person's."""
    ours, theirs = pty.openpty()

    def own() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200", "INPUTRC": os.devnull}
    process = subprocess.Popen(
        [sys.executable, *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=own,
        env=environment,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
