"""Progress in a notebook: one display that is updated in place, whatever bars a run has. No widgets are needed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from typing import Any

EVERY = 0.2
"""Seconds between two updates of the display."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    found = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = found() if found is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookDisplay:
    """The display of one reporter. It appears with the first bar; the bars that follow take its place."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._updated = 0.0

    def show(self, what: str, done: int, total: int, unit: str, note: Sequence[str], *, now: bool = False) -> None:
        """Update it; not more often than every :data:`EVERY` seconds, unless ``now``."""
        time_now = time.monotonic()
        if not now and time_now - self._updated < EVERY:
            return
        self._updated = time_now
        content = _NotebookBar(what, done, total, unit, [part for part in note if part])
        if self._handle is None:
            from IPython.display import display

            self._handle = display(content, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(content)


class _NotebookBar:
    """One state of a bar, as HTML and as text."""

    def __init__(self, what: str, done: int, total: int, unit: str, note: Sequence[str]) -> None:
        self._what, self._done, self._total, self._unit, self._note = what, done, total, unit, note

    def __repr__(self) -> str:
        return ", ".join([f"{self._what}: {self._done}/{self._total} {self._unit}", *self._note])

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._done}" max="{max(self._total, 1)}" style="width:18em"></progress>'
        note = f'<br><small style="opacity:.75">{escape("  ·  ".join(self._note))}</small>' if self._note else ""
        return f"<div>{escape(self._what)} {bar} {self._done}/{self._total} {escape(self._unit)}{note}</div>"
