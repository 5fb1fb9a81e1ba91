"""What a person types: a line, or several where a line ends in a backslash or a block stands between triple quotes.

>>> import io
>>> reader = LineReader(io.StringIO('one\\ntwo \\\\\\nthree\\n\"\"\"four\\n\\nfive\"\"\"\\n'), None)
>>> reader.read("> "), reader.read("> "), reader.read("> ")
('one', 'two \\nthree', 'four\\n\\nfive')
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TextIO

from prefopt.generate.interrupts import woken_input

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
