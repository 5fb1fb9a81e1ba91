"""A process that kills itself at a counted file operation: where it dies does not depend on how fast anything is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NamedTuple

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir"}
"""Audit events of Python that count; each comes before its operation, and ``os.replace`` is ``os.rename``."""


class Death(NamedTuple):
    """When to die: at operation ``more`` (from 0) as of the ``number``-th rename to a path with ``mark`` in it. Where
    ``more`` is 0 that rename is not made; where ``number`` is 0, operations count from the start."""

    mark: str
    number: int
    more: int


def die_at(death: Death) -> None:
    """From here on count this process's file operations, and kill it (SIGKILL) at the one that ``death`` names."""
    renames = operations = 0
    lock = threading.Lock()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal renames, operations
        if event not in OPERATIONS:
            return
        with lock:
            if renames < death.number:
                renames += event == "os.rename" and death.mark in str(arguments[1])
                if renames < death.number:
                    return
            if operations == death.more:
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1

    sys.addaudithook(count)
