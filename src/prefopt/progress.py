"""What a person is told while something runs: lines, bars, times and sizes in words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from prefopt.screen import Screen, one_line, visible

PLAIN_SECONDS = 10.0
"""Where there is no terminal, a line of progress at most this often."""
NOTE_LINES = 4
"""On a terminal, lines of numbers below a bar at most."""


class Reporter:
    """Lines and bars. ``mode``: ``rich``, ``plain``, ``none``, or ``auto`` (rich on a terminal, else plain)."""

    def __init__(self, mode: str = "auto") -> None:
        self._console = Screen()
        self.mode = ("rich" if self._console.is_terminal else "plain") if mode == "auto" else mode

    def say(self, line: str) -> None:
        """One line, whatever is on the screen."""
        if self.mode != "none":
            self._console.print(one_line(line))

    def show(self, text: str) -> None:
        """Text of several lines, such as a row or a file of options."""
        if self.mode != "none":
            self._console.print(text)

    def bar(self, what: str, total: int, unit: str) -> Bar:
        """A bar of ``total`` units; use it as a context."""
        return Bar(self, self._console, what, total, unit)


class Bar:
    """A progress bar with the time left, or a line every few seconds where there is no terminal."""

    def __init__(self, reporter: Reporter, console: Screen, what: str, total: int, unit: str) -> None:
        self._reporter, self._what, self._total, self._unit = reporter, one_line(what), total, unit
        self._started = self._printed = time.monotonic()
        self._first: float | None = None
        self._task: TaskID | None = None
        self._rich = _Noted(unit, console) if reporter.mode == "rich" else None

    def __enter__(self) -> Bar:
        if self._rich:
            self._rich.start()
            self._task = self._rich.add_task(self._what, total=self._total, done=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()

    def update(
        self, done: int, note: str | Sequence[str] = (), *, first: bool = False, work: float | None = None
    ) -> None:
        """``done`` units in all; ``note``: numbers in words; ``first`` prints a plain line however soon.

        ``work``: units' worth of work that is done, where units are finished many at once.
        """
        at = float(done) if work is None else work
        parts = [note] if isinstance(note, str) else list(note)
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = at, now
        if self._rich and self._task is not None:
            self._rich.note = parts
            self._rich.update(self._task, completed=at, done=done)
        elif self._reporter.mode == "plain" and (first or done == self._total or now - self._printed >= PLAIN_SECONDS):
            self._printed = now
            left = ""
            if at > self._first and done < self._total:
                left = f", {duration((now - self._started) / (at - self._first) * (self._total - at))} left"
            told = "".join(f", {part}" for part in parts if part)
            self._reporter.say(f"{self._what}: {done}/{self._total} {self._unit}{left}{told}")


class _Noted(Progress):
    """One bar with its time left, and numbers below it, wrapped between them and never within one."""

    def __init__(self, unit: str, console: Screen) -> None:
        self.note: Sequence[str] = ()
        self._screen = console
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[done]}/{task.total} " + unit, markup=False),
            TimeRemainingColumn(),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the numbers."""
        yield self.make_tasks_table(self.tasks)
        for line in wrapped(self.note, self._screen.width)[:NOTE_LINES]:
            yield Text(visible(line), no_wrap=True, overflow="ellipsis", style="dim")


def wrapped(parts: Iterable[str], width: int) -> list[str]:
    """Lines of whole parts, indented by two, each no wider than ``width`` where one part is not."""
    lines: list[str] = []
    for part in filter(None, parts):
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += "  " + part
        else:
            lines.append("  " + part)
    return lines


def duration(seconds: float) -> str:
    """``41 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes for people: ``3.1 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
