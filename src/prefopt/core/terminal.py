"""Output to a terminal, all of it through :func:`visible`; progress bars; and stop signals.

Data, run records, answers of models, file names and messages of other libraries may contain control codes: they can
write to the clipboard, retitle the window, overwrite lines, or reorder text. Here they are escaped. Files (rows, JSON)
keep every character.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from prefopt.core.notebook import NotebookDisplay, in_notebook
from prefopt.core.python_words import in_python
from prefopt.errors import Interrupted

# C0 but for tab and line feed, DEL, C1, line and paragraph separators, embeddings and overrides of direction,
# isolates, and halves of surrogate pairs (which is how Python holds a file name that is not UTF-8). The marks of
# direction U+200E, U+200F and U+061C stay: they turn no other letters round, and such scripts need them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, encoding: str | None = "utf-8") -> str:
    r"""``text`` with control codes, and characters that ``encoding`` lacks, as escapes; idempotent.

    >>> visible("red: \x1b[31m, other way round: \u202e")
    'red: \\x1b[31m, other way round: \\u202e'
    """
    shown = text if text.isascii() and text.isprintable() else _OBEYED.sub(_escape, text)
    if encoding is None or shown.isascii():
        return shown
    try:
        return shown.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return ascii(shown)[1:-1]


def one_line(text: str) -> str:
    return visible(" ".join(text.splitlines()) if "\n" in text or "\r" in text else text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def tell(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
    write(sys.stdout, text + end)
    if flush:
        sys.stdout.flush()


def tell_lines(lines: Iterable[str]) -> None:
    """Lines on standard output, without line ends of their own."""
    for line in lines:
        tell(one_line(line))


def tell_json(document: object, *, indent: int = 2) -> None:
    tell(json_text(document, indent=indent))


def json_text(document: object, *, indent: int = 2) -> str:
    """JSON in printable ASCII, from which a parser gets every character."""
    return json.dumps(document, indent=indent, ensure_ascii=True).replace("\x7f", "\\u007f")


def complain(text: str) -> None:
    write(sys.stderr, text + "\n")


def write(out: TextIO, text: str) -> None:
    """Write text to a stream that may be a terminal."""
    out.write(visible(text, out.encoding or "utf-8"))


class Screen(Console):
    """Rich's console without markup and emoji names, with control codes escaped."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"highlight": False, "soft_wrap": True, "markup": False, "emoji": False, **more})

    def render_str(self, text: str, **more: Any) -> Text:
        """Text with escapes; rich would drop some codes silently."""
        return super().render_str(visible(text, self.encoding), **more)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's segments; its own codes are marked ``control``."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text, self.encoding), style, control)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Escape log records, warnings and final tracebacks too."""
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *args, **named: visible(form(*args, **named))
    sys.excepthook = _show_traceback  # not restored: it is needed after this context
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return visible(super().getMessage())


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    write(sys.stderr, "".join(traceback.format_exception(kind, error, trace)))


PLAIN_SECONDS = 10.0
"""Without a terminal, seconds between lines of progress."""
NOTE_LINES = 4
"""On a terminal, most lines of numbers below a bar."""


class Reporter:
    """Lines and bars. ``mode``: ``rich``, ``plain``, ``none``, or ``auto``: rich on a terminal, one bar that is updated
    in place in a notebook, else plain."""

    def __init__(self, mode: str = "auto") -> None:
        self._console = Screen()
        self.display = NotebookDisplay() if mode == "auto" and in_notebook() else None
        if mode == "auto":
            mode = "notebook" if self.display else "rich" if self._console.is_terminal else "plain"
        self.mode = mode

    def say(self, line: str) -> None:
        self.show(one_line(in_python(line) if self.mode == "notebook" else line))

    def show(self, text: str) -> None:
        if self.mode == "notebook":
            tell(text)  # rich would make an output of its own of each line
        elif self.mode != "none":
            self._console.print(text)

    def bar(self, what: str, total: int, unit: str) -> Bar:
        """A bar of ``total`` units, as a context manager."""
        return Bar(self, self._console, what, total, unit)


class Bar:
    """A progress bar with the time left, or a line every few seconds where there is no terminal."""

    def __init__(self, reporter: Reporter, console: Screen, what: str, total: int, unit: str) -> None:
        self._reporter, self._what, self._total = reporter, one_line(what), total
        self._started = self._printed = time.monotonic()
        self._first: float | None = None
        self._task: TaskID | None = None
        self._unit, self._display = unit, reporter.display
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
        """Report ``done`` units in total, with ``note``; ``first`` forces a plain line.

        ``work``: the work done, in units, where many units finish at once.
        """
        at = float(done) if work is None else work
        parts = [note] if isinstance(note, str) else list(note)
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = at, now
        if self._rich and self._task is not None:
            self._rich.note = parts
            self._rich.update(self._task, completed=at, done=done)
        left = self._left(now, at) if at > self._first and done < self._total else ""
        ends = first or done == self._total
        if self._display is not None:
            note_lines = [visible(part) for part in [left, *parts] if part]
            self._display.show(self._what, done, self._total, self._unit, note_lines, now=ends)
        elif self._reporter.mode == "plain" and (ends or now - self._printed >= PLAIN_SECONDS):
            self._printed = now
            notes = "".join(f", {part}" for part in [left, *parts] if part)
            self._reporter.say(f"{self._what}: {done}/{self._total} {self._unit}{notes}")

    def _left(self, now: float, at: float) -> str:
        """The time left, at the speed since the first report."""
        assert self._first is not None
        return f"{duration((now - self._started) / (at - self._first) * (self._total - at))} left"


class _Noted(Progress):
    """One bar with the time left, and numbers below it, wrapped between numbers."""

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
        yield self.make_tasks_table(self.tasks)
        for line in wrapped(self.note, self._screen.width)[:NOTE_LINES]:
            yield Text(visible(line), no_wrap=True, overflow="ellipsis", style="dim")


def wrapped(parts: Iterable[str], width: int) -> list[str]:
    """Lines of whole parts, indented by two, no wider than ``width`` where the parts allow."""
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
    """Bytes with a unit: ``3.1 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class StopRequest:
    """Inside this context the first SIGINT or SIGTERM only sets ``signal``, and the second one kills."""

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
        """Raise :class:`Interrupted` after a stop signal; ``where`` describes the progress."""
        if self.signal is not None:
            raise Interrupted(f"stopped{where}; what was computed is kept, continue with --resume", self.signal)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
