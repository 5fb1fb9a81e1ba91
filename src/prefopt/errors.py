"""The tree of exceptions.

::

    PrefoptError
    ├── UserError            one line for the user: what, where, what to do; exit status 2
    │   ├── ConfigError      an option: unknown, misspelt, out of range, or at odds with another
    │   │   └── ConfigErrors several of them, one a line
    │   ├── DataError        a file or a row of it
    │   ├── ModelError       a model folder, its tokenizer, or a model that cannot be scored as asked
    │   ├── CacheError       the reference cache
    │   ├── StudyError       a file of people's votes
    │   └── RunError         an output folder, a checkpoint, the disk, a preflight check that failed
    │       └── Diverged     training that ran away, or whose numbers are not finite
    └── Interrupted          the user or the system asked to stop; what was computed is kept

A traceback that reaches a user for anything under ``UserError`` is a bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PrefoptError(Exception):
    """Root of everything prefopt raises on purpose. ``in_python``: the message with names of keyword arguments, where a
    function of ``prefopt`` raised it."""

    in_python: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, whatever its class is made from, so that one process can send it to another."""
        return _again, (type(self), self.args), self.__dict__

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the line alone, since the error is in the call and not in the frames."""
        return [f"{type(self).__name__}: {self.in_python or self}"]


def _again(kind: type[PrefoptError], args: tuple[Any, ...]) -> PrefoptError:
    return kind.__new__(kind, *args)


class UserError(PrefoptError):
    """A mistake that the user can fix. The message is one line: what, where, what to do."""


class ConfigError(UserError):
    """An option is unknown, misspelt, out of range or contradicts another."""


class ConfigErrors(ConfigError):
    """Several options at once: the message is one line, and ``lines`` hold a title, a line for each, and advice."""

    def __init__(self, message: str, lines: Sequence[str]) -> None:
        super().__init__(message)
        self.lines = tuple(lines)


class DataError(UserError):
    """A data file, or one row of it, cannot be used."""

    def __init__(self, what: str, *, file: str | None = None, row: int | None = None) -> None:
        """``row`` counts records from 1."""
        self.what, self.file, self.row = what, file, row
        place = ", ".join(p for p in (file, f"row {row}" if row is not None else None) if p)
        super().__init__(f"{place}: {what}" if place else what)


class ModelError(UserError):
    """A model folder is incomplete, or the model cannot be scored as asked."""


class CacheError(UserError):
    """The reference cache cannot be read or written."""


class StudyError(UserError):
    """A study is no study, comes from a newer version, is damaged or in use, or cannot be written."""


class RunError(UserError):
    """An output folder or a checkpoint cannot be used, the disk failed, or a preflight check failed."""


class Diverged(RunError):
    """Training diverged from its reference, or its numbers are not finite."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        """``remedy`` is for a training run by itself; a sweep, which continues without it, reports the reason alone."""
        self.reason, self.remedy = reason, remedy
        super().__init__(f"{reason}; {remedy}" if remedy else reason)


class Interrupted(PrefoptError):
    """Stopped on request (Ctrl-C, SIGTERM) after saving; ``signal`` is its number."""

    def __init__(self, what: str, signal: int) -> None:
        self.signal = signal
        super().__init__(what, signal)  # both, so that one process can send it to another

    def __str__(self) -> str:
        return str(self.args[0])


LONGEST = 300
"""Characters of another library's message, at most."""


def first_line(error: Exception) -> str:
    """The first line of an error, and the second where the first ends in a colon; its type where it is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = " ".join(part.strip() for part in lines[: 2 if lines[0].endswith(":") else 1])
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."
